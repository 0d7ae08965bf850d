"""Figures of a made-up run: every file is there, legends touch no panel, axes have units."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

pytest.importorskip("matplotlib")

from marlin_qqq.bench import plots
from marlin_qqq.bench.presets import model_layers
from marlin_qqq.bench.problem import Ceilings, GemmProblem
from marlin_qqq.bench.results import Measurement, Run

TOKENS = (1, 16, 64, 256, 1024)
FACTORS = {
    ("marlin_qqq", -1): 1.1,
    ("marlin_qqq", 128): 1.15,
    ("marlin_qqq:constant", -1): 1.05,
    ("humming", -1): 1.4,
    ("humming", 128): 2.3,
    ("fp16", None): 3.0,
    ("read", -1): 0.9,
}


@pytest.fixture(scope="module")
def run() -> Run:
    ceilings = Ceilings(4600.0, "", 1910.0, "")
    measurements = []
    for layer in model_layers("llama-3.1-8b"):
        for tokens in TOKENS:
            for (implementation, group_size), factor in FACTORS.items():
                problem = GemmProblem(tokens, layer.out_features, layer.in_features, group_size or -1)
                floor = ceilings.floor_us(problem.bytes_moved, problem.operations)
                time = floor * factor + 1.0
                measurements.append(
                    Measurement(
                        "gemm", implementation, tokens, layer.out_features, layer.in_features, group_size, layer.name,
                        median_us=time, p10_us=0.98 * time, p90_us=1.03 * time, floor_us=floor,
                    )
                )  # fmt: skip
    return Run(environment={"gpu": {"name": "a made-up GPU"}}, measurements=measurements)


def test_all_figures_are_written_as_png_and_svg(run, tmp_path):
    smaller = Run(run.environment, measurements=[m for m in run.measurements if m.label == "o"])
    names = sorted(path.name for path in plots.plot_run(smaller, tmp_path))
    expected = ("gemm_latency", "gemm_percent_of_floor", "gemm_speed_up")
    assert names == sorted(f"{name}.{kind}" for name in expected for kind in ("png", "svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    assert (tmp_path / "gemm_latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_svg(run, tmp_path):
    one_layer = [m for m in run.measurements if m.label == "o"]
    for name in ("a", "b"):
        with plots.pyplot.rc_context(plots.STYLE):
            plots.save_figure(plots.latency_figure(run, one_layer), tmp_path, name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("draw", [plots.latency_figure, plots.percent_of_floor_figure, plots.speed_up_figure])
def test_legends_and_panels_do_not_overlap(run, draw):
    figure = draw(run, run.measurements)
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(box) for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    for axes in figure.axes:
        assert axes.get_legend() is None
    plots.pyplot.close(figure)


@pytest.mark.parametrize("tokens", [(1,), (1, 16), TOKENS])
def test_names_of_layers_under_bars_do_not_overlap(run, tokens):
    one_layer = [m for m in run.measurements if m.label == "gate_up" and m.num_tokens in tokens]
    rows = [dataclasses.replace(m, label="", out_features=28672 + 64 * index) for index in range(5) for m in one_layer]
    figure = plots.speed_up_figure(run, rows)
    figure.canvas.draw()
    for axes in figure.axes:
        names = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(names) == 5
        assert not any(left.overlaps(right) for left, right in itertools.pairwise(names))
    plots.pyplot.close(figure)


@pytest.mark.parametrize("draw", [plots.latency_figure, plots.percent_of_floor_figure, plots.speed_up_figure])
@pytest.mark.parametrize("groups", [(-1, 128, None), (-1,)])
@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "Some Processor of a Long Name with 48 Cores, 96 threads"])
def test_a_title_ends_before_the_legend(run, draw, groups, device):
    rows = [m for m in run.measurements if m.label == "o" and m.group_size in groups]
    figure = draw(Run({"gpu": {"name": device}}), rows)
    figure.canvas.draw()
    title, legend = figure.get_suptitle(), figure.legends[0].get_window_extent()
    assert device in " ".join(title.split())
    texts = [text for text in figure.texts if text.get_text() == title]
    assert len(texts) == 1 and not texts[0].get_window_extent().overlaps(legend)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(legend.overlaps(box) or texts[0].get_window_extent().overlaps(box) for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    plots.pyplot.close(figure)


@pytest.mark.parametrize(
    "times", [(9.1, 9.9), (1.2, 7.5), (26.0, 260.0), (3.0, 900.0), (1.0, 90_000.0), (100.0, 100.0)]
)
def test_a_logarithmic_axis_has_plain_numbers(times):
    points = zip((1, 64), times, strict=True)
    rows = [Measurement("gemm", "marlin_qqq", m, 64, 128, 128, "x", median_us=us) for m, us in points]
    figure = plots.latency_figure(Run(), rows)
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    shown = [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(shown) >= 2 and all(float(text) > 0 and "e" not in text for text in shown), shown
    assert not any(tick.label1.get_text() for tick in axis.get_minor_ticks())
    plots.pyplot.close(figure)


def test_axes_say_their_units(run):
    latency = plots.latency_figure(run, run.measurements)
    assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in latency.axes} == {("M (tokens)", "microseconds a call")}
    assert {(axes.get_xscale(), axes.get_yscale()) for axes in latency.axes} == {("log", "log")}
    labels = {text.get_text() for text in latency.legends[0].get_texts()}
    assert {"floor, per-channel", "floor, group 128", "Humming, group 128", "fp16 matmul"} <= labels
    percent = plots.percent_of_floor_figure(run, run.measurements)
    assert {axes.get_ylabel() for axes in percent.axes} == {"% of the 4-bit problem's floor"}
    plots.pyplot.close("all")


def test_speed_up_bars_are_time_over_our_time(run):
    figure = plots.speed_up_figure(run, run.measurements)
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    axes = by_title["against Humming, group 128"]
    first = next(m for m in run.measurements if (m.implementation, m.group_size) == ("marlin_qqq", 128))
    peer = next(m for m in run.measurements if (m.implementation, m.group_size) == ("humming", 128))
    assert axes.containers[0][0].get_height() == pytest.approx(peer.median_us / first.median_us)
    assert len(axes.patches) == len(TOKENS) * 4
    plots.pyplot.close(figure)


def test_a_run_without_baselines_has_no_speed_ups(run):
    assert plots.speed_up_figure(run, [m for m in run.measurements if m.implementation == "marlin_qqq"]) is None
