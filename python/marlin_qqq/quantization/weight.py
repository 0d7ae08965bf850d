"""From codes and scales to a QQQWeight and back, and the range that the kernels rely on.

Formulas: docs/format.md, "Quantising weights". Scales are computed in fp32, never in fp16: a fp16
scale of a small weight is a subnormal with a few bits left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_qqq.packing import (
    GROUP_SIZE,
    PER_CHANNEL,
    TILE_IN_FEATURES,
    TILE_OUT_FEATURES,
    QQQWeight,
    check_group_size,
    pack_weight,
    permute_channel_scale,
    permute_group_scale,
    unpack_weight,
    unpermute_channel_scale,
    unpermute_group_scale,
)

# The largest int8 weight that a group scale aims at.
INT8_MAX = 127.0
# Products q * s_group that every implementation rounds to int8 exactly, upstream's fp16 arithmetic included; further
# out the byte wraps around, to another value in upstream's kernels than in ours (docs/format.md).
PRODUCT_MIN = -128.25  # inclusive
PRODUCT_MAX = 127.5  # exclusive
# Codes of the per-channel mode are 4-bit; its int8 weight is 16 times the code.
PER_CHANNEL_FACTOR = 16.0


def assemble(codes: Tensor, scale: Tensor, group_size: int) -> QQQWeight:
    """Packs codes and splits their scale into the format's channel and group scales.

    Args:
        codes: int8 ``[K, N]`` in [-8, 7].
        scale: fp32 ``[1, N]`` (per-channel) or ``[K/128, N]`` (per-group), so that the weight is ``codes * scale``.
        group_size: 128 or -1.

    Returns:
        The weight. Per-channel: ``s_channel = scale / 16``. Per-group: ``s_channel = max_k |codes * scale| / 127`` and
        ``s_group = fp16(scale / s_channel)``; every product ``code * s_group`` is in the int8 range.

    Raises:
        ValueError: a scale is NaN or infinite, or the shapes disagree.

    A group whose codes are all zero gets the group scale 0, whatever its scale was (in a foreign checkpoint it may be
    too large for fp16); a channel of such groups gets the channel scale 0, and so does one whose channel scale would be
    a subnormal (weights below about 1e-36), because the quotient of subnormals could leave the int8 range.
    """
    grouped = check_group_size(group_size) == GROUP_SIZE
    in_features, out_features = codes.shape
    expected = (in_features // GROUP_SIZE if grouped else 1, out_features)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale has shape {list(scale.shape)}; codes {list(codes.shape)} need {list(expected)}")
    scale = scale.float()
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"scale holds {int((~torch.isfinite(scale)).sum())} NaN or infinite values; all must be finite"
        )
    if not grouped:
        channel_scale = permute_channel_scale(scale / PER_CHANNEL_FACTOR)
        return QQQWeight(pack_weight(codes, group_size), channel_scale, scale.new_empty(0, dtype=torch.float16))

    largest_code = codes.view(-1, GROUP_SIZE, out_features).abs().amax(1)
    channel_scale = (largest_code * scale).abs().amax(0, keepdim=True) / INT8_MAX
    if not torch.isfinite(channel_scale).all():
        raise ValueError("codes * scale leaves the range of fp32; the weight is too large to be quantised")
    alive = channel_scale >= torch.finfo(torch.float32).tiny
    channel_scale = torch.where(alive, channel_scale, 0.0)
    group_scale = torch.where(alive & (largest_code > 0), scale / torch.where(alive, channel_scale, 1.0), 0.0)
    if not alive.all():
        codes = torch.where(alive, codes, 0)
    return QQQWeight(
        pack_weight(codes, group_size),
        permute_channel_scale(channel_scale),
        permute_group_scale(group_scale.to(torch.float16)),
    )


def int8_weight(weight: QQQWeight) -> Tensor:
    """The int8 weight that the kernels multiply with.

    Args:
        weight: a packed weight.

    Returns:
        int8 ``[K, N]``: ``16 * q`` per-channel, ``round_half_even(q * s_group)`` modulo 256 per-group. The output of
        ``marlin_qqq_gemm`` is the integer product with it, times the channel scale, times the token scale.

    Example:
        >>> accumulator = a.long() @ int8_weight(weight).long()
    """
    return _int8_values(weight).to(torch.int8)


def _int8_values(weight: QQQWeight) -> Tensor:
    """:func:`int8_weight` in fp32, so that a NaN scale stays visible."""
    codes = unpack_weight(weight.B, weight.group_size).float()
    if weight.group_size == PER_CHANNEL:
        return codes.mul_(PER_CHANNEL_FACTOR)
    group_scale = unpermute_group_scale(weight.s_group).float()
    # fp32 holds code * scale exactly (4 and 11 bits), so one rounding happens.
    rounded = codes.view(-1, GROUP_SIZE, codes.shape[1]).mul_(group_scale[:, None]).round_()
    # Integers below 2^24 in magnitude: the wrap is exact too.
    return (rounded - 256 * torch.floor((rounded + 128) / 256)).view_as(codes)


def dequantize_weight(weight: QQQWeight) -> Tensor:
    """The real-valued weight that a QQQWeight stands for.

    Args:
        weight: a packed weight, on any device.

    Returns:
        fp32 ``[N, K]``: the int8 weight of :func:`int8_weight` times the channel scale, transposed to the layout of
        ``torch.nn.Linear.weight``.

    Raises:
        ValueError, RuntimeError: tensors that do not form a QQQWeight.

    Example:
        >>> weight = torch.randn(256, 512)
        >>> error = marlin_qqq.dequantize_weight(marlin_qqq.quantize_weight(weight, group_size=128)) - weight
    """
    weight = QQQWeight(*weight)
    check_weight(weight)
    return (_int8_values(weight) * unpermute_channel_scale(weight.s_channel)).t().contiguous()


def check_weight(weight: QQQWeight, name: str = "weight") -> None:
    """Checks that three tensors form a QQQWeight: dtypes, shapes, devices.

    Args:
        weight: the tensors; contents are not looked at.
        name: what messages call it, e.g. the layer's name.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a rank, shape or device is wrong.
    """
    for key, tensor, dtype in zip(weight._fields, weight, (torch.int32, torch.float32, torch.float16), strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {key} is {tensor.dtype}; it must be {dtype}")
        if tensor.device != weight.B.device:
            raise ValueError(f"{name}: {key} is on {tensor.device}, B on {weight.B.device}; they must be on one device")
    if weight.B.dim() != 2 or weight.B.shape[1] % (2 * TILE_OUT_FEATURES) or not weight.B.numel():
        raise ValueError(
            f"{name}: B has shape {list(weight.B.shape)}; it must be [K / {TILE_IN_FEATURES}, 2 * N], "
            f"N a multiple of {TILE_OUT_FEATURES}"
        )
    if tuple(weight.s_channel.shape) != (1, weight.out_features):
        raise ValueError(
            f"{name}: s_channel has shape {list(weight.s_channel.shape)}; B needs [1, {weight.out_features}]"
        )
    if weight.group_size == GROUP_SIZE:
        groups, rest = divmod(weight.in_features, GROUP_SIZE)
        if rest or tuple(weight.s_group.shape) != (groups, weight.out_features):
            raise ValueError(
                f"{name}: s_group has shape {list(weight.s_group.shape)}; B with K = {weight.in_features} needs "
                f"[K / {GROUP_SIZE}, {weight.out_features}] with K a multiple of {GROUP_SIZE}, or [0] for per-channel"
            )


def check_and_repair(weight: QQQWeight, name: str = "weight") -> tuple[QQQWeight, list[int]]:
    """Checks the scales of a packed weight and repairs the columns whose int8 weight would wrap around.

    The kernels need ``-128.25 <= q * s_group < 127.5`` and spend nothing on checking it. A column that leaves the range
    (some converters take the channel scale from the weights before quantisation) is repaired by moving the excess into
    the channel scale: with ``c = max|q * s_group| / 127``, ``s_channel *= c`` and ``s_group = fp16(s_group / c)``.

    Args:
        weight: a packed weight; not modified.
        name: what messages call it, e.g. the layer's name.

    Returns:
        The weight (the same tensors when nothing was repaired) and the repaired output columns, ascending, in natural
        order. Per-channel weights are always in range.

    Raises:
        TypeError, ValueError: the tensors do not form a QQQWeight, or a scale is NaN or infinite.

    Example:
        >>> weight, repaired = marlin_qqq.check_and_repair(weight, "model.layers.0.mlp.down_proj")
        >>> print(f"{len(repaired)} columns repaired")
    """
    weight = QQQWeight(*weight)
    check_weight(weight, name)
    for key in ("s_channel", "s_group"):
        bad = int((~torch.isfinite(getattr(weight, key))).sum())
        if bad:
            raise ValueError(f"{name}: {key} holds {bad} NaN or infinite values; all must be finite")
    if weight.group_size == PER_CHANNEL:
        return weight, []

    low, high = _product_range(weight)
    out_of_range = (low < PRODUCT_MIN) | (high >= PRODUCT_MAX)
    if not out_of_range.any():
        return weight, []
    excess = torch.where(out_of_range, torch.maximum(-low, high) / INT8_MAX, 1.0)
    channel_scale = unpermute_channel_scale(weight.s_channel) * excess
    group_scale = (unpermute_group_scale(weight.s_group).float() / excess).to(torch.float16)
    if not torch.isfinite(channel_scale).all():
        raise ValueError(f"{name}: s_channel leaves fp32 when the range of the int8 weight is repaired")
    repaired = QQQWeight(weight.B, permute_channel_scale(channel_scale), permute_group_scale(group_scale))
    return repaired, torch.nonzero(out_of_range).flatten().tolist()


def _product_range(weight: QQQWeight) -> tuple[Tensor, Tensor]:
    """Smallest and largest ``q * s_group`` of every column: fp32 ``[N]`` each, exact, natural order."""
    codes = unpack_weight(weight.B, GROUP_SIZE).view(-1, GROUP_SIZE, weight.out_features)
    group_scale = unpermute_group_scale(weight.s_group).float()
    ends = torch.stack([codes.amin(1) * group_scale, codes.amax(1) * group_scale])
    return ends.amin((0, 1)), ends.amax((0, 1))
