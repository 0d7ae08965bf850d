"""The accuracy script: its table on a tiny model, and the page that shows the saved one."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from folders import save_float_folder
from repository import ROOT, load_script


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    return load_script("benchmarks/accuracy.py")


@pytest.mark.usefixtures("one_thread")
def test_every_variant_of_a_tiny_model(accuracy: ModuleType, tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float")
    (tmp_path / "text.txt").write_text("a text to measure on, and one to calibrate with. " * 40)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n")
    accuracy.main(
        [str(tmp_path / "float"), "--text", str(tmp_path / "text.txt"), "--calibration", str(tmp_path / "text.txt"),
         "--output", str(tmp_path / "out" / "table"), "--window", "64", "--samples", "8", "--max-tokens", "500",
         "--document", str(page)]
    )  # fmt: skip
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
