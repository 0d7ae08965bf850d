"""quantize_weight: one weight matrix to a QQQWeight by a named method."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from marlin_qqq.limits import check_in_features_limit
from marlin_qqq.packing import (
    IN_FEATURES_MULTIPLE,
    OUT_FEATURES_MULTIPLE,
    PER_CHANNEL,
    QQQWeight,
    check_group_size,
)
from marlin_qqq.quantization import gptq, rtn
from marlin_qqq.quantization.weight import assemble

Method = Literal["rtn", "mse", "gptq"]
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def quantize_weight(
    weight: Tensor,
    group_size: int = PER_CHANNEL,
    method: Method = "rtn",
    *,
    hessian: Tensor | None = None,
    **options: Any,
) -> QQQWeight:
    """Quantises the weight of a linear layer to 4 bits.

    Args:
        weight: fp16, bf16, fp32 or fp64 ``[N, K]`` (the layout of ``torch.nn.Linear.weight``), finite; N a multiple of
            64, K of 128 and below 132104. ``QQQLinear.from_linear`` pads other sizes.
        group_size: 128: a scale per output and 128 inputs; -1: a scale per output.
        method: ``"rtn"``: round to nearest with the scale of the largest weight. ``"mse"``: the same with a scale that
            is searched for the least squared error. ``"gptq"``: rounding that minimises the layer's output error on
            calibration data, arXiv:2210.17323.
        hessian: for ``"gptq"``, and only there: fp32 ``[K, K]``, see ``HessianAccumulator``.
        **options: for ``"gptq"``: ``clip_search=False``, ``damping=0.01``, ``act_order=False``, see
            ``marlin_qqq.quantization.gptq.quantize``.

    Returns:
        The packed weight on the device of ``weight``.

    Raises:
        TypeError: the weight's dtype, or an option that the method does not have.
        ValueError: rank, size, group size, method, a weight that is not finite, or a missing or unfit Hessian.

    Example:
        >>> weight = marlin_qqq.quantize_weight(torch.randn(256, 512), group_size=128, method="mse")
    """
    check_group_size(group_size)
    if weight.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"weight is {weight.dtype}; it must be float16, bfloat16, float32 or float64")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [out_features, in_features]")
    for name, size, multiple in (
        ("out_features", weight.shape[0], OUT_FEATURES_MULTIPLE),
        ("in_features", weight.shape[1], IN_FEATURES_MULTIPLE),
    ):
        if size == 0 or size % multiple:
            raise ValueError(
                f"weight has shape {list(weight.shape)}; {name} must be a positive multiple of {multiple} "
                "(QQQLinear.from_linear pads other sizes)"
            )
    check_in_features_limit(weight.shape[1], f"weight has shape {list(weight.shape)}")
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"weight holds {int((~torch.isfinite(weight)).sum())} NaN or infinite values; all must be finite"
        )
    codes, scale = _codes_and_scale(weight, group_size, method, hessian, options)
    return assemble(codes, scale, group_size)


def _codes_and_scale(
    weight: Tensor, group_size: int, method: str, hessian: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    if method == "gptq":
        if hessian is None:
            raise ValueError('hessian is None; method "gptq" needs one, see HessianAccumulator')
        return gptq.quantize(weight, hessian, group_size, **options)
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; allowed: {', '.join(repr(name) for name in get_args(Method))}")
    if hessian is not None:
        raise ValueError(f'a hessian was given with method {method!r}; only "gptq" uses one')
    if options:
        raise TypeError(f"method {method!r} has no option {sorted(options)[0]!r}")
    return rtn.quantize(weight, group_size, clip_search=method == "mse")
