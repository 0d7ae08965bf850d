"""Regenerates every figure and table that is made from saved runs: README.md, docs/benchmark.md, benchmarks/plots/.

    python benchmarks/update_readme.py            # write
    python benchmarks/update_readme.py --check    # exit 1 if a text is not what the saved runs give

Texts stand between the markers `<!-- benchmark:NAME:begin -->` and `<!-- benchmark:NAME:end -->` and are replaced; all
else in those files is left alone. The headline run is the newest file benchmarks/results/hopper*.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import judge

from marlin_qqq._files import write_text_atomically
from marlin_qqq.bench.environment import describe_device
from marlin_qqq.bench.implementations.served import KernelBetween
from marlin_qqq.bench.results import OURS, Measurement, Run, load_run

HEADLINE_SHAPES = ((8192, 21760), (28672, 4096), (4096, 4096))
HEADLINE_TOKENS = (1, 16, 64, 256, 1024, 4096)
HEADLINE_PEERS = ("humming", "fp8", "fp16")
LAYER = f"{OURS}:constant"
NOTHING = "Not measured yet."


class Document:
    """A file with marked blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = self.text = path.read_text(encoding="utf-8")

    def fill(self, name: str, content: str) -> None:
        """Replaces the block ``name``; raises ValueError where the file has no such block."""
        begin, end = f"<!-- benchmark:{name}:begin -->", f"<!-- benchmark:{name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(self.text)) != 1:
            raise ValueError(f"{self.path.name} must hold the markers {begin} and {end} once each")
        self.text = pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", self.text)

    @property
    def changed(self) -> bool:
        return self.text != self.before


def newest(paths: Iterable[Path]) -> tuple[Path, Run] | None:
    """The run with the latest date inside it."""
    runs = [(path, load_run(path)) for path in paths]
    return max(runs, key=lambda entry: str(entry[1].environment.get("created", "")), default=None)


def provenance(path: Path, run: Run) -> str:
    """One sentence: where the numbers come from."""
    environment = run.environment
    gpu = environment.get("gpu", {})
    commit = str(environment.get("commit") or "unknown")[:10]
    return (
        f"{describe_device(environment)}, driver {gpu.get('driver') or 'unknown'}, torch {environment.get('torch')}, "
        f"commit {commit}, {str(environment.get('created'))[:10]}; data: [{path.name}](benchmarks/results/{path.name})."
    )


def find(run: Run, implementation: str, n: int, k: int, tokens: int, group_size: int | None) -> Measurement | None:
    """The right, available measurement in the graph, or None."""
    for m in run.measurements:
        if (
            m.implementation == implementation
            and (m.operation, m.method, m.group_size) == ("gemm", "graph", group_size)
            and (m.out_features, m.in_features, m.num_tokens) == (n, k, tokens)
        ):
            return m if m.median_us else None
    return None


def microseconds(measurement: Measurement | None) -> str:
    if measurement is None or measurement.median_us is None:
        return "-"
    value = measurement.median_us
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def times(ours: Measurement | None, other: Measurement | None) -> str:
    if not ours or not other or not ours.median_us or not other.median_us:
        return "-"
    return f"{other.median_us / ours.median_us:.2f}"


def headline_table(run: Run) -> str:
    """Our times beside the peers', and how many times as fast we are, in both modes."""
    lines = [
        "| N x K | M | floor | per-channel | x Humming | x fp8 | x fp16 | group 128 | x Humming | x fp8 | x fp16 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for n, k in HEADLINE_SHAPES:
        for tokens in HEADLINE_TOKENS:
            cells = [f"{n}x{k}", str(tokens)]
            for mode in (-1, 128):
                raw, layer = (find(run, name, n, k, tokens, mode) for name in (OURS, LAYER))
                if mode == -1:
                    floor = raw.floor_us if raw else None
                    cells.append(f"{floor:.1f}" if floor else "-")
                cells.append(f"{microseconds(raw)} ({microseconds(layer)})")
                for peer in HEADLINE_PEERS:
                    cells.append(times(raw, find(run, peer, n, k, tokens, mode if peer == "humming" else None)))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full_table(run: Run, method: str) -> str:
    """Every shape and batch size of a run in microseconds, one column an implementation and mode."""
    rows = [m for m in run.measurements if m.operation == "gemm" and m.method == method and m.median_us]
    if not rows:
        return NOTHING
    columns = list(dict.fromkeys((m.implementation, m.group_size) for m in rows))
    columns.sort(key=lambda column: (not column[0].startswith(OURS), column[1] or 0))
    names = {-1: " chn", 128: " g128", None: ""}
    heads = [name.replace(f"{OURS}:", "").replace(OURS, "ours") + names[mode] for name, mode in columns]
    lines = [f"| N x K | M | floor | {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) + 2)]
    by_key = {(m.out_features, m.in_features, m.num_tokens, m.implementation, m.group_size): m for m in rows}
    problems = dict.fromkeys((m.out_features, m.in_features, m.num_tokens) for m in rows)
    for n, k, tokens in problems:
        found = [by_key.get((n, k, tokens, *column)) for column in columns]
        floor = next(
            (m.floor_us for m in found if m and m.implementation.startswith(OURS) and m.group_size == -1), None
        )
        cells = [f"{n}x{k}", str(tokens), f"{floor:.1f}" if floor else "-", *map(microseconds, found)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def served_table(run: Run) -> str:
    """A decoder layer's linears, each behind another kernel, less those kernels' own time."""
    rows = [m for m in run.measurements if m.operation == "served" and m.median_us]
    columns = [m for m in rows if m.implementation.endswith(":served") and m.num_tokens == rows[0].num_tokens]
    if not columns:
        return NOTHING
    heads = []
    for m in columns:
        mode = {-1: "per-channel", 128: "group 128"}.get(m.group_size or 0, "")
        peer = {OURS: "", "humming": "Humming"}.get(name := m.implementation.partition(":")[0], name)
        heads.append(f"{peer} {mode}".strip())
    lines = [f"| M | {' | '.join(heads)} |", "|--:|" + "--:|" * len(heads)]
    for tokens in dict.fromkeys(m.num_tokens for m in rows):
        times = {(m.implementation, m.group_size): m.median_us for m in rows if m.num_tokens == tokens}
        between = times.get((KernelBetween.name, None))
        cells = [str(tokens)]
        for m in columns:
            both = times.get((m.implementation, m.group_size))
            cells.append(f"{both - between:.1f}" if both and between else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goals_table(run: Run) -> str:
    """The goals, their worst values and where those are."""
    lines = ["| goal | bound | worst | where | met |", "|---|--:|--:|---|--:|"]
    for goal in judge(run):
        sign = "<=" if goal.at_most else ">="
        bound = f"{sign} {goal.bound:g} {goal.unit}".strip()
        worst = f"{goal.worst.value:.3f}" if goal.worst else "not measured"
        where = goal.worst.where if goal.worst else ""
        lines.append(f"| {goal.name} | {bound} | {worst} | {where} | {goal.num_met} of {len(goal.places)} |")
    return "\n".join(lines)


def headline_figures(run: Run, folder: Path) -> None:
    """The README's two figures: few curves, few shapes."""
    from marlin_qqq.bench import plots

    shown = {OURS, *HEADLINE_PEERS}
    rows = [
        m
        for m in run.measurements
        if m.implementation in shown
        and (m.operation, m.method) == ("gemm", "graph")
        and (m.out_features, m.in_features) in HEADLINE_SHAPES
        and m.median_us
    ]
    with plots.pyplot.rc_context(plots.STYLE):
        plots.save_figure(plots.latency_figure(run, rows), folder, "readme_latency")
        figure = plots.speed_up_figure(run, rows)
        if figure is not None:
            plots.save_figure(figure, folder, "readme_speed_up")


def readme_text(path: Path, run: Run) -> str:
    return f"""\
![Latency against the number of tokens](benchmarks/plots/readme_latency.png)

Microseconds a call of the product alone: M tokens, K inputs, N outputs. In brackets with constant weights, as the
linear layer calls it: the promise that no earlier work on the GPU changes them, so that a kernel may fetch them while
the one before it ends. The floor is what the GPU needs at least to read the bytes or to multiply, whichever is more.
"x" is how many times as fast the plain call is as that peer: Humming (`humming-kernels`) has 4-bit weights and int8
activations, too; fp8 (`torch._scaled_mm`) and fp16 (`torch.mm`) read weights twice and four times as large.
{provenance(path, run)}

{headline_table(run)}

As a model serves them: the four linears of an 8B decoder layer (qkv, o, gate and up, down; quantisation included) in a
CUDA graph, each behind another kernel, in microseconds without those kernels' own time.

{served_table(run)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a text would change")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    options = parser.parse_args(arguments)

    found = newest((options.root / "benchmarks" / "results").glob("hopper*.json"))
    readme, details = Document(options.root / "README.md"), Document(options.root / "docs" / "benchmark.md")
    if found is None:
        for document, name in ((readme, "headline"), (details, "goals"), (details, "graph"), (details, "sustained")):
            document.fill(name, NOTHING)
    else:
        path, run = found
        readme.fill("headline", readme_text(path, run))
        source = provenance(path, run).replace("benchmarks/results/", "../benchmarks/results/", 1)
        details.fill("goals", f"{source}\n\n{goals_table(run)}")
        details.fill("graph", full_table(run, "graph"))
        details.fill("sustained", full_table(run, "sustained"))
    changed = [document for document in (readme, details) if document.changed]
    for document in changed:
        print(f"{document.path.name} {'is out of date' if options.check else 'updated'}")
        if not options.check:
            write_text_atomically(document.path, document.text)
    if options.check:
        return 1 if changed else 0
    if found is not None:
        from marlin_qqq.bench.plots import plot_run

        folder = options.root / "benchmarks" / "plots"
        headline_figures(found[1], folder)
        written = plot_run(found[1], folder, prefix=f"{found[0].stem}_")
        print(f"{len(written) + 4} figures in benchmarks/plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
