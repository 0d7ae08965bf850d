"""`marlin-qqq bench` from end to end on the CPU, and the GPU runner's logic with graphs that are plain calls."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from recording import RecordedCalls
from repository import load_script
from rich.console import Console
from typer.testing import CliRunner

import marlin_qqq
from marlin_qqq.bench import runner as runner_module
from marlin_qqq.bench import timing
from marlin_qqq.bench.implementations import gemm_implementations, parse_baselines
from marlin_qqq.bench.implementations.base import Context, Implementation, Unavailable
from marlin_qqq.bench.implementations.layers import (
    DecoderLayer,
    MarlinLinear,
    decoder_layer_implementations,
    linear_implementations,
)
from marlin_qqq.bench.implementations.marlin import MarlinGemm, _plan_of, overridden_environment, parse_variant
from marlin_qqq.bench.implementations.served import KernelBetween, Served
from marlin_qqq.bench.implementations.torch_baselines import ChainedRead, PlainRead
from marlin_qqq.bench.inputs import make_activations
from marlin_qqq.bench.output import show
from marlin_qqq.bench.presets import Layer, parse_shape
from marlin_qqq.bench.problem import Ceilings, GemmProblem
from marlin_qqq.bench.results import OURS, Run, load_run
from marlin_qqq.bench.runner import Runner, Settings
from marlin_qqq.cli.bench import app

QUICK = ["--device", "cpu", "--seconds", "0.002"]
TINY = ["--shape", "128x256", *QUICK]


def bench(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_gemm_writes_a_table_json_and_csv(tmp_path: Path):
    json_path, csv_path = tmp_path / "run.json", tmp_path / "run.csv"
    output = bench("gemm", *TINY, "-m", "1,17", "--json", str(json_path), "--csv", str(csv_path)).output
    for column in ("N x K", "us", "p10-p90", "TOPS", "GB/s", "x fp32", "x int_mm"):
        assert column in output
    assert "Results equal the float64 formula, every value." in output
    run = load_run(json_path)
    ours = run.find(implementation="marlin_qqq")
    assert sorted((m.num_tokens, m.group_size) for m in ours) == [(1, -1), (1, 128), (17, -1), (17, 128)]
    assert all(m.median_us and m.p10_us <= m.median_us <= m.p90_us and m.method == "wall" for m in ours)
    assert all(m.check.startswith("exact") for m in ours)
    assert run.environment["command"] and run.environment["torch"] == torch.__version__
    assert {"commit", "host", "python", "marlin_qqq"} <= run.environment.keys()
    with csv_path.open() as file:
        assert len(list(csv.DictReader(file))) == len(run.measurements)


def test_a_model_preset_names_its_layers():
    output = bench(
        "gemm", "--model", "llama-3.1-8b", "--tp", "16", "-m", "1", "--baselines", "none", "-g", "-1", *QUICK
    )
    for name in ("qkv", "gate_up", "down"):
        assert name in output.output


def test_a_wrong_result_prints_wrong_and_no_speed_and_exits_with_one(tmp_path, monkeypatch):
    honest = MarlinGemm.bind

    def lying(self, problem, activations, context):
        bound = honest(self, problem, activations, context)
        launch = bound.launch
        bound.launch = lambda index: launch(index) + (1 if self.group_size == 128 else 0)
        return bound

    monkeypatch.setattr(MarlinGemm, "bind", lying)
    path = tmp_path / "run.json"
    output = bench("gemm", *TINY, "-m", "3", "--baselines", "none", "--json", str(path), code=1).output
    assert "WRONG" in output
    by_mode = {m.group_size: m for m in load_run(path).measurements}
    assert by_mode[128].wrong and by_mode[128].median_us is None
    assert not by_mode[-1].wrong and by_mode[-1].median_us


def test_quantize_linear_layer_and_sweep_run_on_the_cpu(tmp_path):
    bench("quantize", "-k", "128,256", "-m", "1,3", *QUICK)
    path = tmp_path / "linear.json"
    bench("linear", *TINY, "-m", "2", "--bias", "--json", str(path))
    linear = load_run(path)
    assert {m.implementation for m in linear.measurements} == {"marlin_qqq:linear", "marlin_qqq:constant", "fp32"}
    assert all(m.check.startswith(("exact", "close")) for m in linear.measurements)
    served = bench("linear", *TINY, "-m", "2", "-g", "128", "--served").output
    assert "between" in served and "served" in served
    assert "4 linears" in bench("layer", "--model", "llama-3.1-8b", "--tp", "16", "-m", "1", "-g", "128", *QUICK).output
    assert "cliffs: steps beyond the work added" in bench("sweep", *TINY, "-m", "1:4", "-g", "128").output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
@pytest.mark.parametrize(
    "arguments", [["gemm", "--device", "cuda"], ["tune", "--device", "cuda:0", "--shape", "64x128"]]
)
def test_without_a_gpu_the_message_says_so(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "no GPU here" in str(result.exception)
    assert "--device cpu" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gemm", "--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["gemm", *QUICK, "--model", "nope"], "unknown model 'nope'"),
        (["gemm", *QUICK, "--shape", "100x128"], "multiple of 64"),
        (["gemm", *TINY, "-g", "64"], "--group-size '64' is not allowed"),
        (["gemm", *TINY, "-m", "0"], "at least one token"),
        (["gemm", *TINY, "--dtype", "float32"], "float16 or bfloat16"),
        (["gemm", *TINY, "--baselines", "cutlass"], "unknown baseline 'cutlass'"),
        (["gemm", *TINY, "--method", "vibes"], "--method 'vibes'"),
        (["quantize", *QUICK, "--baselines", "copy"], "unknown baseline 'copy'"),
        (["tune", "--device", "cpu", "--shape", "64x128"], "needs a GPU"),
        (["quantize", *QUICK, "-k", "0"], "--in-features '0': every row must have at least one element"),
        (["gemm", *QUICK, "--shape", ","], "--shape ',' holds no shape"),
        (["gemm", *TINY, "--seconds", "-1"], "--seconds -1.0 is not allowed"),
        (["gemm", *TINY, "--seconds", "nan"], "--seconds nan is not allowed"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_compare_shows_regressions_and_can_fail(tmp_path):
    path = tmp_path / "before.json"
    bench("gemm", *TINY, "-m", "1", "--baselines", "none", "--json", str(path))
    document = json.loads(path.read_text())
    for row in document["measurements"]:
        for name in ("median_us", "p10_us", "p90_us"):
            row[name] *= 100.0
    slower = tmp_path / "after.json"
    slower.write_text(json.dumps(document))
    assert "2 slower, 0 faster" in bench("compare", str(path), str(slower)).output
    bench("compare", str(path), str(slower), "--fail", code=1)
    assert "0 slower, 2 faster" in bench("compare", str(slower), str(path), "--fail").output
    assert "0 slower, 0 faster, 2 the same" in " ".join(bench("compare", str(path), str(path)).output.split())


def test_compare_shows_wrong_results_also_where_all_are(tmp_path):
    path, wrong = tmp_path / "before.json", tmp_path / "after.json"
    bench("gemm", *TINY, "-m", "1", "--baselines", "none", "--json", str(path))
    document = json.loads(path.read_text())
    for row in document["measurements"]:
        row |= {"median_us": None, "check": "WRONG: 3 of 128 values"}
    wrong.write_text(json.dumps(document))
    output = bench("compare", str(path), str(wrong), code=1).output
    assert output.count("WRONG: 3 of 128 values") == 2


def test_compare_relative_to_what_nobody_measured(tmp_path):
    path = tmp_path / "run.json"
    bench("gemm", *TINY, "-m", "1", "--baselines", "none", "--json", str(path))
    result = CliRunner().invoke(app, ["compare", str(path), str(path), "--relative-to", "nope"])
    assert f"--relative-to is 'nope'; measured in {path}: marlin_qqq" in str(result.exception)


def test_brackets_are_no_markup(tmp_path):
    """Of a file's name, a GPU, a version, a check's text, an implementation, a note."""
    path = tmp_path / "b" / "a[/b].json"
    output = bench("gemm", *TINY, "-m", "1", "--baselines", "none", "--json", str(path)).output
    assert f"wrote {path}" in output
    document = json.loads(path.read_text())
    document["environment"] |= {"gpu": {"name": "[/x] GPU"}, "torch": "[/y]"}
    document["measurements"][0] |= {"median_us": None, "check": "WRONG [/z]"}
    document["notes"] = ["[bold]a note[/c]"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    output = bench("compare", str(path), str(other), code=1).output
    for text in ("[/x] GPU", "[/y]", "WRONG [/z]"):
        assert text in output
    shown = io.StringIO()
    show(load_run(other), Console(width=200, file=shown, markup=False))
    assert "[bold]a note[/c]" in shown.getvalue() and "[/x] GPU" in shown.getvalue()


def interrupted_bench(tmp_path, monkeypatch, interrupt):
    """A run of two batch sizes that is interrupted before the second one; its exit and what it saved."""
    honest = Runner._cell

    def cell(self, operation, problem, *rest):
        if problem.num_tokens == 17:
            interrupt()
        honest(self, operation, problem, *rest)

    monkeypatch.setattr(Runner, "_cell", cell)
    path = tmp_path / "run.json"
    result = CliRunner().invoke(app, ["gemm", *TINY, "-m", "1,17", "--baselines", "none", "--json", str(path)])
    return result, load_run(path)


def test_an_interrupted_run_is_saved(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    result, run = interrupted_bench(tmp_path, monkeypatch, interrupt)
    assert result.exit_code == 130
    assert {m.num_tokens for m in run.measurements} == {1}
    assert run.notes == ["Not complete (interrupted)."] and run.notes[0] in result.output


def test_a_terminated_run_is_saved(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    result, run = interrupted_bench(tmp_path, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert result.exit_code == 143 and {m.num_tokens for m in run.measurements} == {1}
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_measured_before_an_error_is_saved(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    result, run = interrupted_bench(tmp_path, monkeypatch, fail)
    assert isinstance(result.exception, RuntimeError) and {m.num_tokens for m in run.measurements} == {1}
    assert run.notes == ["Not complete (RuntimeError: out of memory)."]


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_outputs_are_tried_before_anything_is_measured(tmp_path, monkeypatch, option):
    monkeypatch.setattr(Runner, "__init__", lambda *_: pytest.fail("measuring began"))
    (tmp_path / "file").write_text("")
    for path in ["/proc/x.csv", str(tmp_path if option != "--plot" else tmp_path / "file")]:
        result = CliRunner().invoke(app, ["gemm", *TINY, "-m", "1", option, path])
        assert isinstance(result.exception, OSError), result.exception


def test_nothing_to_plot_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    arguments = ["gemm", *TINY, "-m", "1", "--baselines", "none", "--json", str(path), "--plot", str(tmp_path)]
    assert "nothing to plot" in bench(*arguments).output
    result = CliRunner().invoke(app, ["plot", str(path), str(tmp_path)])
    assert f"{path} holds nothing to plot" in str(result.exception)


def test_models_lists_every_preset():
    assert "llama-3.1-405b" in bench("models").output


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_cuts_no_shape(tmp_path, monkeypatch, width):
    document = json.loads(Run().to_json())
    fields = {"operation": "gemm", "implementation": "marlin_qqq", "group_size": 128, "method": "sustained"}
    sizes = {"num_tokens": 4096, "out_features": 106496, "in_features": 16384}
    for name, time in (("before", 10_000.0), ("after", 20_000.0)):
        document["measurements"] = [fields | sizes | {"median_us": time}]
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    narrow = Console(width=width, markup=False, record=True, file=io.StringIO())
    monkeypatch.setattr("marlin_qqq.bench.output.make_console", lambda: narrow)
    bench("compare", str(tmp_path / "before.json"), str(tmp_path / "after.json"))
    text = narrow.export_text()
    if width == 80:
        assert "106496x16384" in text and "2.000" in text and "…" not in text
        assert "Left out, for the terminal is narrow: method" in text
    bench("models")
    assert "…" not in narrow.export_text()


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(tmp_path):
    path = tmp_path / "run.json"
    bench("gemm", *TINY, "-m", "1", "--json", str(path))
    for width, is_whole in ((70, False), (200, True)):
        console = Console(width=width, record=True, file=io.StringIO())
        show(load_run(path), console)
        text = console.export_text()
        assert ("Left out, for the terminal is narrow: p10-p90" in text) != is_whole
        assert ("p10-p90" in text.splitlines()[2]) == is_whole
        assert "exact" in text and "…" not in text


def test_the_module_can_be_run():
    output = subprocess.run(
        [sys.executable, "-m", "marlin_qqq.bench", "compare", "no.json", "no.json"], capture_output=True, text=True
    )
    assert output.returncode == 1
    assert output.stderr.startswith("marlin-qqq bench: no.json cannot be read")


# Variants of our op


def test_variants():
    assert parse_variant("constant+standalone").environment == {"MARLIN_QQQ_STANDALONE": "1"}
    variant = parse_variant("constant+sm80+tile:64x128+split:4")
    assert variant.constant_weights
    assert variant.environment == {"MARLIN_QQQ_FAMILY": "sm80", "MARLIN_QQQ_TILE": "64x128", "MARLIN_QQQ_SPLIT": "4"}
    assert parse_variant("bias+bf16").output_dtype == "bfloat16"
    for text in ("fast", "tile:", "split:x", "constant:1", ""):
        with pytest.raises(ValueError, match="unknown variant"):
            parse_variant(text)


def calls_of_op(implementation: MarlinGemm, name: str) -> list[dict]:
    """What a launch of a bound implementation calls the op with."""
    problem = GemmProblem(3, 64, 128)
    context = Context("cpu", torch.float16, l2_bytes=0)
    implementation.load(problem, context)
    bound = implementation.bind(problem, make_activations(3, 128, torch.float16, "cpu", context.generator), context)
    with RecordedCalls() as recorded:
        bound.launch(1)
    return recorded.of(name)


def test_variants_reach_the_op():
    (default,) = calls_of_op(MarlinGemm("default", 128), "marlin_qqq_gemm")
    assert (default["constant_weights"], default["bias"], default["out_dtype"]) == (False, None, torch.float16)
    (constant,) = calls_of_op(MarlinGemm("constant+bias+bf16", 128), "marlin_qqq_gemm")
    assert (constant["constant_weights"], constant["out_dtype"]) == (True, torch.bfloat16)
    assert (constant["bias"].dtype, constant["bias"].shape) == (torch.bfloat16, (64,))
    (linear,) = calls_of_op(MarlinLinear(128), "marlin_qqq_linear")
    assert linear["constant_weights"] is True


@pytest.mark.parametrize(("variant", "constant_weights"), [("default", False), ("constant", True)])
def test_the_plan_that_is_saved_is_the_launchs(monkeypatch, variant, constant_weights):
    """With constant weights the planner may choose another tile."""
    asked = []

    def plan(*sizes, **options):
        asked.append((sizes, options))
        return "a plan"

    monkeypatch.setattr(marlin_qqq, "plan", plan)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    context = SimpleNamespace(device="cuda:0")
    assert _plan_of(GemmProblem(3, 64, 128, -1), parse_variant(variant), context) == {"plan": "a plan"}
    assert asked == [((3, 64, 128, -1, "sm_90"), {"constant_weights": constant_weights})]


@pytest.mark.parametrize("group_size", [-1, 128])
def test_a_linear_layer_is_checked_to_the_bit(group_size):
    problem = GemmProblem(3, 64, 256)
    context = Context("cpu", torch.float16, l2_bytes=0)
    activations = make_activations(3, 256, torch.float16, "cpu", context.generator)
    bound = MarlinLinear(group_size).bind(problem, activations, context)
    output = bound.launch(0)
    assert bound.check(output).startswith("exact (")
    output.view(torch.int16)[2, 63] ^= 1
    assert bound.check(output).startswith("WRONG: 1 of 192 values differ")


def test_every_linear_of_a_decoder_layer_is_checked():
    layers = [Layer("a", 64, 128), Layer("b", 128, 256), Layer("c", 64, 128)]
    context = Context("cpu", torch.float16, l2_bytes=0)
    activations = make_activations(3, 128, torch.float16, "cpu", context.generator)
    layer = DecoderLayer(layers, partial(MarlinLinear, 128))
    bound = layer.bind(GemmProblem(3, 64, 128), activations, context)
    for spoiled in range(3):
        outputs = bound.launch(0)
        assert [tuple(output.shape) for output in outputs] == [(3, 64), (3, 128), (3, 64)]
        assert bound.check(outputs).startswith("exact (")
        outputs[spoiled].view(torch.int16)[0, 0] ^= 1
        assert bound.check(outputs).startswith("WRONG: 1 of ")


def test_a_served_layer_comes_behind_a_kernel_that_writes_its_activations():
    problem = GemmProblem(3, 64, 256)
    context = Context("cpu", torch.float16, l2_bytes=0)
    activations = make_activations(3, 256, torch.float16, "cpu", context.generator)
    before = activations.x[0].clone()
    writes = []

    class Observed(MarlinLinear):
        def bind(self, problem, activations, context):
            bound = super().bind(problem, activations, context)
            first_version = activations.x[0]._version

            def launch(index):
                writes.append(activations.x[0]._version - first_version)
                return bound.launch(index)

            return dataclasses.replace(bound, launch=launch)

    bound = Served(Observed(128)).bind(problem, activations, context)
    assert bound.check(bound.launch(0)).startswith("exact (")
    bound.launch(activations.copies)
    assert writes == [1, 2], "a write before every launch"
    between = KernelBetween().bind(problem, activations, context)
    assert between.check(between.launch(0)) == "exact (values as before)"
    assert torch.equal(activations.x[0], before)
    assert between.check(before + 1).startswith("WRONG")


def test_served_layers_have_the_kernels_own_time_beside_them():
    names = [implementation.name for implementation in linear_implementations(["fp32"], [-1, 128], served=True)]
    assert names == ["between", *[f"{OURS}:linear:served"] * 2, "fp32:served"]
    layers = [Layer("a", 64, 128), Layer("b", 128, 256)]
    whole = decoder_layer_implementations(layers, ["fp32"], [128], served=True)
    assert [implementation.name for implementation in whole] == ["between", f"{OURS}:linear:served", "fp32:served"]
    context = Context("cpu", torch.float16, l2_bytes=0)
    activations = make_activations(3, 128, torch.float16, "cpu", context.generator)
    problem = GemmProblem(3, 64, 128)
    for implementation in whole:
        implementation.load(problem, context)
        bound = implementation.bind(problem, activations, context)
        assert not bound.check(bound.launch(0)).startswith("WRONG")


def test_overridden_environment_is_put_back(monkeypatch):
    import os

    monkeypatch.setenv("MARLIN_QQQ_TILE", "before")
    monkeypatch.delenv("MARLIN_QQQ_SPLIT", raising=False)
    with pytest.raises(RuntimeError), overridden_environment({"MARLIN_QQQ_TILE": "x", "MARLIN_QQQ_SPLIT": "2"}):
        assert (os.environ["MARLIN_QQQ_TILE"], os.environ["MARLIN_QQQ_SPLIT"]) == ("x", "2")
        raise RuntimeError
    assert os.environ["MARLIN_QQQ_TILE"] == "before"
    assert "MARLIN_QQQ_SPLIT" not in os.environ


# The GPU path of the runner, with graphs that are plain calls


class CallsInPlaceOfGraph:
    def __init__(self, launch, launches):
        self.launches = launches
        outputs = [launch(index) for index in range(launches)]
        self.first_output, self.last_output = outputs[0], outputs[-1]


@pytest.fixture
def gpu_like(monkeypatch):
    """Runs the GPU's branch of the runner on CPU tensors."""
    sample = timing.Sample(2.0, 1.9, 2.1, 5, 10, sm_clock_mhz=1500.0)
    monkeypatch.setattr(timing, "CapturedLaunches", CallsInPlaceOfGraph)
    monkeypatch.setattr(timing, "time_graphs", lambda graphs, replays: dict.fromkeys(graphs, sample))
    monkeypatch.setattr(timing, "time_graphs_sustained", lambda graphs, *_: dict.fromkeys(graphs, sample))
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        runner_module.ceilings_module, "measure_ceilings", lambda device: (Ceilings(4600.0, "x", 1910.0, "y"), {})
    )

    def make(**settings) -> Runner:
        return Runner(Settings(device="cpu", **settings))

    return make


TINY_LAYER = Layer("tiny", 64, 128)


def measure(runner: Runner, *implementations: Implementation) -> Run:
    runner.products([TINY_LAYER], [3], implementations)
    return runner.run


def test_gpu_rows_have_floors_and_both_methods(gpu_like):
    run = measure(gpu_like(methods=("graph", "sustained")), MarlinGemm("default", 128), MarlinGemm("constant", 128))
    assert [(m.implementation, m.method) for m in run.measurements] == [
        ("marlin_qqq", "graph"),
        ("marlin_qqq:constant", "graph"),
        ("marlin_qqq", "sustained"),
        ("marlin_qqq:constant", "sustained"),
    ]
    assert all(m.median_us == 2.0 and m.floor_us and m.percent_of_floor for m in run.measurements)


class Spoiled(MarlinGemm):
    """Right when first called, then wrong: as a race that only the timed state shows."""

    def __init__(self, good_calls: int, group_size: int = 128) -> None:
        super().__init__("default", group_size)
        self.good_calls = good_calls

    def bind(self, problem, activations, context):
        bound = super().bind(problem, activations, context)
        launch, calls = bound.launch, iter(range(10**9))
        bound.launch = lambda index: launch(index) + (0 if next(calls) < self.good_calls else 1)
        return bound


@pytest.mark.parametrize("good_calls", [0, 1, 5])
def test_a_result_that_is_wrong_in_the_graph_has_no_speed(gpu_like, good_calls):
    run = measure(gpu_like(methods=("graph", "sustained")), Spoiled(good_calls), MarlinGemm("default", -1))
    for measurement in run.measurements:
        assert measurement.wrong == (measurement.group_size == 128)
        assert (measurement.median_us is None) == measurement.wrong
    assert run.num_wrong >= 1


class SpoiledOnce(MarlinGemm):
    """Wrong in one launch of the graph alone, and right when that launch is made again outside it."""

    def __init__(self, spoiled: int) -> None:
        super().__init__("default", 128)
        self.spoiled = spoiled

    def bind(self, problem, activations, context):
        bound = super().bind(problem, activations, context)
        launch, left = bound.launch, [self.spoiled]

        def spoil(index):
            output = launch(index)
            if index in left:
                left.remove(index)
                output.view(torch.int16)[0, 0] ^= 1
            return output

        bound.launch = spoil
        return bound


def test_a_result_that_is_wrong_in_the_graphs_last_launch_has_no_speed(gpu_like, monkeypatch):
    monkeypatch.setattr(timing, "num_launches", lambda copies, expected_us: 12)
    (measurement,) = measure(gpu_like(), SpoiledOnce(11)).measurements
    assert measurement.check == (
        "WRONG: launch 11 of the graph differs from the same call outside it (after the timed replays)"
    )
    assert measurement.median_us is None


class Broken(MarlinGemm):
    def bind(self, problem, activations, context):
        raise RuntimeError("CUDA error: launch failure\nmore lines")


class Missing(Implementation):
    name = "peer"

    def load(self, problem, context):
        raise Unavailable("it is not installed")

    def bind(self, problem, activations, context):
        raise AssertionError("never bound")


def test_failures_and_missing_peers_leave_the_others_alone(gpu_like):
    run = measure(gpu_like(), Broken("default", -1), Missing(), MarlinGemm("default", 128))
    broken, missing, good = run.measurements
    assert broken.check == "WRONG: failed, RuntimeError: CUDA error: launch failure"
    assert missing.unavailable == "it is not installed" and not missing.wrong
    assert good.median_us == 2.0


def test_out_of_time_is_noted(gpu_like):
    runner = gpu_like()
    runner.products(
        [TINY_LAYER], [1, 2], [MarlinGemm("default", 128)], should_stop=lambda: bool(runner.run.measurements)
    )
    assert [m.num_tokens for m in runner.run.measurements] == [1]
    assert runner.run.notes == ["not run: gemm 64x128 M=2, out of time"]


@pytest.mark.parametrize("baseline", [PlainRead, ChainedRead])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_read_baselines_read_what_the_product_reads_of_weights(monkeypatch, baseline, group_size):
    monkeypatch.setattr(runner_module.ceilings_module, "fastest_read_kernel", lambda sources, device: ((0, 0, 0), None))
    problem = GemmProblem(1, 192, 256, group_size)
    context = Context("cpu", torch.float16, 1 << 10)
    read = baseline(group_size)
    read.load(problem, context)
    weights = context.packed_weights(problem)
    assert len(read.sources) == len(weights.packed) > 1
    expected = weights.packed[0].nbytes + (weights.group_scale[0].nbytes if group_size > 0 else 0)
    assert {source.nbytes for source in read.sources} == {expected}
    assert expected == 192 * 256 // 2 + (2 * 192 * 2 if group_size > 0 else 0)


def test_default_baselines_of_a_gpu_say_why_they_are_missing_here():
    assert parse_baselines("auto", "cuda:0") == ("read", "fp16", "int_mm", "fp8", "humming", "vllm")
    names = {i.name for i in gemm_implementations(["default"], parse_baselines("auto", "cuda:0"), [-1, 128])}
    assert {"marlin_qqq", "read", "humming", "vllm_qqq", "vllm_w8a8"} <= names


def test_peers_that_cannot_run_give_their_reason():
    from marlin_qqq.bench.implementations import humming, vllm
    from marlin_qqq.bench.implementations.base import Context

    context = Context("cpu", torch.float16, l2_bytes=0)
    reads = (PlainRead(128), ChainedRead(128))
    for peer in (humming.HummingGemm(128), vllm.VllmQQQ(128), vllm.VllmScaledMm(), *reads):
        with pytest.raises(Unavailable, match="CUDA device"):
            peer.available(context)
    assert humming.compile_ahead([(64, 128)], [128], context) == "Humming needs a CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 17, 64])
def test_the_chained_read_reads_all_and_writes_all(num_tokens):
    from marlin_qqq.bench.triton_kernels import CHAINED_READ_VARIANTS, launch_chained_read

    def xor_of(values):
        return int(numpy.bitwise_xor.reduce(values.cpu().numpy(), axis=None))

    weights = torch.randint(-(2**31), 2**31, (3 * 8192 + 64,), dtype=torch.int32, device="cuda")
    rows = torch.randint(-(2**31), 2**31, (num_tokens, 600), dtype=torch.int32, device="cuda")
    for chunk, num_warps in CHAINED_READ_VARIANTS:
        output = torch.zeros(1000, dtype=torch.int32, device="cuda")
        launch_chained_read(weights, rows, output, (chunk, num_warps))
        part = chunk // 32
        blocks = -(-weights.numel() // chunk)
        share = -(-output.numel() // blocks)
        for block in range(blocks):
            column = block % -(-rows.shape[1] // part) * part
            expected = xor_of(weights[block * chunk :][:chunk]) ^ xor_of(rows[:, column:][:, :part])
            assert set(output[block * share :][:share].tolist()) == {expected}


@pytest.mark.gpu
def test_gemm_on_the_gpu(tmp_path):
    path = tmp_path / "run.json"
    bench("gemm", "--device", "cuda", "--shape", "1024x1024", "-m", "1,33", "--replays", "5", "--json", str(path))
    run = load_run(path)
    ours = [m for m in run.measurements if m.implementation.startswith("marlin_qqq")]
    assert len(ours) == 8
    assert all(m.median_us and m.floor_us and m.check.startswith("exact (cpu op") for m in ours)
    assert run.find(implementation="fp16")[0].median_us
    assert run.ceilings["read_gbps"] > 100


@pytest.mark.gpu
def test_linear_has_the_chain_with_and_without_a_quantisation():
    settings = Settings(device="cuda:0", replays=3)
    runner = Runner(settings)
    layers = linear_implementations(["chain"], [128])
    runner.products([parse_shape("256x512")], [4], layers, operation="linear")
    times = {m.implementation: m.median_us for m in runner.run.measurements}
    assert list(times) == ["marlin_qqq:linear", "marlin_qqq:constant", "chain:linear", "chain"]
    assert times["chain:linear"] > times["chain"] > 0


@pytest.mark.gpu
def test_a_sweep_of_the_planner_times_a_row_of_launches_too(tmp_path):
    tune_planner = load_script("benchmarks/tune_planner.py")
    path = tmp_path / "sweep.json"
    command = ["measure", "--json", str(path), "--shapes", "4096x4096", "--num-tokens", "4096", "--group-size", "-1"]
    assert tune_planner.main([*command, "--sustained", "--standalone"]) == 2
    assert tune_planner.main([*command, "--candidates", "2", "--replays", "2", "--sustained"]) == 0
    run = load_run(path)
    rows = {m: [row for row in run.measurements if row.method == m] for m in ("graph", "sustained")}
    names = {row.implementation for row in run.measurements}
    assert len(names) >= 4
    assert sum(name.endswith("/2") for name in names) >= 3  # deep, wide, pingpong: two blocks that share activations
    assert all(len(rows[method]) == len(names) for method in rows)
    assert all(row.extra["plan"] and row.median_us for row in run.measurements)
