"""Tables people read, from a run's measurements."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from marlin_qqq.bench.compare import Comparison
from marlin_qqq.bench.environment import describe_device
from marlin_qqq.bench.results import OURS, Measurement, Run
from marlin_qqq.bench.sweep import Cliff
from marlin_qqq.bench.tune import TuneResult

# Columns that a narrow terminal goes without, the first one first.
CLIFFS_DROPPED_FIRST = ("explained by the work", "kind", "variant", "us")
TUNE_DROPPED_FIRST = ("chosen us", "best us", "mode")
COMPARISON_DROPPED_FIRST = ("method", "operation", "after us", "before us", "mode")
MODE_NAMES = {None: "", -1: "per-channel", 128: "group 128"}


def format_us(value: float | None) -> str:
    """Microseconds with three significant digits or one decimal; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _three_digits(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shape_name(row: Measurement) -> str:
    """``NxK`` of a product; what else was measured otherwise."""
    if row.operation == "layer":
        return "4 linears"
    return f"{row.out_features}x{row.in_features}" if row.out_features else f"K={row.in_features}"


def mode_name(group_size: int | None) -> str:
    return MODE_NAMES.get(group_size, f"group {group_size}")


def speed_up(ours: Measurement, other: Measurement | None) -> float | None:
    """How many times as fast as ``other`` ours is."""
    if other is None or not ours.median_us or not other.median_us:
        return None
    return other.median_us / ours.median_us


def baselines_of(measurements: Sequence[Measurement]) -> list[str]:
    """Names of the implementations that are not ours, in order of appearance."""
    names: list[str] = []
    for measurement in measurements:
        if not measurement.implementation.startswith(OURS) and measurement.implementation not in names:
            names.append(measurement.implementation)
    return names


def find_baseline(measurements: Sequence[Measurement], ours: Measurement, name: str) -> Measurement | None:
    """The baseline's measurement of the same problem: in the same group mode, or without one."""
    same = [m for m in measurements if m.implementation == name and m.problem_key == ours.problem_key]
    return next((m for m in same if m.group_size in (None, ours.group_size)), None)


def measurement_table(run: Run, measurements: Sequence[Measurement] | None = None) -> Table:
    """One row for each of our measurements, with a column "x NAME" for each baseline of the run."""
    rows = list(run.measurements if measurements is None else measurements)
    baselines = baselines_of(rows)
    table = Table(title=f"marlin_qqq on {describe_device(run.environment)}", title_justify="left")
    has_floor = any(m.floor_us for m in rows)
    operations = {m.operation for m in rows}
    columns = ["layer", "N x K", "M", "mode", "variant", "method", "us", "p10-p90", "TOPS", "GB/s"]
    if has_floor:
        columns.append("% floor")
    columns += [f"x {name}" for name in baselines] + ["result"]
    for column in columns:
        left = column in ("layer", "N x K", "mode", "variant", "method", "result")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "result")
    labels_are_shapes = all(m.label in ("", f"{m.out_features}x{m.in_features}") for m in rows)
    for row in rows:
        if not row.implementation.startswith(OURS):
            continue
        cells = [
            row.label,
            shape_name(row),
            str(row.num_tokens),
            mode_name(row.group_size),
            row.implementation.removeprefix(OURS).lstrip(":") or "default",
            row.method,
            format_us(row.median_us),
            f"{format_us(row.p10_us)}-{format_us(row.p90_us)}" if row.median_us else "",
            _three_digits(row.tops),
            _three_digits(row.gbps),
        ]
        if has_floor:
            cells.append(f"{row.percent_of_floor:.0f}" if row.percent_of_floor else "")
        for name in baselines:
            ratio = speed_up(row, find_baseline(rows, row, name))
            cells.append(f"{ratio:.2f}" if ratio else "-")
        table.add_row(*cells, _result(row))
    hidden = {"layer"} if labels_are_shapes else set()
    if len({m.method for m in rows}) == 1:
        hidden.add("method")
    if operations == {"quantize"}:
        hidden |= {"mode", "TOPS"}
    table.columns = [column for column in table.columns if column.header not in hidden]
    return table


def _result(row: Measurement) -> Text:
    if row.wrong:
        return Text(row.check, style="bold red")
    if row.unavailable:
        return Text(row.unavailable, style="yellow")
    return Text(row.check.split(" (")[0], style="green")


def footnotes(run: Run, measurements: Sequence[Measurement] | None = None) -> list[str]:
    """What the table cannot hold: ceilings, how rows were checked, baselines that are missing or wrong and why."""
    rows = run.measurements if measurements is None else measurements
    lines = []
    ceilings = run.ceilings
    if ceilings.get("read_gbps"):
        lines.append(
            f"Ceilings: {ceilings['read_gbps']:,.0f} GB/s ({ceilings['read_source']}); "
            f"{ceilings['int8_tops']:,.0f} int8 TOPS ({ceilings['int8_source']})."
            if ceilings.get("int8_tops")
            else f"Ceilings: {ceilings['read_gbps']:,.0f} GB/s ({ceilings['read_source']}); no int8 rate."
        )
    checks = sorted({m.check for m in rows if m.implementation.startswith(OURS) and m.check.startswith("exact")})
    if checks:
        how = {check.removeprefix("exact (").split(",")[0].rstrip(")") for check in checks}
        whole = all("every value" in check for check in checks)
        lines.append(f"Results equal the {' / '.join(sorted(how))}, {'every value' if whole else 'sampled bands'}.")
    reasons: dict[tuple[str, str], int] = {}
    for m in rows:
        if m.implementation.startswith(OURS):
            continue
        reason = m.unavailable or (m.check if m.wrong else "")
        if reason:
            reasons[(m.implementation, reason)] = reasons.get((m.implementation, reason), 0) + 1
    lines += [f"No {name} in {count} rows: {reason}." for (name, reason), count in reasons.items()]
    sustained = [m for m in rows if m.method == "sustained" and m.sm_clock_mhz]
    if sustained:
        clocks = [m.sm_clock_mhz for m in sustained if m.sm_clock_mhz]
        lines.append(f"Sustained: 400 launches back to back; SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz.")
    return lines + list(run.notes)


def cliff_table(cliffs: Sequence[Cliff]) -> Table:
    """Steps and inversions of a sweep."""
    table = Table(title="Cliffs", title_justify="left")
    for column in ("N x K", "mode", "variant", "kind", "M", "us", "to M", "us", "ratio", "explained by the work"):
        left = column in ("N x K", "mode", "variant", "kind")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for cliff in cliffs:
        before, after = cliff.before, cliff.after
        table.add_row(
            f"{after.out_features}x{after.in_features}",
            mode_name(after.group_size),
            after.implementation.removeprefix(OURS).lstrip(":") or "default",
            cliff.kind,
            str(before.num_tokens),
            format_us(before.median_us),
            str(after.num_tokens),
            format_us(after.median_us),
            f"{cliff.ratio:.3f}",
            f"{cliff.explained:.3f}",
        )
    return table


def tune_table(results: Sequence[TuneResult]) -> Table:
    """The planner's choice beside the fastest candidate, the worst choices first."""
    table = Table(title="Planner's choice against the fastest candidate", title_justify="left")
    for column in ("N x K", "M", "mode", "chosen us", "best us", "chosen / best", "best candidate"):
        left = column in ("N x K", "mode", "best candidate")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for result in sorted(results, key=lambda result: -result.loss):
        chosen, best = result.chosen, result.best
        table.add_row(
            f"{chosen.out_features}x{chosen.in_features}",
            str(chosen.num_tokens),
            mode_name(chosen.group_size),
            format_us(chosen.median_us),
            format_us(best.median_us),
            f"{result.loss:.3f}",
            best.implementation.removeprefix(OURS).lstrip(":") or "the planner's own",
        )
    return table


def comparison_table(comparison: Comparison, show_same: bool = False) -> Table:
    """Changes beyond noise, the worst regression first."""
    table = Table(title="Time after / time before", title_justify="left")
    for column in ("operation", "implementation", "N x K", "M", "mode", "method", "before us", "after us", "ratio", ""):
        left = column in ("operation", "implementation", "N x K", "mode", "method", "")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    styles = {"slower": "bold red", "faster": "green", "same": "dim"}
    for change in comparison.changes:
        if change.verdict == "same" and not show_same:
            continue
        row = change.after
        table.add_row(
            row.operation,
            row.implementation,
            f"{row.out_features}x{row.in_features}",
            str(row.num_tokens),
            mode_name(row.group_size),
            row.method,
            format_us(change.before.median_us),
            format_us(row.median_us),
            f"{change.ratio:.3f}",
            Text(change.verdict, style=styles[change.verdict]),
        )
    return table
