"""Candidate launches of the planner, as variants that can be timed against its own choice.

The op's library is asked for them, not the introspection module: its planner knows the GPU at hand, and it is there for
every Python.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.results import OURS, Measurement

if TYPE_CHECKING:
    from marlin_qqq.bench.presets import Layer
    from marlin_qqq.bench.runner import Runner


@dataclass(frozen=True)
class Candidate:
    """A launch that the planner considers for a problem."""

    name: str  # among the problem's candidates, as MARLIN_QQQ_TILE takes it: "deep256/1x3/2"
    text: str  # the whole plan in words
    tile_tokens: int
    estimated_us: float

    @property
    def tile_name(self) -> str:
        return self.name.partition("/")[0]

    @property
    def quantizes(self) -> bool:
        """Whether the product's kernel quantises the activations."""
        return self.name.endswith("/quantizing")

    @property
    def family(self) -> str:
        """Of the tile, which its name says before the number of tokens: "deep"."""
        return self.tile_name.rstrip("0123456789")

    @property
    def multicast(self) -> int:
        """How many blocks share their activations."""
        return int(self.name.split("/")[2])

    @property
    def variant(self) -> str:
        """The variant of our op that forces this launch."""
        return f"tile:{self.name}"


def parse_candidate_list(text: str) -> tuple[dict[str, Any], list[Candidate]]:
    """The device as the planner sees it, and a problem's candidates, best first, from what the tile "list" answers."""
    device = re.search(r"^device (compute_capability=.*)$", text, re.MULTILINE)
    if device is None:
        raise ValueError(f"the planner's answer names no device: {text[:200]!r}")
    fields = dict(field.split("=") for field in device[1].split())
    properties: dict[str, Any] = {name: float(value) for name, value in fields.items() if name != "clusters"}
    for name in ("compute_capability", "num_sms", "l2_bytes", "shared_memory_per_block"):
        properties[name] = int(fields[name])
    properties["clusters"] = [int(count) for count in fields["clusters"].split(",")]
    candidates = [
        Candidate(name, plan, int(tokens), float(us))
        for name, plan, tokens, us in re.findall(
            r"^candidate (\S+) (.*?tile (\d+) tokens.*estimated ([\d.]+) us)$", text, re.MULTILINE
        )
    ]
    return properties, candidates


def ask_candidates(
    num_tokens: int,
    out_features: int,
    in_features: int,
    group_size: int,
    device: str,
    constant_weights: bool = False,
    standalone: bool = False,
) -> tuple[dict[str, Any], list[Candidate]]:
    """:func:`parse_candidate_list` of a problem on a GPU. Nothing is launched; the operands are never read.

    ``standalone``: of a whole layer between other kernels.
    """
    import torch

    import marlin_qqq
    from marlin_qqq.bench.implementations.marlin import overridden_environment

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    group_scale = (in_features // group_size, out_features) if group_size > 0 else (0,)
    weights = (
        empty(in_features // 16, 2 * out_features, dtype=torch.int32),
        empty(1, out_features, dtype=torch.float32),
        empty(*group_scale, dtype=torch.float16),
    )
    try:
        with overridden_environment({"MARLIN_QQQ_TILE": "list", "MARLIN_QQQ_STANDALONE": str(int(standalone))}):
            if standalone:
                x = empty(num_tokens, in_features, dtype=torch.float16)
                marlin_qqq.marlin_qqq_linear(x, *weights, constant_weights=constant_weights)
            else:
                marlin_qqq.marlin_qqq_gemm(
                    empty(num_tokens, in_features, dtype=torch.int8),
                    weights[0],
                    empty(num_tokens, 1, dtype=torch.float32),
                    *weights[1:],
                    marlin_qqq.make_workspace(out_features, device),
                    num_tokens,
                    out_features,
                    in_features,
                    constant_weights=constant_weights,
                )
    except (RuntimeError, ValueError) as answer:
        return parse_candidate_list(str(answer))
    raise RuntimeError("the op did not answer MARLIN_QQQ_TILE=list: its library is older than this program")


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


def tune_results(measurements: Sequence[Measurement]) -> list[TuneResult]:
    """For every problem the planner's choice against the fastest candidate measured beside it."""
    problems: dict[Any, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        if measurement.median_us and measurement.implementation.startswith(OURS):
            problems[measurement.problem_key, measurement.group_size].append(measurement)
    results = []
    for rows in problems.values():
        chosen = next((m for m in rows if m.implementation == OURS), None)
        if chosen is not None:
            results.append(TuneResult(chosen, min(rows, key=lambda m: m.median_us or float("inf"))))
    return results


def run_tune(
    runner: Runner, layers: Sequence[Layer], num_tokens: Sequence[int], group_sizes: Sequence[int], limit: int
) -> None:
    """Times the planner's own choice and its ``limit`` best candidates on every problem, into ``runner.run``."""
    from marlin_qqq.bench.implementations.marlin import MarlinGemm

    for layer in layers:
        for group_size in group_sizes:
            for tokens in num_tokens:
                _, candidates = ask_candidates(
                    tokens, layer.out_features, layer.in_features, group_size, runner.settings.device
                )
                variants = ["default", *(candidate.variant for candidate in candidates[:limit])]
                runner.products([layer], [tokens], [MarlinGemm(variant, group_size) for variant in variants])
