"""Round to nearest: the scale from the largest weight, or from a search that clips it for less squared error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from marlin_qqq.packing import GROUP_SIZE

# Rows are quantised in chunks of about this many weights, so that temporaries stay in the cache.
_CHUNK_WEIGHTS = 1 << 18
# Clip search: scales of this many ratios between the full range and the smallest ratio are compared. Normally
# distributed weights lose least at about 0.6 (4096 inputs a scale) to 0.9 (128 inputs a scale) of their largest value.
_CLIP_STEPS = 40
_SMALLEST_CLIP = 0.4


def code_range(group_size: int) -> tuple[int, int]:
    """Codes that a fresh quantisation uses: symmetric per-channel, all 16 per group."""
    return (-8, 7) if group_size == GROUP_SIZE else (-7, 7)


def round_to_codes(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """``clamp(round_half_even(weight / scale))`` as fp32; 0 where the scale is 0. ``scale`` broadcasts."""
    low, high = code_range(group_size)
    codes = weight / torch.where(scale > 0, scale, 1.0)  # a scale of 0 is that of weights too small to count
    return codes.round_().clamp_(low, high)


def find_scale(weight: Tensor, group_size: int, clip_search: bool) -> Tensor:
    """One scale for the last dimension.

    Args:
        weight: fp32 ``[..., group]``.
        group_size: 128 or -1, for the range of the codes.
        clip_search: False: the largest magnitude over 7 (per-channel) or 7.5 (per-group). True: that scale shrunk by
            the ratio, of 40 between 1 and 0.4, with the least sum of squared errors.

    Returns:
        fp32 ``[..., 1]``.
    """
    levels = 7.5 if group_size == GROUP_SIZE else 7.0
    largest = weight.abs().amax(-1, keepdim=True) / levels
    if not clip_search:
        return largest
    best_scale, best_error = largest, _squared_error(weight, largest, group_size)
    for step in range(1, _CLIP_STEPS):
        scale = largest * (1 - (1 - _SMALLEST_CLIP) * step / (_CLIP_STEPS - 1))
        error = _squared_error(weight, scale, group_size)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _squared_error(weight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return (round_to_codes(weight, scale, group_size).mul_(scale).sub_(weight)).square_().sum(-1, keepdim=True)


def _chunks(weight: Tensor, group_size: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of a weight ``[N, K]``: the first row's index and fp32 ``[rows, groups, group]``."""
    out_features, in_features = weight.shape
    group = GROUP_SIZE if group_size == GROUP_SIZE else in_features
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    for first in range(0, out_features, rows):
        yield first, weight[first : first + rows].float().reshape(-1, in_features // group, group)


def find_scales(weight: Tensor, group_size: int, clip_search: bool) -> Tensor:
    """The scales of a whole weight ``[N, K]``: fp32 ``[K/128, N]`` or ``[1, N]``; see :func:`find_scale`."""
    scales = [find_scale(chunk, group_size, clip_search) for _, chunk in _chunks(weight, group_size)]
    return torch.cat(scales).squeeze(-1).t().contiguous()


def quantize(weight: Tensor, group_size: int, clip_search: bool = False) -> tuple[Tensor, Tensor]:
    """Rounds a weight to codes and scales.

    Args:
        weight: floating point ``[N, K]``, finite; K a multiple of 128 with ``group_size=128``.
        group_size: 128 or -1.
        clip_search: see :func:`find_scale`.

    Returns:
        int8 codes ``[K, N]`` and fp32 scales ``[K/128, N]`` or ``[1, N]``; ``weight.T`` is about ``codes * scales``.
    """
    scales = find_scales(weight, group_size, clip_search)
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.int8, device=weight.device)
    for first, chunk in _chunks(weight, group_size):
        columns = slice(first, first + chunk.shape[0])
        rounded = round_to_codes(chunk, scales[:, columns].t().unsqueeze(-1), group_size)
        codes[:, columns] = rounded.to(torch.int8).flatten(1).t()
    return codes, scales
