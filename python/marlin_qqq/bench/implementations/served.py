"""Launches as a served model makes them: each behind a kernel that is none of ours.

In a row of our launches one begins while the one before ends. In a model a norm, attention or an activation function
stands between them, most of which let nothing start early: a layer then has the device to itself, and the planner,
which a captured graph tells what comes before, chooses for that (docs/kernel-sm90.md, "Between other kernels").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from marlin_qqq.bench.implementations.base import Bound, Context, Implementation
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch


def write_activations(activations: Activations) -> Callable[[int], torch.Tensor]:
    """A kernel of torch's that writes the activations of a launch, with the values that they have."""

    def launch(index: int) -> torch.Tensor:
        return activations.x[index % activations.copies].mul_(1)

    return launch


class Served(Implementation):
    """Another implementation, each launch behind a kernel of torch's that writes its activations. Timed are both."""

    def __init__(self, inner: Implementation) -> None:
        self.inner = inner
        self.name = f"{inner.name}:served"
        self.group_size = inner.group_size

    def available(self, context: Context) -> None:
        self.inner.available(context)

    def load(self, problem: GemmProblem, context: Context) -> None:
        self.inner.load(problem, context)

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        bound = self.inner.bind(problem, activations, context)
        between = write_activations(activations)

        def launch(index: int) -> torch.Tensor:
            between(index)
            return bound.launch(index)

        return replace(bound, launch=launch)

    def unload(self) -> None:
        self.inner.unload()


class KernelBetween(Implementation):
    """That kernel alone: what to subtract from :class:`Served`."""

    name = "between"

    def load(self, problem: GemmProblem, context: Context) -> None:
        pass

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        before = activations.x[0].clone()

        def check(output: torch.Tensor) -> str:
            return "exact (values as before)" if torch.equal(output, before) else "WRONG: it changed the activations"

        bytes_moved = 2 * before.numel() * before.element_size()
        return Bound(write_activations(activations), check, bytes_moved, operations=before.numel())
