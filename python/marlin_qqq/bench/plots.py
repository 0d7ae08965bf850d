"""Plots of a run as PNG and SVG: latency against M with the floor, percent of the floor, speed-ups by layer.

Legends stand outside the axes, every axis has its unit, and an implementation keeps its colour in every figure.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlin_qqq._files import atomic_write
from marlin_qqq.bench.environment import describe_device
from marlin_qqq.bench.results import OURS, Measurement, Run
from marlin_qqq.bench.tables import baselines_of, find_baseline, mode_name, shape_name, speed_up

try:
    import matplotlib
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install matplotlib") from error

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# The palette of Okabe and Ito: told apart by readers with any colour vision.
COLOURS = {
    (OURS, -1): "#0072B2",
    (OURS, 128): "#D55E00",
    ("humming", -1): "#56B4E9",
    ("humming", 128): "#E69F00",
    ("fp16", None): "#555555",
    ("bf16", None): "#777777",
    ("fp32", None): "#555555",
    ("fp8", None): "#009E73",
    ("int_mm", None): "#CC79A7",
    ("read", -1): "#999933",
    ("read", 128): "#666600",
    ("chain", -1): "#AAAAAA",
    ("chain", 128): "#888888",
}
SPARE_COLOURS = ("#882255", "#44AA99", "#117733", "#332288", "#AA4499", "#661100")
CEILINGS = ("read", "chain", "chain:linear")  # of our own making: nobody's product
LABELS = {
    "fp16": "fp16 matmul",
    "bf16": "bf16 matmul",
    "fp32": "fp32 matmul",
    "fp8": "fp8 _scaled_mm",
    "int_mm": "torch._int_mm (no scales)",
    "read": "plain read of the weights",
    "chain": "product without arithmetic",
    "humming": "Humming",
}
STYLE: Any = {
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "svg.hashsalt": "marlin_qqq",  # the same data gives the same file
}
PANELS_PER_ROW = 3
PANEL_INCHES = 4.4
# Of a letter of the legend, on the safe side; the figure's title is set larger.
LETTER_INCHES = 0.08
TITLE_SCALE = 1.2
PLOTTED_OPERATIONS = ("gemm", "quantize", "linear", "layer")


def plot_run(run: Run, folder: str | Path, prefix: str = "") -> list[Path]:
    """Every figure that the run has data for; returns the files written.

    Figures are drawn for the method that the run has most of ("graph" before "sustained"); sustained data gets figures
    of its own, with ``sustained`` in their names.
    """
    folder = Path(folder)
    written: list[Path] = []
    for operation in dict.fromkeys(m.operation for m in run.measurements if m.operation in PLOTTED_OPERATIONS):
        for method in dict.fromkeys(m.method for m in run.measurements if m.operation == operation and m.median_us):
            rows = [m for m in run.measurements if m.operation == operation and m.method == method and m.median_us]
            name = prefix + operation + ("_sustained" if method == "sustained" else "")
            with pyplot.rc_context(STYLE):
                if len({m.num_tokens for m in rows}) > 1:
                    written += save_figure(latency_figure(run, rows), folder, f"{name}_latency")
                    if any(m.floor_us for m in rows):
                        written += save_figure(percent_of_floor_figure(run, rows), folder, f"{name}_percent_of_floor")
                figure = speed_up_figure(run, rows)
                if figure is not None:
                    written += save_figure(figure, folder, f"{name}_speed_up")
    return written


def latency_figure(run: Run, rows: Sequence[Measurement]) -> Any:
    """Microseconds against M, both logarithmic, one panel a shape, p10 to p90 as a band, the floor as a line."""

    def draw(axes: Any, shape_rows: Sequence[Measurement]) -> None:
        for key, curve in _curves(shape_rows).items():
            tokens = [m.num_tokens for m in curve]
            style = _line_style(key)
            axes.plot(tokens, [m.median_us for m in curve], **style)
            axes.fill_between(
                tokens,
                [m.p10_us or m.median_us for m in curve],
                [m.p90_us or m.median_us for m in curve],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
        for group_size, dashes in ((-1, (4, 2)), (128, (1.5, 1.5))):
            floor = _floor_curve(shape_rows, group_size)
            if floor:
                label = f"floor, {mode_name(group_size)}"
                axes.plot(*zip(*floor, strict=True), color="black", linewidth=1.1, dashes=dashes, label=label)
        axes.set_yscale("log")
        axes.set_ylabel("microseconds a call")

    return _panels(run, rows, draw, "Latency")


def percent_of_floor_figure(run: Run, rows: Sequence[Measurement]) -> Any:
    """Floor over time, in percent, against M; 100 is as fast as the device allows."""

    def draw(axes: Any, shape_rows: Sequence[Measurement]) -> None:
        highest = 100.0
        for key, curve in _curves(shape_rows).items():
            if key[0] in CEILINGS:
                continue
            # Everybody against the floor of the 4-bit problem: percent are then comparable between implementations.
            points = [
                (m.num_tokens, 100.0 * floor / m.median_us)
                for m in curve
                if m.median_us and (floor := _own_floor(shape_rows, m))
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **_line_style(key))
                highest = max(highest, *(percent for _, percent in points))
        axes.axhline(100.0, color="black", linewidth=1.1, dashes=(4, 2))
        axes.set_ylim(0, highest * 1.06)
        axes.set_ylabel("% of the 4-bit problem's floor")

    return _panels(run, rows, draw, "Percent of the floor")


def speed_up_figure(run: Run, rows: Sequence[Measurement]) -> Any:
    """How many times as fast as each baseline: a panel a baseline, a group of bars a layer, a bar a batch size."""
    ours = [m for m in rows if _is_headline(m)]
    modes = sorted({m.group_size for m in ours}, key=lambda mode: (mode is None, mode or 0))
    baselines = [
        name
        for name in baselines_of(rows)
        if name not in (*CEILINGS, "copy") and any(speed_up(m, find_baseline(rows, m, name)) for m in ours)
    ]
    if not baselines:
        return None
    shapes = list(dict.fromkeys((m.label, shape_name(m)) for m in ours))
    tokens = _round_tokens(sorted({m.num_tokens for m in ours}))
    letters = max(len(line) for shape in shapes for line in _layer_label(*shape).splitlines())
    group = max(0.2 * (len(tokens) + 1), LETTER_INCHES * (letters + 2))  # its bars, its name
    width = max(4.0, group * len(shapes) + 0.8)
    figure, grid = pyplot.subplots(
        len(baselines),
        len(modes),
        figsize=(width * len(modes) + 1.4, 2.0 * len(baselines) + 0.7),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for line, baseline in enumerate(baselines):
        for column, mode in enumerate(modes):
            axes = grid[line, column]
            own = [m for m in ours if m.group_size == mode]
            _speed_up_bars(axes, rows, own, baseline, shapes, tokens)
            mode_text = f", {mode_name(mode)}" if mode_name(mode) else ""
            axes.set_title(f"against {LABELS.get(baseline, baseline)}{mode_text}", loc="left")
        grid[line, 0].set_ylabel("times as fast")
        grid[line, 0].set_ylim(bottom=0)  # shared by the line's panels, so only once all have their bars
    _add_legend_and_title(figure, grid, f"Speed-up of marlin_qqq on {describe_device(run.environment)}")
    return figure


def _speed_up_bars(
    axes: Any,
    rows: Sequence[Measurement],
    ours: Sequence[Measurement],
    baseline: str,
    shapes: Sequence[tuple[str, str]],
    tokens: Sequence[int],
) -> None:
    """One panel: a group of bars a shape, a bar a batch size, one line at "as fast"."""
    shades = pyplot.get_cmap("viridis")
    ratios = {
        (m.label, shape_name(m), m.num_tokens): ratio
        for m in ours
        if (ratio := speed_up(m, find_baseline(rows, m, baseline)))
    }
    bar = 0.84 / len(tokens)
    for index, count in enumerate(tokens):
        bars = [
            (place - 0.42 + bar * (index + 0.5), ratios[key])
            for place, shape in enumerate(shapes)
            if (key := (*shape, count)) in ratios
        ]
        colour = shades(0.05 + 0.85 * index / max(1, len(tokens) - 1))
        if bars:
            axes.bar(*zip(*bars, strict=True), bar * 0.92, color=colour, label=f"M = {count}")
    axes.axhline(1.0, color="black", linewidth=0.9)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.55, len(shapes) - 0.45)
    axes.set_xticks(range(len(shapes)), [_layer_label(*shape) for shape in shapes])


def _panels(run: Run, rows: Sequence[Measurement], draw: Any, title: str) -> Any:
    """A grid of panels, one a shape, sharing one legend outside."""
    shapes = list(dict.fromkeys((m.label, shape_name(m)) for m in rows))
    columns = 2 if len(shapes) == 4 else min(PANELS_PER_ROW, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(PANEL_INCHES * columns + 1.6, 3.5 * lines + 0.5), squeeze=False, layout="constrained"
    )
    for index, axes in enumerate(grid.flat):
        if index >= len(shapes):
            axes.set_visible(False)
            continue
        draw(axes, [m for m in rows if (m.label, shape_name(m)) == shapes[index]])
        axes.set_title(_layer_label(*shapes[index]).replace("\n", "  "), loc="left")
        axes.set_xscale("log", base=2)
        _token_ticks(axes, sorted({m.num_tokens for m in rows}))
        axes.set_xlabel("M (tokens)")
    _add_legend_and_title(figure, grid, f"{title} on {describe_device(run.environment)}")
    return figure


def _add_legend_and_title(figure: Any, grid: Any, title: str) -> None:
    """The legend on the right, the title beside it: in as many lines as it needs to end before the legend begins."""
    handles, labels = _legend_entries(grid.flat)
    legend_width = LETTER_INCHES * max((len(label) for label in labels), default=0) + 0.7
    width, height = figure.get_size_inches()
    width = max(width, PANEL_INCHES + legend_width)  # else a legend takes most of a single panel's figure
    figure.set_size_inches(width, height)
    figure.legend(handles, labels, loc="outside right upper")
    letters = int((width - legend_width) / (LETTER_INCHES * TITLE_SCALE))
    figure.suptitle(textwrap.fill(title, letters), x=0.01, ha="left")


def _token_ticks(axes: Any, tokens: Sequence[int]) -> None:
    powers = [count for count in (4**power for power in range(10)) if tokens[0] <= count <= tokens[-1]]
    ticks = powers if len(powers) >= 3 else _few(tokens, 8)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        _plain_numbers(axes)


def _plain_numbers(axes: Any) -> None:
    """Numbers of a logarithmic y axis as people write them, and more than one of them also on a short axis."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    if decades < 1:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())  # its own writes 2.6 x 10^1 beside them


def _curves(rows: Sequence[Measurement]) -> dict[tuple[str, int | None], list[Measurement]]:
    curves: dict[tuple[str, int | None], list[Measurement]] = {}
    for row in sorted(rows, key=lambda m: m.num_tokens):
        curves.setdefault((row.implementation, row.group_size), []).append(row)
    return curves


def _line_style(key: tuple[str, int | None]) -> dict[str, Any]:
    name, group_size = key
    base, _, variant = name.partition(":")
    colour = COLOURS.get((base, group_size)) or SPARE_COLOURS[sum(name.encode()) % len(SPARE_COLOURS)]
    label = LABELS.get(base, base)
    if variant:
        label += f" ({variant})"
    if group_size is not None:
        label += f", {mode_name(group_size)}"
    ours = base == OURS
    return {
        "color": colour,
        "label": label,
        "linewidth": 2.0 if ours else 1.3,
        "linestyle": "--" if variant == "sm80" else ":" if variant == "constant" else "-",
        "marker": "o" if ours else "s",
        "markersize": 3.6 if ours else 2.8,
        "zorder": 3 if ours else 2,
    }


def _floor_curve(rows: Sequence[Measurement], group_size: int) -> list[tuple[int, float]]:
    points = {m.num_tokens: m.floor_us for m in rows if _is_ours(m) and m.group_size == group_size and m.floor_us}
    return sorted((tokens, floor) for tokens, floor in points.items() if floor)


def _own_floor(rows: Sequence[Measurement], row: Measurement) -> float | None:
    """The floor of our 4-bit problem with the row's M, in the row's mode where it has one."""
    same = [m for m in rows if _is_ours(m) and m.num_tokens == row.num_tokens and m.floor_us]
    return next((m.floor_us for m in same if row.group_size in (None, m.group_size)), None)


def _is_ours(row: Measurement) -> bool:
    return row.implementation.startswith(OURS)


def _is_headline(row: Measurement) -> bool:
    """The variant that speed-ups are shown for: the op as called by default, or a whole linear layer."""
    return (
        row.implementation == OURS if row.operation in ("gemm", "quantize") else row.implementation == f"{OURS}:linear"
    )


def _layer_label(label: str, shape: str) -> str:
    return shape if label in ("", shape) else f"{label}\n{shape}"


def _round_tokens(tokens: Sequence[int]) -> list[int]:
    """Batch sizes that bars are shown for: 1, 16, 64, 256, 1024, 4096 where the run has most of them."""
    usual = [count for count in (1, 16, 64, 256, 1024, 4096) if count in tokens]
    return usual if len(usual) >= 3 else _few(tokens, 6)


def _few(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the sorted values, spread evenly, ends included."""
    if len(values) <= count:
        return list(values)
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def _legend_entries(all_axes: Any) -> tuple[list[Any], list[str]]:
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def save_figure(figure: Any, folder: Path, name: str) -> list[Path]:
    """PNG and SVG."""
    paths = []
    for extension, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
        path = folder / f"{name}.{extension}"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=extension, **options)
        paths.append(path)
    pyplot.close(figure)
    return paths
