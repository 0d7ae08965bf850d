"""The script that measures generation, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repository import load_script


@pytest.mark.usefixtures("one_thread")
def test_table_of_a_tiny_model(tmp_path: Path, capsys) -> None:
    generation = load_script("benchmarks/generation.py")
    output = tmp_path / "out" / "generation.json"
    generation.main(
        ["tiny", "--device", "cpu", "--new-tokens", "2", "--prompt-tokens", "3", "--repeats", "1",
         "--batch-size", "1", "3", "--output", str(output)]
    )  # fmt: skip
    runs = json.loads(output.read_text())["runs"]
    assert [run["group_size"] for run in runs] == [None, 128, -1]
    assert all(run["tokens_per_second"].keys() == {"1", "3"} for run in runs)
    assert runs[0]["weight_bytes"] > 2 * runs[1]["weight_bytes"] > 2 * runs[2]["weight_bytes"]
    table = capsys.readouterr().out
    assert "| QQQ, groups of 128 |" in table and "batch 3" in table
