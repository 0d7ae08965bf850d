"""GPTQ: rounding that corrects each input's error in the inputs that are still to come.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, arXiv:2210.17323, algorithm 1 and section 3.3.

Why not a library: llm-compressor and GPTQModel quantise whole models with their own data pipeline and write their own
formats, and each brings a stack of packages and a narrow window of versions (llm-compressor 0.14: torch up to 2.14.1,
transformers 5.15 to 5.21, some fifteen packages more; GPTQModel 7.7: torch from 2.14.1 on), where this package is to
run with every torch from 2.10 on. What is needed of them is the algorithm of one page below. Compared with
llm-compressor 0.14 on eight random problems (K = 512, groups of 128, given scales, with and without act-order): every
code equal in seven, 0.17 % of the codes different in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_qqq.packing import GROUP_SIZE
from marlin_qqq.quantization.rtn import find_scale, find_scales, round_to_codes

# Inputs whose corrections are applied to the rest of the weight together (the paper's B). The group's size, so that a
# group's scale sees every correction from the groups before it.
_BLOCK = GROUP_SIZE
# When the damped Hessian is not positive definite, the damping grows by this factor up to the mean of its diagonal.
_DAMPING_GROWTH = 10.0


class HessianAccumulator:
    """Collects ``mean_t x_t x_t^T`` over tokens, the Hessian of a linear layer's squared output error up to a factor.

    Args:
        in_features: K.
        device: where the matrix lives; activations are moved there.

    Example:
        >>> accumulator = HessianAccumulator(512)
        >>> for batch in batches:
        ...     accumulator.add(batch)
        >>> weight = marlin_qqq.quantize_weight(linear.weight, 128, method="gptq", hessian=accumulator.hessian)
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, activations: Tensor) -> None:
        """Adds the tokens of one batch: floating point ``[..., K]``, the inputs of the layer.

        Raises:
            ValueError: the last dimension is not K.
        """
        in_features = self.hessian.shape[0]
        if activations.dim() == 0 or activations.shape[-1] != in_features:
            raise ValueError(
                f"activations have shape {list(activations.shape)}; the last dimension must be {in_features}"
            )
        tokens = activations.detach().reshape(-1, in_features).to(self.hessian.device, torch.float32)
        if tokens.shape[0] == 0:
            return
        # A running mean: a sum over many tokens would lose the bits of the later ones.
        total = self.num_tokens + tokens.shape[0]
        self.hessian.mul_(self.num_tokens / total).addmm_(tokens.t(), tokens, alpha=1 / total)
        self.num_tokens = total


def quantize(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    clip_search: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rounds a weight to codes and scales so that the layer's output error on the calibration data is small.

    Args:
        weight: floating point ``[N, K]``, finite; K a multiple of 128 with ``group_size=128``.
        hessian: floating point ``[K, K]``, symmetric, positive semi-definite: see :class:`HessianAccumulator`.
        group_size: 128 or -1.
        clip_search: search the scales for the least squared error of the weight instead of taking its largest value.
        damping: added to the diagonal, as a fraction of its mean.
        act_order: round the inputs in descending order of their diagonal. The scales are then those of the weight
            before any correction, so that an input's group stays its natural one and nothing is permuted at run time.

    Returns:
        int8 codes ``[K, N]`` and fp32 scales ``[K/128, N]`` or ``[1, N]``.

    Raises:
        ValueError: the Hessian's shape, NaN in it, or it is not positive definite even with all the damping.
    """
    in_features = weight.shape[1]
    _check_hessian(hessian, in_features)
    group = GROUP_SIZE if group_size == GROUP_SIZE else in_features
    # Transposed: an input is a contiguous row.
    remaining = weight.float().t().clone(memory_format=torch.contiguous_format)
    hessian = hessian.to(remaining.device, torch.float32, copy=True)
    diagonal = hessian.diagonal()
    # An input that is always zero: its weight has no effect, and 0 keeps it out of the scales.
    dead = diagonal == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    remaining[dead] = 0.0

    # Without act_order a group's scale is found when its turn comes, with the corrections from the groups before it.
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    late_scales = order is None and group_size == GROUP_SIZE
    if late_scales:
        scales = torch.empty(in_features // group, remaining.shape[1], device=remaining.device)
    else:
        scales = find_scales(remaining.t(), group_size, clip_search)
    if order is not None:
        remaining, hessian = remaining[order], hessian[order][:, order]
    factor = _inverse_factor(hessian, damping)

    codes = torch.empty(remaining.shape, dtype=torch.int8, device=remaining.device)
    original_index = range(in_features) if order is None else order.tolist()
    for first in range(0, in_features, _BLOCK):
        last = min(first + _BLOCK, in_features)
        if late_scales:
            scales[first // group] = find_scale(
                remaining[first:last].t().contiguous(), group_size, clip_search
            ).squeeze(-1)
        errors = torch.empty_like(remaining[first:last])
        for row in range(first, last):
            scale = scales[original_index[row] // group]
            rounded = round_to_codes(remaining[row], scale, group_size)
            codes[row] = rounded.to(torch.int8)
            error = (remaining[row] - rounded * scale) / factor[row, row]
            remaining[row:last].addr_(factor[row, row:last], error, alpha=-1)
            errors[row - first] = error
        remaining[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return codes, scales


def _check_hessian(hessian: Tensor, in_features: int) -> None:
    if tuple(hessian.shape) != (in_features, in_features):
        raise ValueError(f"hessian has shape {list(hessian.shape)}; the weight needs [{in_features}, {in_features}]")
    if not hessian.is_floating_point():
        raise TypeError(f"hessian is {hessian.dtype}; it must be floating point")
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian holds NaN or infinite values; were the calibration activations finite?")


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; row i: what rounding input i sends to later inputs."""
    mean = hessian.diagonal().mean()
    while damping <= 1.0:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return torch.as_tensor(upper)
        damping = max(damping, 1e-4) * _DAMPING_GROWTH
    raise ValueError("hessian is not positive definite, even with its mean added to the diagonal; use more tokens")
