"""Cliffs in latency against the number of tokens: where one more token costs more than the work it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marlin_qqq.bench.results import Measurement, Run

# A larger M that is faster than a smaller one by more than this is an inversion.
INVERSION_TOLERANCE = 0.03
# A step of one token that costs more than the added work by this much is a cliff.
STEP_TOLERANCE = 0.06


@dataclass(frozen=True)
class Cliff:
    """A place where latency does not follow the work."""

    kind: str  # "step": dearer than the work added; "inversion": a smaller batch takes longer
    before: Measurement
    after: Measurement
    ratio: float  # step: time after / time before; inversion: time of the smaller M / time of the larger
    explained: float  # step: the ratio that the floor's growth explains; inversion: 1


def find_cliffs(
    measurements: Sequence[Measurement],
    step_tolerance: float = STEP_TOLERANCE,
    inversion_tolerance: float = INVERSION_TOLERANCE,
) -> list[Cliff]:
    """Steps and inversions in measurements of ONE implementation on ONE shape, in any order of num_tokens.

    A difference counts only where the p10..p90 ranges of the two do not overlap: noise is no cliff.
    """
    rows = sorted((m for m in measurements if m.median_us), key=lambda m: m.num_tokens)
    cliffs: list[Cliff] = []
    slowest: Measurement | None = None
    for index, row in enumerate(rows):
        assert row.median_us is not None
        if index:
            before = rows[index - 1]
            assert before.median_us is not None
            ratio = row.median_us / before.median_us
            explained = row.floor_us / before.floor_us if row.floor_us and before.floor_us else 1.0
            if ratio > max(explained, 1.0) * (1.0 + step_tolerance) and _apart(before, row):
                cliffs.append(Cliff("step", before, row, ratio, explained))
        if slowest is not None and slowest.median_us is not None:
            ratio = slowest.median_us / row.median_us
            if ratio > 1.0 + inversion_tolerance and _apart(row, slowest):
                cliffs.append(Cliff("inversion", slowest, row, ratio, 1.0))
                slowest = row  # report the drop once, then start again below it
        if slowest is None or slowest.median_us is None or row.median_us > slowest.median_us:
            slowest = row
    return cliffs


def cliffs_of_run(run: Run) -> list[Cliff]:
    """The cliffs of every curve of a run: one implementation, mode, method and shape each."""
    curves: dict[tuple[object, ...], list[Measurement]] = {}
    for m in run.measurements:
        key = (m.operation, m.implementation, m.method, m.out_features, m.in_features, m.group_size)
        curves.setdefault(key, []).append(m)
    return [cliff for rows in curves.values() for cliff in find_cliffs(rows)]


def _apart(faster: Measurement, slower: Measurement) -> bool:
    if faster.p90_us is None or slower.p10_us is None:
        return True
    return faster.p90_us < slower.p10_us
