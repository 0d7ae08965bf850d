"""Weights to QQQ codes and scales and back: round to nearest, clip search, GPTQ, and the check of foreign weights."""

from marlin_qqq.packing import QQQWeight
from marlin_qqq.quantization.gptq import HessianAccumulator
from marlin_qqq.quantization.quantize import Method, quantize_weight
from marlin_qqq.quantization.weight import (
    assemble,
    check_and_repair,
    check_weight,
    dequantize_weight,
    int8_weight,
)

# Last: it builds on marlin_qqq.linear, which builds on the names above.
from marlin_qqq.quantization.model import quantize_model  # isort: skip

__all__ = [
    "HessianAccumulator",
    "Method",
    "QQQWeight",
    "assemble",
    "check_and_repair",
    "check_weight",
    "dequantize_weight",
    "int8_weight",
    "quantize_model",
    "quantize_weight",
]
