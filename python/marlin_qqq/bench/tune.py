"""Candidate launches of the planner, as variants that can be timed against its own choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.results import OURS, Measurement

if TYPE_CHECKING:
    from marlin_qqq.bench.presets import Layer
    from marlin_qqq.bench.runner import Runner


def candidate_variants(
    num_tokens: int, out_features: int, in_features: int, group_size: int, architecture: str, limit: int
) -> list[str]:
    """Variant names (``tile:NAME+split:COUNT``) of the planner's ``limit`` best candidates for a problem.

    Raises ImportError without the introspection module, ValueError for an architecture the planner does not know.
    """
    import marlin_qqq

    found: list[str] = []
    for plan in marlin_qqq.candidates(num_tokens, out_features, in_features, group_size, architecture):
        variant = variant_of(plan)
        if variant not in found:
            found.append(variant)
        if len(found) == limit:
            break
    return found


def variant_of(plan: Any) -> str:
    """The variant that forces this plan."""
    return f"{plan.family}+tile:{plan.tile_name}+split:{plan.split}"


@dataclass(frozen=True)
class TuneResult:
    """The planner's choice and the fastest candidate of one problem."""

    chosen: Measurement
    best: Measurement

    @property
    def loss(self) -> float:
        """Time of the planner's choice over the fastest candidate's; 1 is perfect."""
        assert self.chosen.median_us is not None and self.best.median_us is not None
        return self.chosen.median_us / self.best.median_us


def tune_results(measurements: Sequence[Measurement], constant: bool = False) -> list[TuneResult]:
    """For every problem the planner's choice against the fastest candidate measured beside it."""
    chosen_name = f"{OURS}:constant" if constant else OURS
    problems: dict[Any, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        if measurement.median_us and measurement.implementation.startswith(OURS):
            problems[measurement.problem_key, measurement.group_size].append(measurement)
    results = []
    for rows in problems.values():
        chosen = next((m for m in rows if m.implementation == chosen_name), None)
        if chosen is not None:
            results.append(TuneResult(chosen, min(rows, key=lambda m: m.median_us or float("inf"))))
    return results


def run_tune(
    runner: Runner, layers: Sequence[Layer], num_tokens: Sequence[int], group_sizes: Sequence[int], limit: int
) -> None:
    """Times the planner's own choice and its ``limit`` best candidates on every problem, into ``runner.run``."""
    import torch

    from marlin_qqq.bench.implementations.marlin import MarlinGemm

    major, minor = torch.cuda.get_device_capability(runner.settings.device)
    for layer in layers:
        for group_size in group_sizes:
            for tokens in num_tokens:
                variants = candidate_variants(
                    tokens, layer.out_features, layer.in_features, group_size, f"sm_{major}{minor}", limit
                )
                implementations = [MarlinGemm(variant, group_size) for variant in ("default", *variants)]
                runner.products([layer], [tokens], implementations)
