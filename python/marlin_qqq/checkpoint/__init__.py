"""QQQ checkpoints: read both flavours, check and repair them, write HandH1998's layout."""

from marlin_qqq.checkpoint.config import (
    QuantizationSettings,
    find_quantization_config,
    parse_quantization_config,
    read_json_object,
    read_quantization_config,
)
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.model import load_quantized_model, write_checkpoint
from marlin_qqq.checkpoint.reader import Checkpoint, LoadedModule, QuantizedModule, find_quantized_modules
from marlin_qqq.checkpoint.tensors import TensorFolder, TensorInfo
from marlin_qqq.checkpoint.writer import plan_shards

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadedModule",
    "QuantizationSettings",
    "QuantizedModule",
    "TensorFolder",
    "TensorInfo",
    "find_quantization_config",
    "find_quantized_modules",
    "load_quantized_model",
    "parse_quantization_config",
    "plan_shards",
    "read_json_object",
    "read_quantization_config",
    "write_checkpoint",
]
