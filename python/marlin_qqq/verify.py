"""Checks a QQQ folder: every tensor, the model's architecture, and its layers against the original weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from marlin_qqq.checkpoint.architecture import tensor_problems
from marlin_qqq.checkpoint.config import read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import PACKED, Checkpoint, QuantizedModule
from marlin_qqq.checkpoint.tensors import TensorFolder
from marlin_qqq.convert.source import build_empty_model, check_num_layers, linear_modules
from marlin_qqq.linear import round_up
from marlin_qqq.packing import IN_FEATURES_MULTIPLE, OUT_FEATURES_MULTIPLE
from marlin_qqq.quantization import dequantize_weight


@dataclass(frozen=True)
class LayerReport:
    """One quantised layer.

    Attributes:
        repaired_columns: outputs whose scales left the int8 range.
        relative_error: ||W - W_q|| / ||W|| (Frobenius); None: not compared.
        max_error: of one weight.
    """

    module: QuantizedModule
    repaired_columns: tuple[int, ...]
    relative_error: float | None = None
    max_error: float | None = None


@dataclass(frozen=True)
class VerificationReport:
    """layers: worst first where they were compared, else in the model's order. problems: sentences; empty: sound."""

    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]


def verify_checkpoint(
    directory: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Reads every tensor of a QQQ folder once, one layer at a time.

    Args:
        directory: the QQQ folder, either flavour.
        against: the folder with the original fp16, bf16 or fp32 weights.
        on_layer: called with each layer's name when it is done.

    Returns:
        The report. A column that needs repair is reported, not a problem: loading repairs it.

    Raises:
        CheckpointError: the folder (or `against`) cannot be read at all.

    Example:
        >>> verify_checkpoint("TinyLlama-QQQ", against="TinyLlama").layers[0].relative_error  # doctest: +SKIP
        0.11
    """
    problems: list[str] = []
    checkpoint = Checkpoint(directory, problems)
    original = None if against is None else TensorFolder(against)
    problems += _architecture_problems(checkpoint)
    layers = []
    for module in checkpoint.modules.values():
        try:
            layers.append(_check_layer(checkpoint, module, original))
        except CheckpointError as error:
            problems.append(str(error))
        if on_layer is not None:
            on_layer(module.name)
    for name in checkpoint.folder.tensors:
        if not _is_quantized(checkpoint, name.rpartition(".")[0]):
            problems.extend(_check_copied(checkpoint.folder, name))
    if original is not None:
        layers.sort(key=lambda report: -(report.relative_error or 0.0))
    return VerificationReport(tuple(layers), tuple(problems))


def _check_layer(checkpoint: Checkpoint, module: QuantizedModule, original: TensorFolder | None) -> LayerReport:
    loaded = checkpoint.read(module.name)
    if original is None:
        return LayerReport(module, loaded.repaired_columns)
    name = f"{module.name}.weight"
    if name not in original:
        raise CheckpointError(f"{original.directory} has no {name} to compare with")
    weight = original.read(name)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise CheckpointError(f"{name} of {original.directory} is {weight.dtype} {list(weight.shape)}, no float weight")
    wrong = int((~torch.isfinite(weight)).sum())
    if wrong:
        raise CheckpointError(f"{name} of {original.directory} holds {wrong} NaN or infinite values")
    quantized = dequantize_weight(loaded.weight)[: weight.shape[0], : weight.shape[1]]
    if quantized.shape != weight.shape:
        raise CheckpointError(f"{module.name} has weights {list(quantized.shape)}, the original {list(weight.shape)}")
    difference = quantized - weight
    # In fp64, where squares of large weights do not overflow.
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
    error = torch.linalg.vector_norm(difference, dtype=torch.float64)
    largest = float(difference.abs().max())
    relative = float(error / norm) if norm > 0 else float(largest > 0)
    if not math.isfinite(relative):
        raise CheckpointError(
            f"{name} of {original.directory} has weights up to {weight.abs().max():.3g}: no comparison"
        )
    return LayerReport(module, loaded.repaired_columns, relative, largest)


def _check_copied(folder: TensorFolder, name: str) -> list[str]:
    tensor = folder.read(name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return [f"{name} has {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite"]
    return []


def _architecture_problems(checkpoint: Checkpoint) -> list[str]:
    """Where the files' headers are not the model's: tensors that it needs and lacks, or has in other sizes or kinds."""
    directory = Path(checkpoint.folder.directory)
    if not (directory / "config.json").exists():
        return [f"{directory} has no config.json, so no loader knows the model's architecture"]
    config = read_json_object(directory / "config.json")
    config.pop("quantization_config", None)
    try:
        check_num_layers(config, checkpoint.folder)
        model = build_empty_model(config, directory)
    except CheckpointError as error:
        return [str(error)]
    linear = linear_modules(model)
    problems = [
        f"{name} is quantised, but the model has no such layer" for name in checkpoint.modules if name not in linear
    ]
    for name, layer in linear.items():
        if _is_quantized(checkpoint, name):
            problems += _size_problems(checkpoint, name, layer)
    return problems + tensor_problems(
        model, checkpoint.folder.tensors.values(), lambda name: _is_quantized(checkpoint, name)
    )


def _is_quantized(checkpoint: Checkpoint, module_name: str) -> bool:
    """Whether the folder has packed weights of this module, sound or not."""
    return f"{module_name}.{PACKED}" in checkpoint.folder


def _size_problems(checkpoint: Checkpoint, name: str, layer: torch.nn.Linear) -> list[str]:
    module = checkpoint.modules.get(name)
    if module is None:
        return []  # its headers are wrong, which was reported
    padded = (round_up(layer.in_features, IN_FEATURES_MULTIPLE), round_up(layer.out_features, OUT_FEATURES_MULTIPLE))
    if (module.in_features, module.out_features) == padded:
        return []
    return [
        f"{name} holds [{module.out_features}, {module.in_features}] weights, the model's layer has "
        f"[{layer.out_features}, {layer.in_features}]"
    ]
