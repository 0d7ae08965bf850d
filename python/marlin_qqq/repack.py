"""GPTQ int4 checkpoints to QQQ weights, without going through real numbers: the codes are kept, exactly.

GPTQ's layout, as AutoGPTQ and its successors write it: ``weight[k, n] = scales[g_idx[k], n] * (code[k, n] - zero)``;
``qweight`` holds eight codes of one output in an int32 (input ``8 i + j`` in bits ``4 j``), ``qzeros`` the zeros of
eight outputs. The format "gptq" (v1) stores the zero minus one, "gptq_v2" stores it as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from marlin_qqq.limits import check_in_features_limit
from marlin_qqq.packing import GROUP_SIZE, IN_FEATURES_MULTIPLE, OUT_FEATURES_MULTIPLE, PER_CHANNEL, QQQWeight
from marlin_qqq.quantization.weight import assemble

CheckpointFormat = Literal["gptq", "gptq_v2"]
# What is stored for a zero of 0.
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}
_BITS = 4
_CODES_PER_WORD = 32 // _BITS
# The zero of symmetric 4-bit quantisation: QQQ's codes are GPTQ's minus this.
_SYMMETRIC_ZERO = 8


def repack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = _BITS,
    group_size: int = GROUP_SIZE,
    checkpoint_format: CheckpointFormat = "gptq",
) -> QQQWeight:
    """Turns the tensors of a GPTQ layer into a QQQWeight.

    The codes are the same. Per-channel the weight is the same too; per-group the scale is split into the channel scale
    and a fp16 group scale and the int8 weight is rounded (docs/format.md, "Quantising weights").

    Args:
        qweight: int32 ``[K/8, N]``.
        qzeros: int32 ``[G, N/8]``, G = K/128 or 1.
        scales: fp16, bf16 or fp32 ``[G, N]``.
        g_idx: integer ``[K]``, the group of every input; None: the natural ``k // group_size``.
        bits: must be 4.
        group_size: GPTQ's, which must be 128 or -1 (all inputs of an output share a scale).
        checkpoint_format: "gptq" (AutoGPTQ and most checkpoints: the zero is stored minus one) or "gptq_v2".

    Returns:
        The packed weight on the device of ``qweight``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: another bit width or group size, sizes that disagree or are not N % 64 == 0, K % 128 == 0 and
            K < 132104, zeros that are not symmetric, act-order groups, or scales that are NaN or infinite.

    Example:
        >>> weight = marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=128)
    """
    if bits != _BITS:
        raise ValueError(f"bits is {bits}; QQQ weights have {_BITS} bits")
    if checkpoint_format not in _ZERO_OFFSET:
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}; allowed: 'gptq', 'gptq_v2'")
    if group_size not in (GROUP_SIZE, PER_CHANNEL):
        raise ValueError(
            f"group_size is {group_size}; QQQ has groups of {GROUP_SIZE}, or {PER_CHANNEL} for one scale a channel. "
            "Other groups cannot be kept: quantise the original weights with one of these"
        )
    in_features, out_features = _check_tensors(qweight, qzeros, scales)
    group = GROUP_SIZE if group_size == GROUP_SIZE else in_features
    num_groups = in_features // group
    for name, tensor, columns in (
        ("qzeros", qzeros, out_features // _CODES_PER_WORD),
        ("scales", scales, out_features),
    ):
        if tuple(tensor.shape) != (num_groups, columns):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; qweight {list(qweight.shape)} with group_size {group_size} "
                f"needs {[num_groups, columns]}"
            )
    _check_group_index(g_idx, in_features, group)
    _check_zeros(qzeros, checkpoint_format)
    codes = _unpack_words(qweight).transpose(1, 2).reshape(in_features, out_features) - _SYMMETRIC_ZERO
    return assemble(codes, scales.float(), group_size)


def _unpack_words(words: Tensor) -> Tensor:
    """The eight 4-bit fields of every word, lowest first: int32 ``[...]`` to int8 ``[..., 8]``."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8)


def _check_tensors(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[int, int]:
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have 2 dimensions")
        if name != "scales" and tensor.dtype != torch.int32:
            raise TypeError(f"{name} is {tensor.dtype}; it must be torch.int32")
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"scales is {scales.dtype}; it must be float16, bfloat16 or float32")
    in_features, out_features = qweight.shape[0] * _CODES_PER_WORD, qweight.shape[1]
    if (
        not in_features
        or in_features % IN_FEATURES_MULTIPLE
        or not out_features
        or out_features % OUT_FEATURES_MULTIPLE
    ):
        raise ValueError(
            f"qweight has shape {list(qweight.shape)}, so K = {in_features} and N = {out_features}; "
            f"K must be a positive multiple of {IN_FEATURES_MULTIPLE} and N of {OUT_FEATURES_MULTIPLE}"
        )
    check_in_features_limit(in_features, f"qweight has shape {list(qweight.shape)}, so K = {in_features}")
    return in_features, out_features


def _check_group_index(g_idx: Tensor | None, in_features: int, group: int) -> None:
    if g_idx is None or g_idx.numel() == 0:
        return
    if tuple(g_idx.shape) != (in_features,):
        raise ValueError(f"g_idx has shape {list(g_idx.shape)}; qweight needs [{in_features}]")
    natural = torch.arange(in_features, device=g_idx.device) // group
    if not torch.equal(g_idx.long(), natural):
        first = int(torch.nonzero(g_idx.long() != natural)[0])
        raise ValueError(
            f"g_idx puts input {first} in group {int(g_idx[first])} instead of {int(natural[first])}: the layer was "
            "quantised with act-order (desc_act) without static groups. QQQ has no group index at run time, an input's "
            f"group is k // {group}, so it cannot be kept; quantise the original weights again"
        )


def _check_zeros(qzeros: Tensor, checkpoint_format: CheckpointFormat) -> None:
    stored = _unpack_words(qzeros)
    expected = _SYMMETRIC_ZERO - _ZERO_OFFSET[checkpoint_format]
    wrong = stored != expected
    if not wrong.any():
        return
    for other, offset in _ZERO_OFFSET.items():
        if other != checkpoint_format and not (stored != _SYMMETRIC_ZERO - offset).any():
            raise ValueError(
                f"qzeros holds {_SYMMETRIC_ZERO - offset} everywhere, which is symmetric in the format {other!r}, not "
                f"in checkpoint_format {checkpoint_format!r}, where {expected} is; pass checkpoint_format={other!r}"
            )
    raise ValueError(
        f"qzeros holds {int(stored[wrong][0])} where symmetric quantisation has {expected} "
        f"(checkpoint_format {checkpoint_format!r}): asymmetric weights have no form in QQQ"
    )
