"""Checks a QQQ folder: every tensor, the model's architecture, and its layers against the original weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlin_qqq.checkpoint.config import read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import Checkpoint, QuantizedModule
from marlin_qqq.checkpoint.tensors import TensorFolder
from marlin_qqq.convert.source import build_empty_model, linear_modules
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
    checkpoint = Checkpoint(directory)
    original = None if against is None else TensorFolder(against)
    problems = _architecture_problems(checkpoint)
    layers = []
    for module in checkpoint.modules.values():
        try:
            layers.append(_check_layer(checkpoint, module, original))
        except CheckpointError as error:
            problems.append(str(error))
        if on_layer is not None:
            on_layer(module.name)
    for name in checkpoint.folder.tensors:
        if name.rpartition(".")[0] not in checkpoint.modules:
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
    quantized = dequantize_weight(loaded.weight)[: weight.shape[0], : weight.shape[1]]
    if quantized.shape != weight.shape:
        raise CheckpointError(f"{module.name} has weights {list(quantized.shape)}, the original {list(weight.shape)}")
    difference = quantized - weight.float()
    norm = torch.linalg.vector_norm(weight.float())
    relative = float(torch.linalg.vector_norm(difference) / norm) if norm > 0 else float(difference.abs().max() > 0)
    return LayerReport(module, loaded.repaired_columns, relative, float(difference.abs().max()))


def _check_copied(folder: TensorFolder, name: str) -> list[str]:
    tensor = folder.read(name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return [f"{name} has {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite"]
    return []


def _architecture_problems(checkpoint: Checkpoint) -> list[str]:
    """Linear layers that the folder lacks or has with other sizes, and quantised ones that the model lacks."""
    directory = Path(checkpoint.folder.directory)
    if not (directory / "config.json").exists():
        return [f"{directory} has no config.json, so no loader knows the model's architecture"]
    config = read_json_object(directory / "config.json")
    config.pop("quantization_config", None)
    model = build_empty_model(config, directory)
    expected = linear_modules(model)
    head = model.get_output_embeddings()
    problems = [
        f"{name} is quantised, but the model has no such layer" for name in checkpoint.modules if name not in expected
    ]
    for name, layer in expected.items():
        out_features, in_features = layer.out_features, layer.in_features
        module = checkpoint.modules.get(name)
        if module is not None:
            padded = (round_up(in_features, IN_FEATURES_MULTIPLE), round_up(out_features, OUT_FEATURES_MULTIPLE))
            if (module.in_features, module.out_features) != padded:
                problems.append(
                    f"{name} holds [{module.out_features}, {module.in_features}] weights, the model's layer has "
                    f"[{out_features}, {in_features}]"
                )
        elif layer is head and (config.get("tie_word_embeddings") or _has_another_head(checkpoint, model)):
            continue
        elif f"{name}.weight" not in checkpoint.folder:
            problems.append(f"{name} is missing: neither {name}.B nor {name}.weight is in the folder")
    return problems


def _has_another_head(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether a tensor besides the input embeddings can be the output embeddings: some families' files rename them."""
    shape = tuple(model.get_output_embeddings().weight.shape)
    found = [info for info in checkpoint.folder.tensors.values() if info.shape == shape]
    return len(found) >= 2
