"""The ops have no gradient: a backward pass that reaches one is an error, not a gradient that is silently missing.

torch's own answer for an op without an autograd kernel is a warning and no gradient. An autograd kernel in Python would
cost every call some microseconds, also where nothing wants a gradient; so the functions of ops.py look first, and only
a call with an input that requires one takes the way through here. The forward pass of such a call works: a frozen model
whose embeddings still require gradients may be run without ``torch.no_grad()``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _library  # noqa: F401  defines the ops

# The error is an op, so that a compiled graph raises it when its backward pass runs, and not when it is traced.
_definitions = torch.library.Library("marlin_qqq", "FRAGMENT")
_definitions.define("refuse_gradient(Tensor gradient, SymInt[] size, ScalarType dtype, str op) -> Tensor")


def _refuse(gradient: Tensor, size: list[int], dtype: torch.dtype, op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op} has no gradient: it is for inference. Run the forward pass under torch.inference_mode() or "
        "torch.no_grad(), or detach what comes out of it"
    )


_definitions.impl("refuse_gradient", _refuse, "CompositeExplicitAutograd")


@torch.library.register_fake("marlin_qqq::refuse_gradient", lib=_definitions)
def _refuse_fake(gradient: Tensor, size: list[int], dtype: torch.dtype, op: str) -> Tensor:
    return gradient.new_empty(size, dtype=dtype)


class _WithoutGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, options: dict[str, Any], bias: Tensor | None, *arguments: Any) -> Any:
        if bias is not None:
            options = {**options, "bias": bias}
        return getattr(torch.ops.marlin_qqq, op)(*arguments, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]
        ctx.kinds = [(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in inputs]
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(output[0])  # the int8 of quantize_per_token

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(
            torch.ops.marlin_qqq.refuse_gradient(gradients[-1], *kind, ctx.op) if needed and kind is not None else None
            for needed, kind in zip(ctx.needs_input_grad, ctx.kinds, strict=True)
        )


def require_gradient(*inputs: Tensor | None) -> bool:
    """Whether torch would record a gradient of one of the inputs; None has none."""
    for tensor in inputs:  # noqa: SIM110  any() and its generator cost half a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def call(op: str, *arguments: Any, bias: Tensor | None = None, **options: Any) -> Any:
    """``torch.ops.marlin_qqq``'s op of that name, as a node whose backward pass raises NotImplementedError."""
    return _WithoutGradient.apply(op, options, bias, *arguments)
