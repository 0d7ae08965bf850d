"""What a conversion will write, from headers alone: the shards, their sizes, the memory it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from marlin_qqq._devices import NoDevice, check_device
from marlin_qqq.checkpoint.config import SUPPORTED_GROUP_SIZES, QuantizationSettings
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import natural_key
from marlin_qqq.checkpoint.writer import DEFAULT_SHARD_BYTES, Shard, plan_shards
from marlin_qqq.convert.source import LinearLayer, Source, open_source
from marlin_qqq.packing import GROUP_SIZE, TILE_IN_FEATURES

OutputDtype = Literal["auto", "float16", "bfloat16"]
METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        group_size: 128 or -1; None: 128, or that of a GPTQ or QQQ source.
        method: "rtn" (round to nearest) or "gptq" (needs `calibration`).
        clip: search scales that clip the largest weights for less squared error.
        calibration: UTF-8 text for "gptq".
        num_samples, sequence_length: how much of the text is used.
        skip: modules to leave as they are, besides the output embeddings: names or whole dotted parts of names.
        dtype: of the tensors that are not quantised; "auto" keeps float16 and bfloat16 and turns float32 into float16.
        max_shard_bytes: a larger output is split.
        device: where quantisation computes: cpu, cuda, cuda:INDEX or auto.
    """

    group_size: int | None = None
    method: str = "rtn"
    clip: bool = True
    calibration: Path | None = None
    num_samples: int = 128
    sequence_length: int = 512
    skip: tuple[str, ...] = ()
    dtype: OutputDtype = "auto"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.group_size not in (None, *SUPPORTED_GROUP_SIZES):
            raise CheckpointError(f"group_size is {self.group_size!r}; allowed: 128, or -1 for one scale a channel")
        if self.method not in METHODS:
            raise CheckpointError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.method == "gptq" and self.calibration is None:
            raise CheckpointError("method gptq needs calibration: a text file like what the model will read")
        if self.method != "gptq" and self.calibration is not None:
            raise CheckpointError(f"calibration is given, but method is {self.method!r}; only gptq uses it")
        if self.dtype not in ("auto", "float16", "bfloat16"):
            raise CheckpointError(f"dtype is {self.dtype!r}; allowed: auto, float16, bfloat16")
        for name in ("num_samples", "sequence_length", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if isinstance(self.skip, str) or not all(isinstance(name, str) and name.strip() for name in self.skip):
            raise CheckpointError(f"skip is {self.skip!r}; names of modules or dotted parts of names are needed")
        try:
            object.__setattr__(self, "device", check_device(self.device))
        except NoDevice as error:
            raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion, decided but not begun.

    Attributes:
        settings: the output's quantization_config.
        dtype: of copied tensors.
        units: what is produced together (a layer or a copied tensor) -> its tensors, in the order of the output.
        shards: the output's files; `tensors` holds names of units.
    """

    source: Source
    destination: Path
    options: ConversionOptions
    settings: QuantizationSettings
    dtype: torch.dtype
    units: Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]
    shards: tuple[Shard, ...]

    @property
    def source_bytes(self) -> int:
        return sum(info.num_bytes for info in self.source.folder.tensors.values())

    @property
    def output_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def working_bytes(self) -> int:
        """An estimate of the memory beyond the interpreter's: the largest shard, and a layer in fp32 a few times."""
        largest = max(layer.in_features * layer.out_features for layer in self.source.layers.values())
        working = max(shard.num_bytes for shard in self.shards) + 5 * 4 * largest
        if self.options.method == "gptq":
            widest = max(layer.in_features for layer in self.source.layers.values())
            tokens = self.options.num_samples * self.options.sequence_length
            hidden = int(self.source.config.get("hidden_size") or widest)
            working += 4 * (3 * widest * widest + 2 * tokens * hidden)
        return working

    def tensors_of(self, shard: Shard) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a shard's file will hold."""
        return {name: described for unit in shard.tensors for name, described in self.units[unit].items()}

    def written_shards(self) -> list[Shard]:
        """The shards with their tensors' names in place of the units'."""
        return [Shard(shard.file_name, tuple(self.tensors_of(shard)), shard.num_bytes) for shard in self.shards]

    def fingerprint(self) -> str:
        """Equal for conversions that write the same files from the same source: what makes resuming safe."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.source.folder.files]
        described = {name: str(value) for name, value in asdict(self.options).items() if name != "device"}
        if self.options.calibration is not None:
            described["calibration"] = hashlib.sha256(self.options.calibration.read_bytes()).hexdigest()
        text = json.dumps(
            [files, described, self.source.config, [list(shard.tensors) for shard in self.shards]], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()


def plan_conversion(source: Path, destination: Path, options: ConversionOptions) -> ConversionPlan:
    """Decides what `convert` will write; reads configuration and headers only.

    Raises:
        CheckpointError: the source cannot be converted, or the options do not fit it.
    """
    opened = open_source(Path(source), options.skip)
    destination = Path(destination)
    if destination.resolve() == opened.directory.resolve():
        raise CheckpointError(f"source and destination are both {destination}")
    group_size = opened.group_size if options.group_size is None else options.group_size
    if opened.group_size is not None:
        if group_size != opened.group_size:
            raise CheckpointError(
                f"group_size is {group_size}, but the {opened.kind} source has {opened.group_size}, and its codes keep "
                "their groups"
            )
        if options.skip and opened.kind == "qqq":
            raise CheckpointError(
                f"skip is {', '.join(options.skip)}, but the source is qqq already: what is quantised in it stays so"
            )
        if options.method == "gptq":
            raise CheckpointError(
                f"method is gptq, but the source is {opened.kind} already: its codes are repacked, not searched"
            )
        if not options.clip:
            raise CheckpointError(f"clip is off, but the source is {opened.kind} already: no scales are searched")
    settings = QuantizationSettings(GROUP_SIZE if group_size is None else group_size, _skip_list(opened, options))
    dtype = _output_dtype(opened, options.dtype)
    units = _units(opened, settings.group_size, dtype)
    sizes = [
        (name, sum(dtype.itemsize * _count(shape) for dtype, shape in tensors.values()))
        for name, tensors in units.items()
    ]
    shards = plan_shards(sizes, options.max_shard_bytes)
    return ConversionPlan(opened, destination, options, settings, dtype, units, tuple(shards))


def layer_tensors(
    layer: LinearLayer, group_size: int, bias: tuple[torch.dtype, tuple[int, ...]] | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a quantised layer has on disk."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{layer.name}.B": (torch.int32, (layer.in_features // TILE_IN_FEATURES, 2 * layer.out_features)),
        f"{layer.name}.s_channel": (torch.float32, (1, layer.out_features)),
    }
    if group_size == GROUP_SIZE:
        tensors[f"{layer.name}.s_group"] = (torch.float16, (layer.in_features // GROUP_SIZE, layer.out_features))
    if bias is not None:
        tensors[f"{layer.name}.bias"] = bias
    return tensors


def copied_dtype(name: str, dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype of a copied tensor. Rotary frequencies stay fp32: rounding them shifts every position."""
    if not dtype.is_floating_point or name.endswith("inv_freq"):
        return dtype
    return target


def _units(source: Source, group_size: int, dtype: torch.dtype) -> dict:
    units: dict = {}
    for name in source.others:
        info = source.folder.tensors[name]
        units[name] = {name: (copied_dtype(name, info.dtype, dtype), info.shape)}
    for name, layer in source.layers.items():
        size = group_size
        if source.checkpoint is not None:
            size = source.checkpoint.modules[name].group_size
        # Padded QQQ weights have more outputs than their layer; its bias is as long as the layer really is.
        bias = (dtype, source.folder.tensors[layer.parts["bias"]].shape) if "bias" in layer.parts else None
        units[name] = layer_tensors(layer, size, bias)
    return {name: units[name] for name in sorted(units, key=natural_key)}


def _output_dtype(source: Source, wanted: OutputDtype) -> torch.dtype:
    if wanted != "auto":
        return torch.float16 if wanted == "float16" else torch.bfloat16
    totals: dict[torch.dtype, int] = {}
    for info in source.folder.tensors.values():
        if info.dtype in (torch.float16, torch.bfloat16) and not info.name.endswith((".scales", ".s_group")):
            totals[info.dtype] = totals.get(info.dtype, 0) + info.num_bytes
    return max(totals, key=lambda dtype: totals[dtype]) if totals else torch.float16


def _skip_list(source: Source, options: ConversionOptions) -> tuple[str, ...]:
    if source.checkpoint is not None:
        return source.checkpoint.settings.modules_to_not_convert
    # Loaders decide by name: what was skipped because of its size must be named too.
    unnamed = {name for name, reason in source.skipped.items() if not reason.startswith("named by skip")}
    return tuple(dict.fromkeys((source.output_embeddings, *options.skip, *sorted(unnamed, key=natural_key))))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
