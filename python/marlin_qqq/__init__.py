"""W4A8 matrix products in the QQQ format: exact CPU and CUDA ops for PyTorch, with packing, layers and tools.

Names are imported when first used, so that ``import marlin_qqq`` costs nothing where torch is not needed. The ops
appear in ``torch.ops.marlin_qqq`` with the first use of any of them, with ``import marlin_qqq.ops``, or at once where
torch was imported before.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._version import __version__
    from .checkpoint import CheckpointError, load_quantized_model, read_quantization_config, write_checkpoint
    from .integrations.transformers import enable_transformers
    from .introspection import Plan, build_info, candidates, plan, tile_table
    from .linear import QQQLinear
    from .ops import make_workspace, marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token
    from .packing import (
        QQQWeight,
        pack_weight,
        permute_channel_scale,
        permute_group_scale,
        unpack_weight,
        unpermute_channel_scale,
        unpermute_group_scale,
    )
    from .quantization import check_and_repair, dequantize_weight, quantize_model, quantize_weight
    from .repack import repack_gptq

# Public name -> the module that defines it.
_HOME = {
    "__version__": "_version",
    "CheckpointError": "checkpoint",
    "load_quantized_model": "checkpoint",
    "read_quantization_config": "checkpoint",
    "write_checkpoint": "checkpoint",
    "enable_transformers": "integrations.transformers",
    "Plan": "introspection",
    "build_info": "introspection",
    "candidates": "introspection",
    "plan": "introspection",
    "tile_table": "introspection",
    "QQQLinear": "linear",
    "quantize_model": "quantization",
    "make_workspace": "ops",
    "marlin_qqq_gemm": "ops",
    "marlin_qqq_linear": "ops",
    "quantize_per_token": "ops",
    "QQQWeight": "packing",
    "pack_weight": "packing",
    "permute_channel_scale": "packing",
    "permute_group_scale": "packing",
    "unpack_weight": "packing",
    "unpermute_channel_scale": "packing",
    "unpermute_group_scale": "packing",
    "check_and_repair": "quantization",
    "dequantize_weight": "quantization",
    "quantize_weight": "quantization",
    "repack_gptq": "repack",
}

__all__ = [
    "CheckpointError",
    "Plan",
    "QQQLinear",
    "QQQWeight",
    "__version__",
    "build_info",
    "candidates",
    "check_and_repair",
    "dequantize_weight",
    "enable_transformers",
    "load_quantized_model",
    "make_workspace",
    "marlin_qqq_gemm",
    "marlin_qqq_linear",
    "pack_weight",
    "permute_channel_scale",
    "permute_group_scale",
    "plan",
    "quantize_model",
    "quantize_per_token",
    "quantize_weight",
    "read_quantization_config",
    "repack_gptq",
    "tile_table",
    "unpack_weight",
    "unpermute_channel_scale",
    "unpermute_group_scale",
    "write_checkpoint",
]


# A class of the C++ module that is built for one CPython version; everything else is there without it.
if importlib.util.find_spec("._introspection", __name__) is None:
    __all__.remove("Plan")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    from . import ops as _ops  # noqa: F401
