"""The run-time ops: loads them and documents them as Python functions.

``torch.ops.marlin_qqq.*`` are the ops themselves; the functions here only forward to them. What the numbers are, to
the bit: docs/format.md. For inference: none has a gradient, and a backward pass that reaches one of the functions
raises NotImplementedError (one that reaches an op of ``torch.ops`` itself gets torch's warning and no gradient).

Environment variables that force a CUDA kernel's tile, read on every call: ``MARLIN_QQQ_TILE`` (a name from
:func:`marlin_qqq.tile_table`, or a plan's ``name``), ``MARLIN_QQQ_SPLIT`` (blocks that share an output tile),
``MARLIN_QQQ_FAMILY`` (``sm80`` or ``sm90``), ``MARLIN_QQQ_CANDIDATE`` (from 0: one of the planner's candidates, best
first). None of them changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from . import _fakes, _library, _no_gradient  # noqa: F401  the fakes for their effect
from .limits import OUT_FEATURES_MULTIPLE, check_integer, workspace_size

__all__ = ["make_workspace", "marlin_qqq_gemm", "marlin_qqq_linear", "quantize_per_token"]


# Without our CUDA kernels a CUDA tensor would get the dispatcher's page of text; say what is missing instead.
if _library.cuda_unavailable_reason is not None:

    def _no_cuda(*_args, **_kwargs) -> NoReturn:
        raise RuntimeError(f"marlin_qqq: CUDA tensors need the CUDA kernels, but {_library.cuda_unavailable_reason}")

    _cuda_implementations = torch.library.Library("marlin_qqq", "IMPL")
    for _name in ("marlin_qqq_gemm", "quantize_per_token", "marlin_qqq_linear"):
        _cuda_implementations.impl(_name, _no_cuda, "CUDA")


def marlin_qqq_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    s_tok: Tensor,
    s_ch: Tensor,
    s_group: Tensor,
    workspace: Tensor,
    size_m: int,
    size_n: int,
    size_k: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
) -> Tensor:
    """The product of int8 activations and packed 4-bit weights, in the QQQ format.

    With ``W8`` the weights as int8 (per-channel ``16 * code``, per-group ``round_half_even(code * s_group)``)::

        out[m, n] = round(fp32(fp32(sum_k a[m, k] * W8[k, n]) * s_ch[n]) * s_tok[m] [+ bias[n]])

    The sum is exact (int32), the epilogue is fp32 with one rounding to the output's type: every device, kernel and
    batch size gives the same bits. Nothing waits for the GPU; CUDA graphs may capture it; the current stream is used.
    The sum holds for ``|a| <= 127``, all that :func:`quantize_per_token` gives; with -128 in ``a`` up to 130944
    ``in_features``, beyond which a sum of -128 times -128 nearly everywhere could wrap (docs/format.md).

    The first nine arguments are those of the op that vLLM had built in under this name.

    Args:
        a: int8 ``[num_tokens, in_features]``, contiguous; ``in_features`` a multiple of 128 and below 132104. Any
            ``num_tokens`` from 0 up.
        b_q_weight: int32 ``[in_features / 16, 2 * out_features]`` from :func:`marlin_qqq.pack_weight`;
            ``out_features`` a multiple of 64.
        s_tok: fp32, ``num_tokens`` values: one scale a row of ``a``.
        s_ch: fp32, ``out_features`` values in stored order (:func:`marlin_qqq.permute_channel_scale`).
        s_group: fp16 ``[in_features / 128, out_features]`` in stored order (:func:`marlin_qqq.permute_group_scale`)
            for group size 128; a tensor without values for per-channel weights. ``|code * s_group| <= 127`` is the
            caller's to ensure (:func:`marlin_qqq.check_and_repair`).
        workspace: int32, at least ``out_features / 64 * 16`` zeros (:func:`make_workspace`). These kernels do not use
            it, so streams may share one.
        size_m: ``num_tokens``.
        size_n: ``out_features``.
        size_k: ``in_features``.
        bias: ``out_features`` values of the output's dtype in natural order, added in fp32 before the rounding.
        out_dtype: ``torch.float16`` (None means the same) or ``torch.bfloat16``.
        constant_weights: promises that no kernel still running writes the weights, scales or bias, so that a CUDA
            kernel may fetch them before the kernel ahead of it has finished. Leave it False when in doubt.

    All tensors are on one device, and all but ``workspace`` contiguous. On CUDA all but ``s_tok`` and ``workspace``
    must start at a multiple of 16 bytes. A tensor that is not so is refused, not copied.

    No gradient: a backward pass that reaches the call raises NotImplementedError.

    Returns:
        ``[num_tokens, out_features]`` of ``out_dtype``.

    Raises:
        RuntimeError: an argument is not as above; the message names it, its value and what is allowed.

    Example:
        >>> import torch, marlin_qqq
        >>> weight = torch.randn(256, 128)                                  # [out_features, in_features]
        >>> packed = marlin_qqq.quantize_weight(weight, group_size=128)
        >>> a, s_tok = marlin_qqq.quantize_per_token(torch.randn(3, 128))
        >>> workspace = marlin_qqq.make_workspace(256, "cpu")
        >>> weights = packed.B, s_tok, packed.s_channel, packed.s_group
        >>> marlin_qqq.marlin_qqq_gemm(a, *weights, workspace, 3, 256, 128).shape
        torch.Size([3, 256])
    """
    op: Callable[..., Tensor] = torch.ops.marlin_qqq.marlin_qqq_gemm
    if torch.is_grad_enabled() and _no_gradient.require_gradient(s_tok, s_ch, s_group, bias):
        op = partial(_no_gradient.call, "marlin_qqq_gemm")
    return op(
        a,
        b_q_weight,
        s_tok,
        s_ch,
        s_group,
        workspace,
        size_m,
        size_n,
        size_k,
        bias=bias,
        out_dtype=out_dtype,
        constant_weights=constant_weights,
    )


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to int8 with one fp32 scale each, symmetric: ``x`` is about ``quantized * scale``.

    ``scale = amax / 127`` and ``quantized = round_half_even(x * (127 / amax))`` with ``amax = max |row|``, all in
    fp32: the same bits on CPU and GPU. A row of zeros (or so small that ``127 / amax`` is not finite) gives zeros and
    scale 0; a row that holds a NaN or an infinity gives zeros and scale NaN, which makes the product's row NaN. This
    is what callers know as vLLM's ``scaled_int8_quant(x)``.

    Args:
        x: fp16, bf16 or fp32 ``[..., in_features]``, at least 1-D. Rows may lie apart; a layout that is not evenly
            spaced rows is copied first.

    No gradient: a backward pass that reaches the call raises NotImplementedError.

    Returns:
        ``(quantized, scale)``: int8 of ``x``'s shape, contiguous, and fp32 ``[..., 1]``.

    Raises:
        RuntimeError: ``x`` has another dtype or no dimension.

    Example:
        >>> quantized, scale = marlin_qqq.quantize_per_token(torch.tensor([[1.0, -2.0]]))
        >>> quantized
        tensor([[  64, -127]], dtype=torch.int8)
    """
    if x is None:  # no tensor, so no backend: torch would print its table of backends
        raise RuntimeError("quantize_per_token: x must be a tensor, got None")
    if torch.is_grad_enabled() and _no_gradient.require_gradient(x):
        return _no_gradient.call("quantize_per_token", x)
    return torch.ops.marlin_qqq.quantize_per_token(x)


def marlin_qqq_linear(
    x: Tensor,
    b_q_weight: Tensor,
    s_ch: Tensor,
    s_group: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    constant_weights: bool = False,
) -> Tensor:
    """:func:`quantize_per_token`, then :func:`marlin_qqq_gemm`: what a linear layer does, in one call.

    The result is that of the two ops, to the bit. On a GPU one call costs the host less than two; and for few tokens
    (up to 16,384 values, four tokens of 4,096 features) a Hopper kernel may quantise the activations itself, which
    saves the launch and the hand-over between two kernels. The planner decides:
    ``marlin_qqq.plan(..., quantizes=True)``.

    Args:
        x: fp16, bf16 or fp32 ``[..., in_features]``, at least 1-D; ``in_features`` a multiple of 128 and below 132104.
            Rows may lie apart; a layout that is not evenly spaced rows is copied first.
        b_q_weight, s_ch, s_group: the packed weight, as :func:`marlin_qqq_gemm` takes it.
        bias: ``out_features`` values of the output's dtype in natural order, added in fp32 before the rounding.
        out_dtype: ``torch.float16`` or ``torch.bfloat16``; None: the dtype of ``x``, and fp16 for fp32.
        constant_weights: as in :func:`marlin_qqq_gemm`.

    No gradient: a backward pass that reaches the call raises NotImplementedError.

    Returns:
        ``[..., out_features]`` of ``out_dtype``, contiguous.

    Raises:
        RuntimeError: an argument is not as above; the message names it, its value and what is allowed.

    Example:
        >>> import torch, marlin_qqq
        >>> packed = marlin_qqq.quantize_weight(torch.randn(256, 128), group_size=128)
        >>> marlin_qqq.marlin_qqq_linear(torch.randn(2, 3, 128), *packed).shape
        torch.Size([2, 3, 256])
    """
    op: Callable[..., Tensor] = torch.ops.marlin_qqq.marlin_qqq_linear
    if torch.is_grad_enabled() and _no_gradient.require_gradient(x, s_ch, s_group, bias):
        op = partial(_no_gradient.call, "marlin_qqq_linear")
    return op(x, b_q_weight, s_ch, s_group, bias=bias, out_dtype=out_dtype, constant_weights=constant_weights)


def make_workspace(out_features: int, device: torch.device | str) -> Tensor:
    """The ``workspace`` argument of :func:`marlin_qqq_gemm`: ``out_features / 64 * 16`` int32 zeros.

    One is enough for a device: take the widest layer's. It is zero again after every call.

    Raises:
        TypeError: ``out_features`` is not an integer.
        ValueError: it is not a positive multiple of 64.

    Example:
        >>> marlin_qqq.make_workspace(256, "cpu").shape
        torch.Size([64])
    """
    check_integer("out_features", out_features)
    if out_features <= 0 or out_features % OUT_FEATURES_MULTIPLE != 0:
        raise ValueError(f"make_workspace: out_features must be a positive multiple of 64, got {out_features}")
    return torch.zeros(workspace_size(out_features), dtype=torch.int32, device=device)
