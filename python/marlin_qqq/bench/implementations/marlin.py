"""Our own op, in variants: ``constant_weights``, a forced kernel family, tile or split."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem
from marlin_qqq.bench.results import OURS

if TYPE_CHECKING:
    import torch

DEFAULT_VARIANT = "default"


@dataclass
class Variant:
    """How our op is called: arguments that differ from the run's, and environment variables for the planner."""

    constant_weights: bool = False
    with_bias: bool | None = None  # None: as the run
    output_dtype: str | None = None  # None: as the run
    environment: dict[str, str] = field(default_factory=dict)


def parse_variant(text: str) -> Variant:
    """``"constant+tile:NAME"`` as a Variant.

    Parts, joined by ``+``: ``default``, ``constant`` (constant_weights=True, as the linear layer calls the op),
    ``standalone`` (planned for a launch between other kernels, whatever comes before), ``bias``, ``bf16`` (output
    type), ``sm80`` or ``sm90`` (the kernel family), ``tile:NAME`` (a tile, or one candidate of the planner:
    "deep256/1x3/2"), ``split:COUNT``. Raises ValueError for anything else.
    """
    variant = Variant()
    for part in text.split("+"):
        key, _, value = part.strip().partition(":")
        if key == DEFAULT_VARIANT and not value:
            continue
        if key == "constant" and not value:
            variant.constant_weights = True
        elif key == "standalone" and not value:
            variant.environment["MARLIN_QQQ_STANDALONE"] = "1"
        elif key == "bias" and not value:
            variant.with_bias = True
        elif key == "bf16" and not value:
            variant.output_dtype = "bfloat16"
        elif key in ("sm80", "sm90") and not value:
            variant.environment["MARLIN_QQQ_FAMILY"] = key
        elif key == "tile" and value:
            variant.environment["MARLIN_QQQ_TILE"] = value
        elif key == "split" and value.isdigit():
            variant.environment["MARLIN_QQQ_SPLIT"] = value
        else:
            raise ValueError(
                f"unknown variant {text!r}; parts, joined by '+': default, constant, standalone, bias, bf16, sm80, "
                "sm90, tile:NAME, split:COUNT"
            )
    return variant


@contextlib.contextmanager
def overridden_environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for a stretch of code and puts the old values back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class MarlinGemm(Implementation):
    """``torch.ops.marlin_qqq.marlin_qqq_gemm``, called directly with arguments made beforehand."""

    def __init__(self, variant: str, group_size: int) -> None:
        self.variant = parse_variant(variant)
        self.environment = self.variant.environment
        self.name = OURS if variant == DEFAULT_VARIANT else f"{OURS}:{variant}"
        self.group_size: int = group_size

    def overridden(self, launch: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        """The launch under the variant's environment."""
        if not self.environment:
            return launch

        def overridden_launch(index: int) -> torch.Tensor:
            with overridden_environment(self.environment):
                return launch(index)

        return overridden_launch

    def available(self, context: Context) -> None:
        import marlin_qqq.ops  # noqa: F401  registers the ops
        from marlin_qqq import _library

        if context.device.startswith("cuda") and _library.cuda_unavailable_reason is not None:
            raise Unavailable(_library.cuda_unavailable_reason)

    def load(self, problem: GemmProblem, context: Context) -> None:
        context.packed_weights(self.with_group(problem))

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        import marlin_qqq

        problem = self.with_group(problem)
        weights = context.packed_weights(problem)
        output_dtype = getattr(torch, self.variant.output_dtype) if self.variant.output_dtype else context.dtype
        bias = context.bias(problem.out_features, output_dtype, self.variant.with_bias)
        workspace = marlin_qqq.make_workspace(problem.out_features, context.device)
        op = torch.ops.marlin_qqq.marlin_qqq_gemm.default
        arguments = [
            (
                activations.quantized[index % activations.copies],
                weights.packed[index % weights.copies],
                activations.token_scale[index % activations.copies],
                weights.channel_scale[index % weights.copies],
                weights.group_scale[index % weights.copies],
                workspace,
                problem.num_tokens,
                problem.out_features,
                problem.in_features,
            )
            for index in range(weights.copies * activations.copies)
        ]
        keywords = {"bias": bias, "out_dtype": output_dtype, "constant_weights": self.variant.constant_weights}

        def run(index: int) -> torch.Tensor:
            return op(*arguments[index % len(arguments)], **keywords)

        launch = self.overridden(run)
        try:
            launch(0)
        except (RuntimeError, ValueError) as error:
            if not self.environment:
                raise
            raise Unavailable(str(error).splitlines()[0]) from None
        reference = context.reference(problem, activations, output_dtype, bias)
        return Bound(
            launch=launch,
            check=reference.compare,
            bytes_moved=problem.bytes_moved,
            operations=problem.operations,
            extra=_plan_of(problem, self.variant, context) if not self.environment else {},
        )


def _plan_of(problem: GemmProblem, variant: Variant, context: Context) -> dict[str, str]:
    """The planner's choice as text, where the planner knows the device's architecture."""
    if not context.device.startswith("cuda"):
        return {}
    import torch

    import marlin_qqq

    major, minor = torch.cuda.get_device_capability(context.device)
    try:
        plan = marlin_qqq.plan(
            problem.num_tokens,
            problem.out_features,
            problem.in_features,
            problem.group_size,
            f"sm_{major}{minor}",
            constant_weights=variant.constant_weights,
        )
    except (ImportError, RuntimeError, ValueError):  # no introspection in this build, or another architecture
        return {}
    return {"plan": str(plan)}
