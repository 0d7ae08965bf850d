"""Runs a planned conversion: shard by shard, resumable, the folder published when it is complete."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from marlin_qqq._files import TEMPORARY_SUFFIX, write_json_atomically
from marlin_qqq.checkpoint.config import read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.tensors import read_header
from marlin_qqq.checkpoint.writer import (
    Shard,
    check_free_space,
    copy_side_files,
    model_config,
    partial_directory,
    publish,
    refuse_existing,
    write_index,
    write_tensors,
)
from marlin_qqq.convert.calibration import BlockwiseCalibration, calibration_tokens
from marlin_qqq.convert.plan import ConversionPlan
from marlin_qqq.convert.source import LinearLayer
from marlin_qqq.packing import QQQWeight
from marlin_qqq.quantization import dequantize_weight, quantize_weight
from marlin_qqq.repack import repack_gptq

logger = logging.getLogger(__name__)

_STATE_FILE = "conversion.json"
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did. repaired: layer -> output columns whose scales were repaired (QQQ sources only)."""

    directory: Path
    quantized_layers: int
    resumed_shards: int
    repaired: dict[str, tuple[int, ...]]
    left_behind: tuple[str, ...]
    seconds: float
    peak_bytes: int


def run_conversion(
    plan: ConversionPlan, *, restart: bool = False, progress: Progress | None = None
) -> ConversionResult:
    """Writes what `plan` says. An interrupted run leaves `<destination>.partial`; the same call goes on from there.

    Args:
        plan: from `plan_conversion`.
        restart: throw an unfinished conversion away instead of going on with it.
        progress: called with (name, bytes) whenever a layer or tensor of the output is done.

    Raises:
        CheckpointError: the destination exists, an unfinished conversion has other options, another process is at work
            on it, or a source tensor is unusable.
    """
    begin = time.perf_counter()
    tokens = check_conversion(plan, restart=restart)
    folder = partial_directory(plan.destination)
    with _claim(folder, plan.fingerprint(), restart):
        producer = _Producer(plan, folder, tokens)
        resumed = 0
        for shard, written in zip(plan.shards, plan.written_shards(), strict=True):
            if _is_complete(folder / shard.file_name, plan, shard):
                resumed += 1
                producer.note_finished(shard)
                if progress is not None:
                    progress(shard.file_name, shard.num_bytes)
                continue
            tensors: dict[str, Tensor] = {}
            for unit in shard.tensors:
                produced = producer.produce(unit)
                tensors.update(produced)
                if progress is not None:
                    progress(unit, sum(tensor.numel() * tensor.element_size() for tensor in produced.values()))
            write_tensors(folder / written.file_name, tensors)
        write_index(folder, plan.written_shards())
        left_behind = copy_side_files(plan.source.directory, folder)
        dtype = str(plan.dtype).removeprefix("torch.")
        write_json_atomically(
            folder / "config.json", model_config(plan.source.config, dtype, plan.settings.to_dict()), sort_keys=True
        )
        refuse_existing(plan.destination)  # while the folder is still one to go on with
        (folder / _STATE_FILE).unlink()
        publish(folder, plan.destination)
    return ConversionResult(
        directory=plan.destination,
        quantized_layers=len(plan.source.layers),
        resumed_shards=resumed,
        repaired=producer.repaired,
        left_behind=tuple(left_behind),
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_memory_bytes(),
    )


def check_conversion(plan: ConversionPlan, *, restart: bool = False) -> list[Tensor]:
    """Refuses what can be known to fail before there is anything on the disk; what `convert --dry-run` checks, too.

    Returns:
        The calibration text's sequences, empty where there is none.

    Raises:
        CheckpointError: the destination exists, or the calibration text or the disk's space will not do.
    """
    options = plan.options
    refuse_existing(plan.destination)
    tokens: list[Tensor] = []
    if options.calibration is not None:
        tokens = calibration_tokens(
            plan.source.directory, options.calibration, options.num_samples, options.sequence_length
        )
    folder = partial_directory(plan.destination)
    there = 0
    if folder.is_dir() and not restart:
        there = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    check_free_space(existing, plan.output_bytes - there)
    return tokens


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class _Producer:
    """Makes the tensors of one unit of the output."""

    def __init__(self, plan: ConversionPlan, folder: Path, tokens: list[Tensor]) -> None:
        self.plan = plan
        self.folder = folder
        self.tokens = tokens
        self.repaired: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, Path] = {}
        self.calibration: BlockwiseCalibration | None = None

    def note_finished(self, shard: Shard) -> None:
        """Layers that an earlier run has written; calibration needs their weights."""
        for unit in shard.tensors:
            if unit in self.plan.source.layers:
                self.finished[unit] = self.folder / shard.file_name

    def produce(self, unit: str) -> dict[str, Tensor]:
        expected = self.plan.units[unit]
        layer = self.plan.source.layers.get(unit)
        tensors = {unit: self._copied(unit, expected[unit][0])} if layer is None else self._layer(layer)
        for name, (dtype, shape) in expected.items():
            if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape:
                raise AssertionError(
                    f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, planned {dtype} {shape}"
                )
        return tensors

    def _copied(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.plan.source.folder.read(name)
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise CheckpointError(f"{name} holds {wrong} NaN or infinite values; all must be finite")
        if tensor.dtype == dtype:
            return tensor
        converted = tensor.to(dtype)
        if not bool(torch.isfinite(converted).all()):
            raise CheckpointError(
                f"{name} has values up to {tensor.abs().max():.4g}, beyond {dtype}: use dtype bfloat16"
            )
        return converted

    def _layer(self, layer: LinearLayer) -> dict[str, Tensor]:
        weight = self._weight(layer)
        tensors = {f"{layer.name}.{key}": tensor.cpu() for key, tensor in weight._asdict().items() if tensor.numel()}
        if "bias" in layer.parts:
            name = f"{layer.name}.bias"
            tensors[name] = self._copied(layer.parts["bias"], self.plan.units[layer.name][name][0])
        return tensors

    def _weight(self, layer: LinearLayer) -> QQQWeight:
        source, options = self.plan.source, self.plan.options
        if source.checkpoint is not None:
            loaded = source.checkpoint.read(layer.name)
            if loaded.repaired_columns:
                self.repaired[layer.name] = loaded.repaired_columns
            return loaded.weight
        parts = {part: source.folder.read(name) for part, name in layer.parts.items() if part != "bias"}
        try:
            if source.kind == "gptq":
                return repack_gptq(
                    parts["qweight"],
                    parts["qzeros"],
                    parts["scales"],
                    parts.get("g_idx"),
                    group_size=self.plan.settings.group_size,
                    checkpoint_format=source.gptq_format,
                )
            weight = parts["weight"].to(options.device)
            if options.method == "gptq":
                return self._gptq(layer, weight)
            return quantize_weight(weight, self.plan.settings.group_size, "mse" if options.clip else "rtn")
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{layer.name}: {error}") from error

    def _gptq(self, layer: LinearLayer, weight: Tensor) -> QQQWeight:
        if self.calibration is None:
            self.calibration = self._start_calibration()
        quantized = quantize_weight(
            weight,
            self.plan.settings.group_size,
            "gptq",
            hessian=self.calibration.hessian(layer.name),
            clip_search=self.plan.options.clip,
        )
        self.calibration.replace_weight(layer.name, dequantize_weight(quantized))
        return quantized

    def _start_calibration(self) -> BlockwiseCalibration:
        finished = {name: partial(_read_dequantized, file, name) for name, file in self.finished.items()}
        return BlockwiseCalibration(self.plan.source, self.tokens, self.plan.options.device, finished)


def _read_dequantized(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        keys = set(handle.keys())
        empty = torch.empty(0, dtype=torch.float16)
        group_scale = handle.get_tensor(f"{name}.s_group") if f"{name}.s_group" in keys else empty
        weight = QQQWeight(handle.get_tensor(f"{name}.B"), handle.get_tensor(f"{name}.s_channel"), group_scale)
        return dequantize_weight(weight)


def _is_complete(file: Path, plan: ConversionPlan, shard: Shard) -> bool:
    if not file.exists():
        return False
    try:
        found = {info.name: (info.dtype, info.shape) for info in read_header(file)}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; pass restart to throw the unfinished conversion away") from error
    return found == plan.tensors_of(shard)


@contextmanager
def _claim(folder: Path, fingerprint: str, restart: bool) -> Iterator[None]:
    """Opens the unfinished folder for this process alone, or makes it. restart: empties a conversion's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"another process is writing {folder}") from error
        if not (folder.is_dir() and os.path.samestat(os.fstat(descriptor), os.stat(folder))):
            raise CheckpointError(f"another process has just finished or removed {folder}")
        _open_state(folder, fingerprint, restart)
        for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        try:
            yield
        except CheckpointError:
            if not any(folder.glob("*.safetensors")):  # nothing to go on from
                _empty(folder)
                folder.rmdir()
            raise
    finally:
        os.close(descriptor)


def _open_state(folder: Path, fingerprint: str, restart: bool) -> None:
    """Decides whether to go on with what is in the folder, which this process has locked."""
    state_path = folder / _STATE_FILE
    if not state_path.exists() and any(folder.iterdir()):
        # Whatever it is, it is no conversion's: not even restart may delete it.
        raise CheckpointError(f"{folder} exists and is no unfinished conversion; remove it or name another destination")
    if state_path.exists() and restart:
        _empty(folder)
    if state_path.exists():
        if read_json_object(state_path).get("fingerprint") == fingerprint:
            logger.info("going on with the unfinished conversion in %s", folder)
            return
        if any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder} holds an unfinished conversion of another source or with other options; remove it, or "
                "pass restart"
            )
    write_json_atomically(state_path, {"fingerprint": fingerprint})


def _empty(folder: Path) -> None:
    """Removes what a conversion wrote; the state file last, so that a folder half emptied is still a conversion's."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _STATE_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
