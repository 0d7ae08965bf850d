"""benchmarks/tune_planner.py: which candidates are measured, the sweep's file, the fit, the rewritten header."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
from repository import ROOT, load_script

import marlin_qqq
from marlin_qqq.bench import tune
from marlin_qqq.bench.presets import Layer
from marlin_qqq.bench.results import Measurement, Run, load_run
from marlin_qqq.bench.runner import Settings

introspection = pytest.importorskip("marlin_qqq._introspection", reason="built without Python.h")

HEADER = ROOT / "csrc" / "plan" / "sm90_model.h"
DEVICE = introspection.reference_device("sm_90")


planner_fit = load_script("benchmarks/planner_fit.py")
tune_planner = load_script("benchmarks/tune_planner.py")


def listed(
    num_tokens: int,
    out_features: int,
    in_features: int,
    group_size: int,
    device: str = "sm_90",
    constant_weights: bool = True,
):
    """What the op's library answers on a GPU like the reference device."""
    with pytest.raises(ValueError) as answer:
        marlin_qqq.plan(
            num_tokens, out_features, in_features, group_size, constant_weights=constant_weights, tile="list"
        )
    return tune.parse_candidate_list(str(answer.value))


def timed_problem(truth: dict[str, float], *sizes: int):
    """A problem whose candidates take the times of the model ``truth``."""
    chosen = tune_planner.choose_candidates(listed(*sizes)[1], sizes[0], 8)
    estimator = introspection.Sm90Estimator()
    names = [candidate.name for candidate in chosen]
    plans = estimator.add(*sizes, DEVICE, names)
    return planner_fit.Problem(sizes, DEVICE, names, plans, estimator.estimate(truth))


# The planner's answers


def test_the_list_is_the_planners():
    device, candidates = listed(16, 4096, 14336, 128)
    plans = marlin_qqq.candidates(16, 4096, 14336, 128, constant_weights=True)
    assert str(introspection.DeviceProperties(**device)) == str(DEVICE)
    assert [candidate.text for candidate in candidates] == [str(plan) for plan in plans]
    assert [candidate.name for candidate in candidates] == [plan.name for plan in plans]
    assert all(c.tile_name == plan.tile_name for c, plan in zip(candidates, plans, strict=True))
    assert all(c.tile_tokens == plan.tile_tokens for c, plan in zip(candidates, plans, strict=True))


def test_another_answer_is_quoted():
    with pytest.raises(ValueError, match="no device: 'CUDA error"):
        tune.parse_candidate_list("CUDA error: no kernel image")


def test_the_estimator_agrees_with_the_planner():
    plans = marlin_qqq.candidates(300, 8192, 21760, -1, constant_weights=True)
    estimator = introspection.Sm90Estimator()
    texts = estimator.add(300, 8192, 21760, -1, DEVICE, [*(plan.name for plan in plans), "no_such_tile/1x1/1"])
    assert texts == [*map(str, plans), ""]
    assert estimator.estimate({}) == [plan.estimated_us for plan in plans]
    faster = estimator.estimate({"launch_cycles": 1.0})
    assert all(new < plan.estimated_us for new, plan in zip(faster, plans, strict=True))
    with pytest.raises(ValueError, match="sm90_model"):
        estimator.estimate({"no_such_constant": 1.0})


# What is measured


@pytest.mark.parametrize("num_tokens", [1, 16, 48, 64, 100, 257, 4096])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_best_are_measured_and_every_family_that_suits(num_tokens, group_size):
    _, candidates = listed(num_tokens, 8192, 21760, group_size)
    chosen = tune_planner.choose_candidates(candidates, num_tokens, 8)
    assert chosen[0] == candidates[0]
    assert len(chosen) == len(set(chosen)) >= 8
    tiles = [candidate.tile_name for candidate in chosen[:8]]
    assert max(map(tiles.count, tiles)) <= tune_planner.MOST_OF_A_TILE
    suitable = [candidate for candidate in candidates if num_tokens <= 4 * candidate.tile_tokens]
    for family in {candidate.tile_name.rstrip("0123456789") for candidate in suitable}:
        assert any(candidate.tile_name.startswith(family) for candidate in chosen), family


def test_a_sweep_that_is_cut_short_covers_all_shapes():
    shapes = [Layer("a", 64, 128), Layer("b", 128, 128)]
    work = tune_planner.work_list(shapes, [1, 2, 3], [-1, 128])
    assert len(work) == len(set(work)) == 12
    assert {shape.name for shape, _, _ in work[:8]} == {"a", "b"}
    assert {tokens for _, _, tokens in work[:8]} == {1, 3}


def test_a_sweep_is_saved_continued_and_read_by_fit(tmp_path, monkeypatch):
    """On the CPU, whose op does not mind which tile is forced."""
    monkeypatch.setattr(tune_planner, "ask_candidates", listed)
    monkeypatch.setattr(tune_planner, "SECONDS_BETWEEN_SAVES", 0.0)
    path = tmp_path / "sweep.json"

    def sweep(constant_weights=True):
        runner = tune_planner.SweepRunner(Settings(device="cpu", cpu_seconds=1e-4))
        return tune_planner.Sweep(runner, path, constant_weights)

    shape = Layer("128x256", 128, 256)
    first = sweep()
    assert "own choice" in first.measure((shape, 128, 3), 4)
    run = load_run(path)
    assert all(m.check.startswith("exact (planner's own choice") and m.median_us for m in run.measurements)
    again = sweep()
    assert again.measure((shape, 128, 3), 4) == "measured before"
    again.measure((shape, -1, 3), 4)
    run = load_run(path)
    problems = planner_fit.problems_of(run, "sweep.json")
    assert [problem.sizes for problem in problems] == [(3, 128, 256, 128), (3, 128, 256, -1)]
    objective = planner_fit.Objective(problems)
    assert (objective.num_gone, objective.num_changed) == (0, 0)
    assert objective.num_points == len(run.measurements)
    assert "own choice" in sweep(constant_weights=False).measure((shape, 128, 3), 4)
    assert sweep().measure((shape, 128, 3), 4) == "measured before"
    problems = planner_fit.problems_of(load_run(path), "sweep.json")
    assert [(problem.sizes[3], problem.constant_weights) for problem in problems] == [
        (128, True),
        (-1, True),
        (128, False),
    ]
    text = "\n".join(planner_fit.report(planner_fit.Objective(problems), *[introspection.sm90_model()] * 2))
    assert "1-16 raw" in text and "without promise" in problems[2].name


def test_a_sweep_is_not_continued_on_another_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_planner, "ask_candidates", listed)
    path, shape = tmp_path / "sweep.json", Layer("128x256", 128, 256)
    runner = tune_planner.SweepRunner(Settings(device="cpu", cpu_seconds=1e-4))
    first = tune_planner.Sweep(runner, path)
    first.measure((shape, 128, 3), 1)
    first.save()
    run = load_run(path)
    run.environment[planner_fit.PLANNER_DEVICE]["num_sms"] -= 18
    path.write_text(run.to_json())
    before = path.read_text()
    again = tune_planner.Sweep(tune_planner.SweepRunner(Settings(device="cpu", cpu_seconds=1e-4)), path)
    with pytest.raises(ValueError, match=r"sweep\.json was measured on another GPU than this one; give another --json"):
        again.measure((shape, -1, 3), 1)
    assert path.read_text() == before


def test_a_wrong_candidate_is_found_out():
    torch = pytest.importorskip("torch")
    choice = tune_planner.OwnChoice(torch.tensor([1.0, 2.0]))
    assert choice.compare(torch.tensor([1.0, 2.0])).startswith("exact")
    assert choice.compare(torch.tensor([1.0, 3.0])).startswith("WRONG: 1 values differ")


def test_measure_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setenv("MARLIN_QQQ_TILE", "deep256")
    assert tune_planner.main(["measure", "--device", "cpu"]) == 2
    assert "MARLIN_QQQ_TILE would decide" in capsys.readouterr().err
    monkeypatch.delenv("MARLIN_QQQ_TILE")
    assert tune_planner.main(["measure", "--device", "cpu"]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err


# The fit


def test_a_fit_finds_a_better_model():
    pytest.importorskip("scipy")
    start = introspection.sm90_model()
    random = numpy.random.default_rng(3)
    truth = {name: value * float(numpy.exp(random.normal(0, 0.4))) for name, value in start.items()}
    shapes = [(4096, 4096), (8192, 21760)]
    problems = [
        timed_problem(truth, m, *shape, mode) for m in (1, 32, 100, 256, 640) for shape in shapes for mode in (-1, 128)
    ]
    objective = planner_fit.Objective(problems)
    fitted = planner_fit.fit(objective, start, num_starts=2)
    assert objective.losses(start).mean() > 1.003, "the test's own model should be worth fitting"
    assert objective.losses(fitted).mean() - 1 < 0.5 * (objective.losses(start).mean() - 1)
    assert objective.time_error(fitted) < 0.5 * objective.time_error(start)
    assert len(planner_fit.report(objective, start, fitted)) == 9
    assert objective.losses(truth).max() == 1
    assert len(objective.unmeasured_choices(fitted)) <= len(problems)


def test_reference_shapes_weigh_three_times_and_every_regime_the_same():
    model = introspection.sm90_model()
    sizes = [
        (1, 4096, 4096, -1),
        (1, 6144, 4096, -1),
        (16, 6144, 4096, 128),
        (64, 6144, 4096, -1),
        (80, 4096, 4096, 128),
    ]
    objective = planner_fit.Objective([timed_problem(model, *problem) for problem in sizes])
    # M of 1 and 16 are one regime, 64 and 80 one each.
    assert objective.weights.tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5, 1, 1])
    losses = numpy.array([1.5, 1.0, 1.0, 1.0, 1.0])
    assert objective.weighted_mean(losses) == pytest.approx(1 + 0.5 * 3 / 5 / 3)


def test_first_choices_that_were_not_measured_are_named():
    model = introspection.sm90_model()
    measured, other = timed_problem(model, 16, 4096, 4096, -1), timed_problem(model, 64, 8192, 21760, 128)
    assert planner_fit.Objective([measured, other]).unmeasured_choices(model) == []
    best = other.names[0]
    for values in (other.names, other.plans, other.times):
        del values[0]
    assert planner_fit.Objective([measured, other]).unmeasured_choices(model) == [f"8192x21760 M=64 g128: {best}"]
    # A second sweep on the same GPU that has it is enough.
    second = timed_problem(model, 64, 8192, 21760, 128)
    assert planner_fit.Objective([measured, other, second]).unmeasured_choices(model) == []


def test_candidates_that_are_gone_or_changed_are_counted():
    problem = timed_problem(introspection.sm90_model(), 16, 4096, 4096, -1)
    problem.names[0] = "stream7/1x1/1"
    problem.plans[1] = problem.plans[1].replace("stages", "stages and a half")
    objective = planner_fit.Objective([problem])
    assert (objective.num_gone, objective.num_changed) == (1, 1)
    assert objective.num_points == len(problem.names) - 1
    problem.names[:] = ["stream7/1x1/1"] * len(problem.names)
    with pytest.raises(ValueError, match="nothing to fit"):
        planner_fit.Objective([problem])


# The header


def test_the_headers_values_are_the_built_ones():
    assert planner_fit.header_values(HEADER.read_text()) == introspection.sm90_model()


def test_a_rewritten_header_reads_back():
    text = HEADER.read_text()
    model = {name: float(f"{1.2345 * value:.4g}") for name, value in introspection.sm90_model().items()}
    written = planner_fit.rewritten_header(
        text, model, "NVIDIA H100 NVL: " + "many candidates, " * 10 + "mean loss 1.0%"
    )
    assert planner_fit.header_values(written) == model
    assert "// Fitted on NVIDIA H100 NVL: many" in written
    assert max(map(len, written.splitlines())) <= 120
    # And back: nothing but the values and that comment is touched, however long the comment was.
    comment = " ".join(planner_fit.PROVENANCE.findall(text)[0].replace("//", "").split())
    comment = comment.removeprefix("Fitted on ").removesuffix(".")
    assert planner_fit.rewritten_header(written, introspection.sm90_model(), comment) == text
    with pytest.raises(ValueError, match="differ in another, macs_per_cycle"):
        planner_fit.rewritten_header(text, {"another" if n == "macs_per_cycle" else n: v for n, v in model.items()}, "")
    with pytest.raises(ValueError, match="Fitted on"):
        planner_fit.rewritten_header(text.replace("// Fitted", "// Guessed"), model, "")


def test_the_fit_command_writes_the_header(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    truth = {**introspection.sm90_model(), "bandwidth_fraction": 0.5}
    run = Run(environment={"gpu": {"name": "NVIDIA H100 NVL"}, "planner_device": listed(1, 4096, 4096, -1)[0]})
    for num_tokens in (1, 64, 300):
        problem = timed_problem(truth, num_tokens, 4096, 4096, -1)
        for name, plan, us in zip(problem.names, problem.plans, problem.times, strict=True):
            row = Measurement("gemm", planner_fit.PREFIXES[True] + name, num_tokens, 4096, 4096, -1, median_us=us)
            run.measurements.append(dataclasses.replace(row, extra={"plan": plan}))
    sweep, header = tmp_path / "sweep.json", tmp_path / "sm90_model.h"
    sweep.write_text(run.to_json())
    header.write_text(HEADER.read_text())
    monkeypatch.setattr(tune_planner, "HEADER", header)
    assert tune_planner.main(["fit", str(sweep), "--starts", "1"]) == 0
    assert header.read_text() == HEADER.read_text()
    assert tune_planner.main(["fit", str(sweep), "--starts", "1", "--write"]) == 0
    output = capsys.readouterr().out
    for text in ("3 problems", "before: mean", "bandwidth_fraction", "not measured", "wrote sm90_model.h"):
        assert text in output
    assert "// Fitted on NVIDIA H100 NVL: 3 problems, " in header.read_text()
    assert planner_fit.header_values(header.read_text()) != introspection.sm90_model()
    assert tune_planner.main(["fit", str(sweep)]) == 2, "the header is no longer what is built"
    assert "build first" in capsys.readouterr().err
    (tmp_path / "other.json").write_text(Run().to_json())
    assert tune_planner.main(["fit", str(tmp_path / "other.json")]) == 2
