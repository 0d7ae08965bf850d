"""The interface between what is timed and how it is timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.check import Reference, gemm_reference
from marlin_qqq.bench.inputs import Activations, PackedWeights, make_generator, make_packed_weights
from marlin_qqq.bench.problem import GemmProblem
from marlin_qqq.bench.timing import num_copies

if TYPE_CHECKING:
    import torch


class Unavailable(Exception):
    """An implementation cannot run here or cannot run this problem; the message is the reason shown in its column."""


@dataclass
class Bound:
    """An implementation bound to one problem, ready to be checked and timed."""

    launch: Callable[[int], Any]  # enqueues the i-th launch; the copies rotate inside
    check: Callable[[Any], str]  # the output of launch 0 -> "exact (...)", "close (...)" or "WRONG: ..."
    bytes_moved: int
    operations: int
    exact: bool = True  # repeated launches must give equal bits
    extra: dict[str, Any] = field(default_factory=dict)


class Context:
    """What the implementations of one run share: the device, the output type, and data that several of them use."""

    def __init__(self, device: str, dtype: torch.dtype, l2_bytes: int, seed: int = 0, with_bias: bool = False) -> None:
        self.device = device
        self.dtype = dtype
        self.l2_bytes = l2_bytes
        self.with_bias = with_bias
        self.generator = make_generator(device, seed)
        self._weights: dict[tuple[int, int, int], PackedWeights] = {}
        self._bias: dict[int, torch.Tensor] = {}
        self._references: dict[Any, tuple[Activations, Reference]] = {}
        self.extra_activations: dict[tuple[int, int], Activations] = {}  # of widths other than the problem's

    def copies(self, bytes_per_copy: int) -> int:
        return num_copies(bytes_per_copy, self.l2_bytes)

    def packed_weights(self, problem: GemmProblem) -> PackedWeights:
        """Copies of packed weights of the problem's shape and mode; made once, shared by our variants."""
        key = (problem.out_features, problem.in_features, problem.group_size)
        if key not in self._weights:
            copies = self.copies(problem.packed_weight_bytes)
            self._weights[key] = make_packed_weights(problem, copies, self.device, self.generator)
        return self._weights[key]

    def bias(
        self, out_features: int, dtype: torch.dtype | None = None, wanted: bool | None = None
    ) -> torch.Tensor | None:
        """The run's bias of the output's dtype, or None where there is none; ``wanted`` overrides the run's choice."""
        import torch

        if not (self.with_bias if wanted is None else wanted):
            return None
        if out_features not in self._bias:
            self._bias[out_features] = torch.randn(out_features, device=self.device, generator=self.generator)
        return self._bias[out_features].to(dtype or self.dtype)

    def reference(
        self,
        problem: GemmProblem,
        activations: Activations,
        dtype: torch.dtype | None = None,
        bias: torch.Tensor | None = None,
    ) -> Reference:
        """The exact output of the problem's first copies; computed once, shared by our variants."""
        dtype = dtype or self.dtype
        shape = (problem.num_tokens, problem.out_features, problem.in_features, problem.group_size)
        key = (shape, dtype, bias is None, id(activations))
        if key not in self._references:
            reference = gemm_reference(problem, activations, self.packed_weights(problem), dtype, bias, self.device)
            self._references[key] = (activations, reference)  # holding the activations keeps their id theirs
        return self._references[key][1]

    def forget_batch(self) -> None:
        """Drops what belongs to one batch of activations."""
        self._references.clear()
        self.extra_activations.clear()

    def forget_shape(self) -> None:
        """Drops the weights of one shape."""
        self.forget_batch()
        self._weights.clear()
        self._bias.clear()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


class Implementation(ABC):
    """Something that computes the product. ``load`` once a shape, ``bind`` once a batch, ``unload`` when done."""

    name: str
    group_size: int | None = None

    def available(self, context: Context) -> None:  # noqa: B027  most can always run
        """Raises Unavailable when this implementation cannot run on the context's device at all."""

    @abstractmethod
    def load(self, problem: GemmProblem, context: Context) -> None:
        """Makes the weights of a shape (``problem.num_tokens`` does not matter)."""

    @abstractmethod
    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        """Makes everything a launch needs, so that a launch allocates nothing but its output."""

    def unload(self) -> None:  # noqa: B027  weights that the context owns are dropped there
        """Drops the weights."""

    def with_group(self, problem: GemmProblem) -> GemmProblem:
        """The problem in this implementation's group mode."""
        return replace(problem, group_size=self.group_size) if self.group_size is not None else problem
