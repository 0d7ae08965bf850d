"""Two runs side by side: what got slower, what got faster, and what is only noise."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_qqq.bench.results import Measurement, Run

DEFAULT_THRESHOLD = 0.02


@dataclass(frozen=True)
class Change:
    """One measurement that both runs have."""

    before: Measurement
    after: Measurement
    ratio: float  # time after / time before, corrected for the reference where one is used
    verdict: str  # "slower", "faster", "same"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_before: list[Measurement]
    only_after: list[Measurement]
    newly_wrong: list[Measurement]
    warnings: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare_runs(
    before: Run, after: Run, threshold: float = DEFAULT_THRESHOLD, relative_to: str | None = None
) -> Comparison:
    """Matches measurements by operation, implementation, method and problem.

    A change counts when the medians differ by more than ``threshold`` AND the p10..p90 ranges do not overlap. With
    ``relative_to`` (an implementation both runs have, such as ``"fp16"``) times are first divided by that
    implementation's on the same problem, which removes most of the difference between two GPUs or two days.
    """
    old = {m.key: m for m in before.measurements}
    new = {m.key: m for m in after.measurements}
    warnings = []
    for name, ours, theirs in (
        ("GPU", _gpu(before), _gpu(after)),
        ("torch", before.environment.get("torch"), after.environment.get("torch")),
    ):
        if ours != theirs and not (relative_to and name == "GPU"):
            warnings.append(f"the {name} differs: {ours} before, {theirs} after")

    changes = []
    for key in old.keys() & new.keys():
        first, second = old[key], new[key]
        if not first.median_us or not second.median_us:
            continue
        correction = 1.0
        if relative_to:
            scale_old, scale_new = _reference_us(before, first, relative_to), _reference_us(after, second, relative_to)
            if not scale_old or not scale_new:
                continue
            correction = scale_old / scale_new
        changes.append(_change(first, second, correction, threshold))
    changes.sort(key=lambda change: -change.ratio)
    return Comparison(
        changes=changes,
        only_before=[old[key] for key in old if key not in new and old[key].median_us],
        only_after=[new[key] for key in new if key not in old and new[key].median_us],
        newly_wrong=[new[key] for key in new if new[key].wrong and not (key in old and old[key].wrong)],
        warnings=warnings,
    )


def _change(first: Measurement, second: Measurement, correction: float, threshold: float) -> Change:
    assert first.median_us is not None and second.median_us is not None
    ratio = correction * second.median_us / first.median_us
    low_old, high_old = first.p10_us or first.median_us, first.p90_us or first.median_us
    low_new = correction * (second.p10_us or second.median_us)
    high_new = correction * (second.p90_us or second.median_us)
    verdict = "same"
    if ratio > 1.0 + threshold and low_new > high_old:
        verdict = "slower"
    elif ratio < 1.0 / (1.0 + threshold) and high_new < low_old:
        verdict = "faster"
    return Change(first, second, ratio, verdict)


def _reference_us(run: Run, measurement: Measurement, implementation: str) -> float | None:
    return next(
        (
            m.median_us
            for m in run.measurements
            if m.implementation == implementation and m.problem_key == measurement.problem_key and m.median_us
        ),
        None,
    )


def _gpu(run: Run) -> str | None:
    gpu = run.environment.get("gpu")
    return gpu.get("name") if isinstance(gpu, dict) else None
