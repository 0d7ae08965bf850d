"""Packed QQQ weights: pack, unpack, permute scales, slice and concatenate.

The bit layout lives in C++ (``csrc/format``, drawn in ``docs/format.md``); every function here hands the work to an op
of the ``marlin_qqq`` library. Those ops run on the CPU: a tensor on another device is copied there and the result is
copied back, so packing works for tensors of any device; a meta tensor gives a meta tensor.

Shapes use N for ``out_features``, K for ``in_features``. ``group_size`` is 128 (one scale per output and 128 inputs) or
-1 (one scale per output).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401  loads the libraries that define torch.ops.marlin_qqq
from .limits import (  # noqa: F401  all of them: importers take them from here
    GROUP_SIZE,
    IN_FEATURES_MULTIPLE,
    OUT_FEATURES_MULTIPLE,
    PER_CHANNEL,
    TILE_IN_FEATURES,
    TILE_OUT_FEATURES,
    check_group_size,
)


class QQQWeight(NamedTuple):
    """A quantised weight, in the form that ``marlin_qqq_gemm`` and the checkpoints hold.

    Attributes:
        B: int32 ``[K/16, 2N]``, packed 4-bit codes.
        s_channel: fp32 ``[1, N]``, permuted. Per-channel: the true scale / 16. Per-group: the scale of the int8 weight.
        s_group: fp16 ``[K/128, N]``, permuted; shape ``[0]`` per-channel.

    Example:
        >>> weight = marlin_qqq.quantize_weight(torch.randn(256, 512), group_size=128)
        >>> weight.B.shape, weight.group_size, weight.in_features, weight.out_features
        (torch.Size([32, 512]), 128, 512, 256)
    """

    B: Tensor
    s_channel: Tensor
    s_group: Tensor

    @property
    def group_size(self) -> int:
        """128, or -1 when there are no group scales."""
        return GROUP_SIZE if self.s_group.numel() else PER_CHANNEL

    @property
    def in_features(self) -> int:
        return self.B.shape[0] * TILE_IN_FEATURES

    @property
    def out_features(self) -> int:
        return self.B.shape[1] // 2

    def to(self, device: torch.device | str) -> QQQWeight:
        """The same weight on another device."""
        return QQQWeight(self.B.to(device), self.s_channel.to(device), self.s_group.to(device))


def _on_cpu(op: torch._ops.OpOverload, tensor: Tensor, *arguments: int) -> Tensor:
    if tensor.is_meta:
        return op(tensor, *arguments)
    result: Tensor = op(tensor.cpu().contiguous(), *arguments)
    return result.to(tensor.device)


def pack_weight(codes: Tensor, group_size: int = PER_CHANNEL) -> Tensor:
    """Packs signed 4-bit codes.

    Args:
        codes: int8 ``[K, N]``, values in [-8, 7]; K a multiple of 16 (128 with ``group_size=128``), N of 64.
        group_size: 128 or -1. The two modes have different bit layouts, and nothing in the result tells which it is.

    Returns:
        int32 ``[K/16, 2N]`` on the device of ``codes``.

    Raises:
        ValueError: ``group_size`` is not 128 or -1.
        RuntimeError: wrong dtype, rank or shape, or a code outside [-8, 7].

    Example:
        >>> codes = torch.randint(-8, 8, (128, 64), dtype=torch.int8)
        >>> B = marlin_qqq.pack_weight(codes, group_size=128)
        >>> torch.equal(marlin_qqq.unpack_weight(B, group_size=128), codes)
        True
    """
    return _on_cpu(torch.ops.marlin_qqq.pack_weight.default, codes, check_group_size(group_size))


def unpack_weight(packed: Tensor, group_size: int = PER_CHANNEL) -> Tensor:
    """The inverse of :func:`pack_weight`.

    Args:
        packed: int32 ``[K/16, 2N]``.
        group_size: the one it was packed with, 128 or -1.

    Returns:
        int8 ``[K, N]``, values in [-8, 7].

    Raises:
        ValueError: ``group_size`` is not 128 or -1.
        RuntimeError: wrong dtype, rank or shape.

    Example:
        >>> marlin_qqq.unpack_weight(torch.zeros(8, 128, dtype=torch.int32), group_size=-1).shape
        torch.Size([128, 64])
    """
    return _on_cpu(torch.ops.marlin_qqq.unpack_weight.default, packed, check_group_size(group_size))


def permute_group_scale(scale: Tensor) -> Tensor:
    """Group scales from natural column order to the stored order.

    Args:
        scale: any 2- or 4-byte dtype, ``[..., N]``, N a multiple of 64.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        RuntimeError: N is not a multiple of 64, or the dtype has another size.

    Example:
        >>> natural = torch.rand(4, 128).half()
        >>> stored = marlin_qqq.permute_group_scale(natural)
        >>> torch.equal(marlin_qqq.unpermute_group_scale(stored), natural)
        True
    """
    return _on_cpu(torch.ops.marlin_qqq.permute_group_scale.default, scale)


def unpermute_group_scale(scale: Tensor) -> Tensor:
    """Group scales from the stored order to natural column order: the inverse of :func:`permute_group_scale`."""
    return _on_cpu(torch.ops.marlin_qqq.unpermute_group_scale.default, scale)


def permute_channel_scale(scale: Tensor) -> Tensor:
    """Channel scales from natural column order to the stored order, which differs from the order of group scales.

    Args:
        scale: any 2- or 4-byte dtype, ``[..., N]``, N a multiple of 32.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        RuntimeError: N is not a multiple, or the dtype has another size.

    Example:
        >>> natural = torch.rand(1, 128)
        >>> torch.equal(marlin_qqq.unpermute_channel_scale(marlin_qqq.permute_channel_scale(natural)), natural)
        True
    """
    return _on_cpu(torch.ops.marlin_qqq.permute_channel_scale.default, scale)


def unpermute_channel_scale(scale: Tensor) -> Tensor:
    """Channel scales from the stored order to natural column order: the inverse of :func:`permute_channel_scale`."""
    return _on_cpu(torch.ops.marlin_qqq.unpermute_channel_scale.default, scale)


def _check_cut(name: str, start: int, stop: int, size: int, multiple: int) -> None:
    if not 0 <= start < stop <= size:
        raise ValueError(f"{name} [{start}, {stop}) is empty or leaves the weight's [0, {size})")
    if start % multiple or stop % multiple:
        raise ValueError(f"{name} [{start}, {stop}) cuts a tile; both ends must be multiples of {multiple}")


def slice_out_features(weight: QQQWeight, start: int, stop: int) -> QQQWeight:
    """Outputs ``start`` to ``stop`` of a packed weight, without unpacking (a column-parallel shard, a part of QKV).

    Args:
        weight: the packed weight.
        start, stop: multiples of 64 with ``0 <= start < stop <= N``.

    Returns:
        Views of the three tensors; ``.contiguous()`` them before they go to the op.

    Raises:
        ValueError: the ends are out of range or not multiples of 64.

    Example:
        >>> half = slice_out_features(weight, 0, weight.out_features // 2)
    """
    _check_cut("out_features", start, stop, weight.out_features, TILE_OUT_FEATURES)
    s_group = weight.s_group[:, start:stop] if weight.s_group.numel() else weight.s_group
    return QQQWeight(weight.B[:, 2 * start : 2 * stop], weight.s_channel[:, start:stop], s_group)


def slice_in_features(weight: QQQWeight, start: int, stop: int) -> QQQWeight:
    """Inputs ``start`` to ``stop`` of a packed weight, without unpacking (a row-parallel shard).

    The channel scales stay whole: the shards' products are summed before anything else happens to them.

    Args:
        weight: the packed weight.
        start, stop: with ``0 <= start < stop <= K``; multiples of 128 per group, of 16 per-channel (the op itself takes
            only K that is a multiple of 128).

    Raises:
        ValueError: the ends are out of range or cut a tile or a group.

    Example:
        >>> shard = slice_in_features(weight, 128, 256)
    """
    grouped = weight.group_size == GROUP_SIZE
    _check_cut("in_features", start, stop, weight.in_features, GROUP_SIZE if grouped else TILE_IN_FEATURES)
    s_group = weight.s_group[start // GROUP_SIZE : stop // GROUP_SIZE] if grouped else weight.s_group
    return QQQWeight(weight.B[start // TILE_IN_FEATURES : stop // TILE_IN_FEATURES], weight.s_channel, s_group)


def _check_same(name: str, values: Sequence[int]) -> None:
    if not values:
        raise ValueError("weights is empty; at least one packed weight is needed")
    if len(set(values)) != 1:
        raise ValueError(f"{name} of the weights are {list(values)}; they must agree")


def concat_out_features(weights: Sequence[QQQWeight]) -> QQQWeight:
    """Joins packed weights along the outputs, without unpacking (fused QKV, gate and up).

    Args:
        weights: one or more packed weights with the same K and group_size.

    Raises:
        ValueError: no weights, or K or group_size differ.

    Example:
        >>> fused = concat_out_features([query, key, value])
    """
    _check_same("in_features", [weight.in_features for weight in weights])
    _check_same("group_size", [weight.group_size for weight in weights])
    grouped = weights[0].group_size == GROUP_SIZE
    return QQQWeight(
        torch.cat([weight.B for weight in weights], dim=1),
        torch.cat([weight.s_channel for weight in weights], dim=1),
        torch.cat([weight.s_group for weight in weights], dim=1) if grouped else weights[0].s_group,
    )


def concat_in_features(weights: Sequence[QQQWeight]) -> QQQWeight:
    """Joins packed weights along the inputs, without unpacking: the inverse of cutting with :func:`slice_in_features`.

    Args:
        weights: one or more packed weights with the same N, group_size and channel scales.

    Raises:
        ValueError: no weights, or N, group_size or the channel scales differ (an output has one channel scale, so
            weights that were quantised separately cannot be joined along the inputs).

    Example:
        >>> whole = concat_in_features([slice_in_features(weight, 0, 128), slice_in_features(weight, 128, 256)])
    """
    _check_same("out_features", [weight.out_features for weight in weights])
    _check_same("group_size", [weight.group_size for weight in weights])
    first = weights[0]
    for index, weight in enumerate(weights):
        if not torch.equal(weight.s_channel, first.s_channel):
            raise ValueError(
                f"s_channel of weights[{index}] differs from weights[0]'s; one output has one channel scale"
            )
    s_group = torch.cat([weight.s_group for weight in weights]) if first.group_size == GROUP_SIZE else first.s_group
    return QQQWeight(torch.cat([weight.B for weight in weights]), first.s_channel, s_group)
