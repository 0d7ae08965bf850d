"""The script that measures generation, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "generation.py"


def test_table_of_a_tiny_model(tmp_path: Path, capsys) -> None:
    specification = importlib.util.spec_from_file_location("generation", SCRIPT)
    assert specification is not None and specification.loader is not None
    generation = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generation)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path / "out" / "generation.json"
    generation.main(
        ["tiny", "--device", "cpu", "--new-tokens", "2", "--prompt-tokens", "3", "--repeats", "1",
         "--batch-size", "1", "3", "--output", str(output)]
    )  # fmt: skip
    torch.set_num_threads(threads)
    runs = json.loads(output.read_text())["runs"]
    assert [run["group_size"] for run in runs] == [None, 128, -1]
    assert all(run["tokens_per_second"].keys() == {"1", "3"} for run in runs)
    assert runs[0]["weight_bytes"] > 2 * runs[1]["weight_bytes"] > 2 * runs[2]["weight_bytes"]
    table = capsys.readouterr().out
    assert "| QQQ, groups of 128 |" in table and "batch 3" in table
