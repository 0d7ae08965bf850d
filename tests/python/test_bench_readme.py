"""benchmarks/: the goals judged from a run, and the texts and figures regenerated from saved runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from repository import ROOT, load_script

from marlin_qqq.bench.presets import REFERENCE_SHAPES, parse_integers
from marlin_qqq.bench.problem import Ceilings, GemmProblem
from marlin_qqq.bench.results import OURS, Measurement, Run, load_run

TOKENS = (1, 16, 64, 256, 1024, 4096)
CEILINGS = Ceilings(4600.0, "", 1910.0, "")


goals = load_script("benchmarks/goals.py")


def make_run(factors: dict[tuple[str, int | None], float], method: str = "graph") -> Run:
    rows = []
    for layer in REFERENCE_SHAPES:
        for tokens in TOKENS:
            for (name, mode), factor in factors.items():
                problem = GemmProblem(tokens, layer.out_features, layer.in_features, mode or -1)
                floor = CEILINGS.floor_us(problem.bytes_moved, problem.operations)
                rows.append(
                    Measurement(
                        "gemm", name, tokens, layer.out_features, layer.in_features, mode, layer.name, method,
                        median_us=floor * factor, p10_us=floor * factor, p90_us=floor * factor, floor_us=floor,
                    )
                )  # fmt: skip
    environment = {"gpu": {"name": "a made-up GPU"}, "torch": "2.11", "created": "2026-01-02", "commit": "abcdef123456"}
    return Run(environment=environment, ceilings={"read_gbps": 4600.0}, measurements=rows)


FACTORS = {
    (OURS, -1): 1.2,
    (OURS, 128): 1.2,
    (f"{OURS}:constant", -1): 1.1,
    ("humming", -1): 1.5,
    ("humming", 128): 2.4,
    ("fp16", None): 3.0,
    ("read", -1): 1.15,
    ("read", 128): 1.2,
}


def judged(run: Run) -> dict[str, object]:
    return {goal.name: goal for goal in goals.judge(run)}


def test_goals_find_the_worst_place():
    run = make_run(FACTORS)
    by_name = judged(run)
    read = by_name["M 1..16, weights >= 40 MB: time / plain read (layer)"]
    assert read.worst.value == pytest.approx(1.1 / 1.15)
    assert read.num_met == len(read.places) == 2 * 3  # M of 1 and 16, three shapes of more than 40 MB
    humming = by_name["every M and mode: times as fast as humming"]
    assert humming.worst.value == pytest.approx(1.25)
    assert humming.num_met == len(humming.places) == 2 * len(TOKENS) * len(REFERENCE_SHAPES)
    floor = by_name["M 512..1024 per-channel: time / floor"]
    assert (floor.worst.value, floor.num_met) == (pytest.approx(1.2), 0)
    assert "MISS" in floor.line() and floor.worst.where in floor.line()


def test_goals_without_data_say_not_measured():
    assert all("not measured" in goal.line() for goal in goals.judge(Run()))
    sustained = [name for name in judged(make_run(FACTORS)) if "sustained" in name]
    assert sustained and all(judged(make_run(FACTORS))[name].worst is None for name in sustained)


def test_an_inversion_is_seen():
    run = make_run({(OURS, -1): 1.0})
    row = next(m for m in run.measurements if m.num_tokens == 16)
    row.median_us = 2 * row.median_us
    goal = judged(run)["latency grows with M: slowest smaller M / time"]
    assert goal.worst.value > 1.9
    assert "M=64" in goal.worst.where and "after M=16" in goal.worst.where


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    marker = "before\n<!-- benchmark:{0}:begin -->\nold\n<!-- benchmark:{0}:end -->\nafter\n"
    (tmp_path / "README.md").write_text("# A\n" + marker.format("headline"))
    (tmp_path / "docs/benchmark.md").write_text("".join(marker.format(n) for n in ("goals", "graph", "sustained")))
    return tmp_path


def test_texts_and_figures_are_regenerated_from_the_newest_run(repository):
    pytest.importorskip("matplotlib")
    update = load_script("benchmarks/update_readme.py")
    arguments = ["--root", str(repository)]
    run = make_run(FACTORS)
    run.measurements = [m for m in run.measurements if m.num_tokens in (1, 16, 64) and m.label == "4096x4096"]
    (repository / "benchmarks/results/hopper.json").write_text(run.to_json())
    run.environment = {**run.environment, "created": "2025-01-01", "gpu": {"name": "an old GPU"}}
    (repository / "benchmarks/results/hopper_old.json").write_text(run.to_json())

    assert update.main([*arguments, "--check"]) == 1
    assert "old" in (repository / "README.md").read_text()
    assert update.main(arguments) == 0
    readme = (repository / "README.md").read_text()
    assert readme.startswith("# A\nbefore\n") and readme.endswith("after\n")
    assert "a made-up GPU" in readme and "commit abcdef1234" in readme
    row = next(line for line in readme.splitlines() if line.startswith("| 4096x4096 | 16 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:7] == ["1.25", "-", "2.50"]  # Humming and fp16 at 1.5 and 3.0 against our 1.2; no fp8 in this run
    assert "| 4096x4096 | 1 |" in (repository / "docs/benchmark.md").read_text()
    assert (repository / "benchmarks/plots/readme_latency.png").exists()
    assert update.main([*arguments, "--check"]) == 0


def test_the_served_table_is_without_the_kernels_between():
    update = load_script("benchmarks/update_readme.py")
    assert update.served_table(make_run(FACTORS)) == "Not measured yet."
    times = {("between", None): 5.0, (f"{OURS}:linear:served", -1): 25.0, (f"{OURS}:linear:served", 128): 27.25}
    times |= {("humming:linear:served", 128): 45.0, ("fp16:served", None): 105.0}
    run = Run(
        measurements=[
            Measurement("served", name, tokens, 45056, 4096, mode, "llama", median_us=us + (tokens if mode else 0))
            for tokens in (1, 16)
            for (name, mode), us in times.items()
        ]
    )
    assert update.served_table(run).splitlines() == [
        "| M | per-channel | group 128 | Humming group 128 | fp16 |",
        "|--:|--:|--:|--:|--:|",
        "| 1 | 21.0 | 23.2 | 41.0 | 100.0 |",
        "| 16 | 36.0 | 38.2 | 56.0 | 100.0 |",
    ]


def test_without_results_the_texts_say_not_measured(repository):
    update = load_script("benchmarks/update_readme.py")
    assert update.main(["--root", str(repository)]) == 0
    assert (repository / "docs/benchmark.md").read_text().count("Not measured yet.") == 3


def test_a_missing_marker_is_an_error_that_names_it(repository):
    update = load_script("benchmarks/update_readme.py")
    (repository / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md must hold the markers <!-- benchmark:headline:begin -->"):
        update.main(["--root", str(repository)])


def test_the_repositorys_texts_are_what_its_saved_runs_give():
    assert load_script("benchmarks/update_readme.py").main(["--check"]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_saved_results_can_be_read_and_hold_nothing_wrong(path):
    run = load_run(path)
    assert run.measurements and run.num_wrong == 0
    assert run.environment["command"] and "commit" in run.environment


def test_the_documented_command_makes_the_saved_run():
    """docs/benchmark.md names it without options: the defaults are what the saved run was made with."""
    document = (ROOT / "docs" / "benchmark.md").read_text()
    (documented,) = re.findall(r"^    python benchmarks/run_hopper\.py (.*?) +#", document, re.MULTILINE)
    saved = load_run(ROOT / "benchmarks" / "results" / "hopper.json")
    run_hopper = load_script("benchmarks/run_hopper.py")
    by_document, by_run = (
        vars(run_hopper.parse_arguments(shlex.split(words)))
        for words in (documented, saved.environment["command"].partition(" ")[2])
    )
    assert ROOT / by_document.pop("json") == ROOT / "benchmarks" / "results" / by_run.pop("json")
    assert by_document == by_run
    assert saved.settings["replays"] == by_document["replays"]
    gemm = {m.num_tokens for m in saved.measurements if (m.operation, m.method) == ("gemm", "graph")}
    assert gemm == set(parse_integers(by_document["num_tokens"]))
