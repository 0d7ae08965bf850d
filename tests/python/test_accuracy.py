"""The accuracy script: its table on a tiny model, and the page that shows the saved one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from folders import save_float_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    specification = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks" / "accuracy.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["accuracy"] = module
    specification.loader.exec_module(module)
    return module


def test_every_variant_of_a_tiny_model(accuracy: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    save_float_folder(tmp_path / "float")
    (tmp_path / "text.txt").write_text("a text to measure on, and one to calibrate with. " * 40)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n")
    accuracy.main(
        [str(tmp_path / "float"), "--text", str(tmp_path / "text.txt"), "--calibration", str(tmp_path / "text.txt"),
         "--output", str(tmp_path / "out" / "table"), "--window", "64", "--samples", "8", "--max-tokens", "500",
         "--document", str(page)]
    )  # fmt: skip
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["method"], row["group_size"]) for row in report["rows"]] == [
        ("original", None),
        *((method, group_size) for group_size in (-1, 128) for method in accuracy.METHODS),
    ]
    perplexities = [row["perplexity"] for row in report["rows"]]
    assert len(set(perplexities)) == len(perplexities)  # no variant was measured twice
    assert all(value / perplexities[0] < 1.5 for value in perplexities)
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"**{perplexities[0]:.3f}**" in table and f"| GPTQ | {report['rows'][3]['perplexity']:.3f} (" in table
    assert page.read_text() == f"before\n<!-- accuracy:begin -->\n{table}<!-- accuracy:end -->\nafter\n"


def test_the_page_shows_the_saved_run(accuracy: ModuleType) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "accuracy" / "demo.json").read_text())
    page = (ROOT / "docs" / "convert.md").read_text()
    assert accuracy.fill(page, accuracy.as_markdown(report)) == page
