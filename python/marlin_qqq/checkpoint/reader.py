"""A QQQ checkpoint as modules: which there are, whether their tensors can be right, and their repaired values."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from marlin_qqq.checkpoint.config import QuantizationSettings, read_quantization_config
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.tensors import TensorFolder, TensorInfo
from marlin_qqq.limits import IN_FEATURES_LIMIT
from marlin_qqq.packing import GROUP_SIZE, PER_CHANNEL, TILE_IN_FEATURES, TILE_OUT_FEATURES, QQQWeight
from marlin_qqq.quantization import check_and_repair

# Names of a quantised module's tensors on disk, both flavours.
PACKED, CHANNEL_SCALE, GROUP_SCALE, BIAS = "B", "s_channel", "s_group", "bias"
logger = logging.getLogger(__name__)

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedModule:
    """A quantised linear layer as the headers describe it."""

    name: str
    in_features: int
    out_features: int
    group_size: int
    bias: bool


@dataclass(frozen=True)
class LoadedModule:
    """A quantised layer's values, checked and repaired; repaired_columns: output channels whose scales were changed."""

    weight: QQQWeight
    bias: torch.Tensor | None
    repaired_columns: tuple[int, ...]


class Checkpoint:
    """A QQQ folder of either flavour, checked as far as configuration and headers go; values are read on demand.

    Args:
        directory: a folder with config.json (or quant_config.json, quantize_config.json) and safetensors files.
        problems: where given, what is wrong with a module's headers is appended here, and `modules` holds the others.

    Raises:
        CheckpointError: the folder cannot be a QQQ checkpoint; the message says what is wrong with which tensor.

    Example:
        >>> checkpoint = Checkpoint("Llama-3-8B-QQQ")  # doctest: +SKIP
        >>> checkpoint.modules["model.layers.0.mlp.up_proj"].out_features  # doctest: +SKIP
        14336
    """

    def __init__(self, directory: str | os.PathLike[str], problems: list[str] | None = None) -> None:
        self.settings = read_quantization_config(directory)
        self.folder = TensorFolder(directory)
        self.modules = find_quantized_modules(self.folder.tensors, self.settings, problems)
        if not self.modules and not problems:
            raise CheckpointError(f"{self.folder.directory} has no quantised module (no <module>.{PACKED})")

    def read(self, name: str) -> LoadedModule:
        """Reads, checks and repairs one quantised module."""
        module = self.modules.get(name)
        if module is None:
            raise CheckpointError(f"{self.folder.directory} has no quantised module {name}")
        tensors = {part: self.folder.read(f"{name}.{part}") for part in (PACKED, CHANNEL_SCALE)}
        if module.group_size == GROUP_SIZE:
            group_scale = self.folder.read(f"{name}.{GROUP_SCALE}")
        else:
            group_scale = torch.empty(0, dtype=torch.float16)
        bias = self.folder.read(f"{name}.{BIAS}") if module.bias else None
        return check_values(name, tensors[PACKED], tensors[CHANNEL_SCALE], group_scale, bias)

    def read_all(self) -> Iterator[tuple[QuantizedModule, LoadedModule]]:
        """Reads every quantised module in turn; only one is held."""
        for module in self.modules.values():
            yield module, self.read(module.name)


def check_values(
    name: str, packed: torch.Tensor, channel_scale: torch.Tensor, group_scale: torch.Tensor, bias: torch.Tensor | None
) -> LoadedModule:
    """Refuses NaN and infinite values, and repairs columns whose products leave the int8 range (one log line)."""
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise CheckpointError(f"{name}.{BIAS} holds {int((~torch.isfinite(bias)).sum())} NaN or infinite values")
    try:
        weight, repaired = check_and_repair(QQQWeight(packed, channel_scale, group_scale), name)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if repaired:
        shown = ", ".join(map(str, repaired[:8])) + (", ..." if len(repaired) > 8 else "")
        logger.warning("%s: %d columns left the int8 range and were repaired (%s)", name, len(repaired), shown)
    return LoadedModule(weight, bias, tuple(repaired))


def find_quantized_modules(
    tensors: Mapping[str, TensorInfo], settings: QuantizationSettings, problems: list[str] | None = None
) -> dict[str, QuantizedModule]:
    """The quantised modules that headers describe, in natural order of their names.

    Raises:
        CheckpointError: a tensor has a wrong shape or dtype or is missing, or the group size is not the config's. Not
            where `problems` is given: all such sentences are appended to it, and their modules left out.
    """
    names = sorted((name[: -len(PACKED) - 1] for name in tensors if name.endswith("." + PACKED)), key=natural_key)
    found: list[str] = []
    modules = {name: module for name in names if (module := _describe(name, tensors, settings, found)) is not None}
    for part in (CHANNEL_SCALE, GROUP_SCALE):
        for name in tensors:
            if name.endswith("." + part) and f"{name[: -len(part)]}{PACKED}" not in tensors:
                found.append(f"{name} has no {name[: -len(part)]}{PACKED} beside it")
    if problems is not None:
        problems.extend(found)
    elif found:
        raise CheckpointError(found[0])
    return modules


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [
        (0, int(part), "") if part.isdecimal() and part.isascii() and len(part) < 10 else (1, 0, part)
        for part in name.split(".")
    ]


def _describe(
    name: str, tensors: Mapping[str, TensorInfo], settings: QuantizationSettings, problems: list[str]
) -> QuantizedModule | None:
    """One module of the headers; None after appending to `problems` what is wrong with it."""
    packed = tensors[f"{name}.{PACKED}"]
    found = _dtype_problems(packed, (torch.int32,))
    if f"{name}.weight" in tensors:
        found.append(f"{name} has both {PACKED} and weight: is it quantised or not?")
    if len(packed.shape) != 2 or 0 in packed.shape or packed.shape[1] % (2 * TILE_OUT_FEATURES):
        found.append(
            f"{packed.name} has shape {list(packed.shape)}; [in_features / {TILE_IN_FEATURES}, 2 * out_features] with "
            f"out_features a multiple of {TILE_OUT_FEATURES} is needed"
        )
        problems.extend(found)  # without sizes there is nothing to compare the others with
        return None
    in_features, out_features = packed.shape[0] * TILE_IN_FEATURES, packed.shape[1] // 2
    if in_features >= IN_FEATURES_LIMIT:
        found.append(
            f"{packed.name}: in_features is {in_features}; at most {IN_FEATURES_LIMIT - 1} keeps sums in int32"
        )

    channel_scale = tensors.get(f"{name}.{CHANNEL_SCALE}")
    if channel_scale is None:
        found.append(f"{name} has {PACKED} but no {CHANNEL_SCALE}")
    else:
        found += _dtype_problems(channel_scale, (torch.float32,))
        found += _shape_problems(channel_scale, (1, out_features))

    group_scale = tensors.get(f"{name}.{GROUP_SCALE}")
    grouped = group_scale is not None and 0 not in group_scale.shape
    if group_scale is not None and grouped:
        found += _group_scale_problems(group_scale, in_features, out_features, settings)
    elif settings.group_size == GROUP_SIZE and in_features != GROUP_SIZE:
        # With one group of inputs HandH1998/QQQ packs one scale a channel whatever the configuration says.
        found.append(
            f"{name} has no {GROUP_SCALE}, but {settings.source or 'the configuration'} says group_size {GROUP_SIZE}"
        )

    bias = tensors.get(f"{name}.{BIAS}")
    if bias is not None:
        found += _dtype_problems(bias, _FLOAT_DTYPES)
        # QQQLinear pads out_features to a tile, and leaves the bias as long as the layer really is.
        if len(bias.shape) != 1 or not out_features - TILE_OUT_FEATURES < bias.shape[0] <= out_features:
            found.append(f"{bias.name} has shape {list(bias.shape)}; {[out_features]} is needed")
    problems.extend(found)
    if found:
        return None
    return QuantizedModule(name, in_features, out_features, GROUP_SIZE if grouped else PER_CHANNEL, bias is not None)


def _group_scale_problems(
    group_scale: TensorInfo, in_features: int, out_features: int, settings: QuantizationSettings
) -> list[str]:
    if settings.group_size != GROUP_SIZE:
        return [
            f"{group_scale.name} has shape {list(group_scale.shape)}, but {settings.source or 'the configuration'} "
            f"says group_size {settings.group_size}: one scale a channel, no group scales"
        ]
    if in_features % GROUP_SIZE:
        packed = f"{group_scale.name[: -len(GROUP_SCALE)]}{PACKED}"
        return [f"{packed}: in_features is {in_features}; groups of {GROUP_SIZE} need a multiple of it"]
    shape = (in_features // GROUP_SIZE, out_features)
    return _dtype_problems(group_scale, (torch.float16,)) + _shape_problems(group_scale, shape)


def _dtype_problems(info: TensorInfo, allowed: Iterable[torch.dtype]) -> list[str]:
    if info.dtype in allowed:
        return []
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return [f"{info.name} has dtype {str(info.dtype).removeprefix('torch.')}; {names} is needed"]


def _shape_problems(info: TensorInfo, shape: tuple[int, ...]) -> list[str]:
    return [] if info.shape == shape else [f"{info.name} has shape {list(info.shape)}; {list(shape)} is needed"]
