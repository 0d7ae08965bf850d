"""The performance goals of the Hopper kernels, judged from a saved run.

    python benchmarks/goals.py benchmarks/results/hopper.json [--places]

Every goal is a ratio (or a time) with a bound; what is shown is the worst place measured and how many places meet it,
with --places every one that does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from marlin_qqq.bench.results import OURS, Measurement, Run, load_run

LARGE_WEIGHT_BYTES = 40e6
CHANNEL, GROUP = -1, 128


@dataclass(frozen=True)
class Place:
    """One measured value of a goal."""

    value: float
    where: str


@dataclass(frozen=True)
class Goal:
    """A bound and the values measured for it."""

    name: str
    bound: float
    at_most: bool
    unit: str
    places: tuple[Place, ...]

    @property
    def worst(self) -> Place | None:
        if not self.places:
            return None
        return (max if self.at_most else min)(self.places, key=lambda place: place.value)

    def met_at(self, place: Place) -> bool:
        return place.value <= self.bound if self.at_most else place.value >= self.bound

    @property
    def missed(self) -> list[Place]:
        return [place for place in self.places if not self.met_at(place)]

    @property
    def num_met(self) -> int:
        return len(self.places) - len(self.missed)

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.worst is None:
            return f"{'-':4} {self.name:66} {sign} {self.bound:<5g}{self.unit:3} not measured"
        verdict = "met" if self.num_met == len(self.places) else "MISS"
        return (
            f"{verdict:4} {self.name:66} {sign} {self.bound:<5g}{self.unit:3} worst {self.worst.value:6.3f} at "
            f"{self.worst.where}; {self.num_met}/{len(self.places)}"
        )


class Table:
    """Measurements by implementation, problem, mode and method."""

    def __init__(self, run: Run) -> None:
        self.rows = {
            (m.operation, m.method, m.implementation, m.group_size, m.out_features, m.in_features, m.num_tokens): m
            for m in run.measurements
            if m.median_us
        }
        self.run = run

    def other(self, row: Measurement, implementation: str, group_size: int | None) -> Measurement | None:
        key = (row.operation, row.method, implementation, group_size, row.out_features, row.in_features)
        return self.rows.get((*key, row.num_tokens))

    def ours(
        self, variant: str = "", method: str = "graph", operation: str = "gemm", modes: Iterable[int] = (CHANNEL, GROUP)
    ) -> Iterator[Measurement]:
        name = f"{OURS}:{variant}" if variant else OURS
        for row in self.rows.values():
            if (row.implementation, row.method, row.operation) == (name, method, operation) and row.group_size in modes:
                yield row


def where(row: Measurement) -> str:
    mode = {CHANNEL: "chn", GROUP: "g128"}.get(row.group_size or 0, "")
    shape = f"{row.out_features}x{row.in_features}" if row.out_features else f"K={row.in_features}"
    return f"{shape} M={row.num_tokens} {mode}".strip()


def time_of(row: Measurement) -> float:
    assert row.median_us is not None
    return row.median_us


def ratio(row: Measurement, other: Measurement | None) -> Iterator[Place]:
    """other / row: how many times as fast as ``other``."""
    if other is not None:
        yield Place(time_of(other) / time_of(row), where(row))


def judge(run: Run) -> list[Goal]:
    """All goals, in the order of the regimes."""
    table = Table(run)
    return [*_small_batches(table), *_middle_and_large(table), *_everywhere(table), *_quantisation(table)]


def _small_batches(table: Table) -> Iterator[Goal]:
    for variant, text in (("constant", "layer"), ("", "raw op")):
        rows = [m for m in table.ours(variant) if m.out_features * m.in_features / 2 >= LARGE_WEIGHT_BYTES]
        for low, high, bound in ((1, 16, 1.00), (17, 64, 1.10)):
            places = tuple(
                Place(time_of(m) / time_of(read), where(m))
                for m in rows
                if low <= m.num_tokens <= high and (read := table.other(m, "read", m.group_size))
            )
            name = f"M {low}..{high}, weights >= 40 MB: time / plain read ({text})"
            yield Goal(name, bound, True, "x", places)
        small = tuple(
            Place(time_of(m), where(m))
            for m in table.ours(variant)
            if (m.out_features, m.in_features) == (4096, 4096) and m.num_tokens <= 16
        )
        yield Goal(f"4096x4096, M <= 16: time ({text})", 3.5 if variant else 5.5, True, "us", small)


def _middle_and_large(table: Table) -> Iterator[Goal]:
    middle = [m for m in table.ours() if 64 < m.num_tokens <= 256]
    floors = tuple(Place(time_of(m) / m.floor_us, where(m)) for m in middle if m.floor_us and m.floor_us >= 15.0)
    yield Goal("M 65..256: time / floor where the floor is >= 15 us", 1.35, True, "x", floors)
    faster = tuple(p for m in middle for p in ratio(m, table.other(m, "humming", m.group_size)))
    yield Goal("M 65..256: times as fast as Humming, same mode", 1.3, False, "x", faster)

    floors = tuple(
        Place(time_of(m) / m.floor_us, where(m))
        for m in table.ours(modes=(CHANNEL,))
        if 512 <= m.num_tokens <= 1024 and m.floor_us
    )
    yield Goal("M 512..1024 per-channel: time / floor", 1.15, True, "x", floors)
    for method in ("graph", "sustained"):
        channel = [m for m in table.ours(method=method, modes=(CHANNEL,)) if m.num_tokens >= 512]
        for name, mode in (("humming", CHANNEL), ("fp8", None)):
            places = tuple(p for m in channel for p in ratio(m, table.other(m, name, mode)))
            yield Goal(f"M >= 512 per-channel, {method}: times as fast as {name}", 1.0, False, "x", places)
        places = tuple(p for m in channel if m.num_tokens == 4096 for p in ratio(m, table.other(m, "humming", CHANNEL)))
        yield Goal(f"M = 4096 per-channel, {method}: times as fast as Humming", 1.1, False, "x", places)
        grouped = [m for m in table.ours(method=method, modes=(GROUP,)) if m.num_tokens >= 512]
        places = tuple(
            Place(time_of(m) / time_of(other), where(m))
            for m in grouped
            if (other := table.other(m, m.implementation, CHANNEL))
        )
        bound = 1.05 if method == "graph" else 1.08
        yield Goal(f"M >= 512, {method}: group 128 / per-channel", bound, True, "x", places)
        places = tuple(p for m in grouped for p in ratio(m, table.other(m, "humming", GROUP)))
        yield Goal(f"M >= 512 group 128, {method}: times as fast as Humming", 1.9, False, "x", places)


def _everywhere(table: Table) -> Iterator[Goal]:
    for name, has_mode in (
        ("humming", True),
        ("fp8", False),
        ("fp16", False),
        ("int_mm", False),
        (f"{OURS}:sm80", True),
    ):
        places = tuple(
            p for m in table.ours() for p in ratio(m, table.other(m, name, m.group_size if has_mode else None))
        )
        yield Goal(f"every M and mode: times as fast as {name}", 1.0, False, "x", places)

    inversions = []
    for row in table.ours():
        smaller = [
            m
            for m in table.ours(modes=(row.group_size or CHANNEL,))
            if (m.out_features, m.in_features) == (row.out_features, row.in_features) and m.num_tokens < row.num_tokens
        ]
        if smaller:
            slowest = max(smaller, key=time_of)
            inversions.append(Place(time_of(slowest) / time_of(row), f"{where(row)} after M={slowest.num_tokens}"))
    yield Goal("latency grows with M: slowest smaller M / time", 1.03, True, "x", tuple(inversions))
    for variant in ("bias", "bf16"):
        places = tuple(
            Place(time_of(m) / time_of(plain), where(m))
            for m in table.ours(variant, operation="epilogue")
            if (plain := table.other(m, OURS, m.group_size))
        )
        yield Goal(f"{variant}: time / without", 1.02, True, "x", places)


def _quantisation(table: Table) -> Iterator[Goal]:
    rows = [m for m in table.rows.values() if m.operation == "quantize" and m.implementation == OURS]
    bandwidth = table.run.ceilings.get("read_gbps")
    large = tuple(
        Place((m.gbps or 0.0) / bandwidth, where(m)) for m in rows if bandwidth and m.num_tokens * m.in_features >= 32e6
    )
    yield Goal("quantize_per_token, M*K >= 32 M: share of read bandwidth", 0.85, False, "x", large)
    small = tuple(Place(time_of(m), where(m)) for m in rows if m.num_tokens <= 64 and m.in_features <= 8192)
    yield Goal("quantize_per_token, M <= 64, K <= 8192: time", 2.0, True, "us", small)
    layers = tuple(
        Place(time_of(m) - time_of(alone), where(m))
        for m in table.ours("linear", operation="linear")
        if m.num_tokens <= 64 and m.in_features <= 8192 and (alone := table.other(m, f"{OURS}:constant", m.group_size))
    )
    yield Goal("quantise + GEMM over the GEMM alone, M <= 64, K <= 8192", 1.0, True, "us", layers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.json", help="a run saved by run_hopper.py")
    parser.add_argument("--places", action="store_true", help="list every place that misses its goal")
    arguments = parser.parse_args()
    try:
        goals = judge(load_run(arguments.run))
    except ValueError as error:
        print(f"goals: {error}", file=sys.stderr)
        return 2
    for goal in goals:
        print(goal.line())
        if arguments.places and goal.missed:
            print("     " + ", ".join(f"{place.where} {place.value:.3f}" for place in goal.missed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
