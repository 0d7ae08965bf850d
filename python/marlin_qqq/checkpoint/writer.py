"""Writing a checkpoint folder: shards planned from sizes, each file written under a temporary name and renamed.

The folder itself is written under another name and renamed when it is complete, so `<name>` is never half a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from marlin_qqq._files import atomic_write, write_json_atomically
from marlin_qqq.checkpoint.config import SIDE_FILES
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.tensors import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 5 * 10**9
# Tokenizer, generation settings, chat template, licence: data that a loader reads. Not code, not weights, not pickles.
COPIED_SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_NEVER_COPIED = ("config.json", *SIDE_FILES, INDEX_FILE, "pytorch_model.bin.index.json")
# A side file of this size is no tokenizer; it is left behind and reported.
_MAX_COPIED_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Shard:
    """One file of the output: its name, its tensors in order, and their bytes."""

    file_name: str
    tensors: tuple[str, ...]
    num_bytes: int


def plan_shards(sizes: Iterable[tuple[str, int]], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[Shard]:
    """Distributes (tensor name, bytes) in the given order over files of at most `max_shard_bytes` (or one tensor).

    Example:
        >>> [shard.file_name for shard in plan_shards([("a", 6), ("b", 6)], max_shard_bytes=10)]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; a positive number is needed")
    groups: list[tuple[list[str], int]] = []
    for name, size in sizes:
        if groups and groups[-1][1] + size <= max_shard_bytes:
            names, total = groups[-1]
            names.append(name)
            groups[-1] = (names, total + size)
        else:
            groups.append(([name], size))
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0][0]), groups[0][1])]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(names), total)
        for number, (names, total) in enumerate(groups, start=1)
    ]


def model_config(
    config: Mapping[str, Any], dtype: str | None, quantization_config: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json for loaders of all ages: Transformers 5 reads `dtype`, the original loaders read `torch_dtype`.

    Args:
        config: the model's configuration.
        dtype: of the tensors that are not quantised, such as "float16"; None keeps what `config` says.
        quantization_config: see `QuantizationSettings.to_dict`.
    """
    dtype = dtype or config.get("dtype") or config.get("torch_dtype")
    names = {} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}
    return {**config, **names, "quantization_config": dict(quantization_config)}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes one safetensors file atomically; tensors that share memory are written out separately."""
    contiguous: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        contiguous[name] = value
    try:
        with atomic_write(path) as temporary:
            save_file(contiguous, temporary, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:  # a full disk, a quota
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_index(directory: Path, shards: list[Shard]) -> None:
    """Writes the index of a sharded folder; a single file needs none."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    total = sum(shard.num_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomically(directory / INDEX_FILE, index, sort_keys=True)


def partial_directory(directory: Path) -> Path:
    """Where a conversion's output grows until it is complete."""
    return directory.with_name(directory.name + ".partial")


def refuse_existing(directory: Path) -> None:
    """Refuses an output folder that has something in it (an empty one is fine)."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise CheckpointError(f"{directory} exists and is not a folder")
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not empty; nothing is overwritten: remove it or name another")


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk cannot hold; the folder must exist."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{directory} needs {num_bytes} bytes more, but its disk has {free} free")


def publish(partial: Path, directory: Path) -> None:
    """Gives the finished folder its name, in one step."""
    refuse_existing(directory)
    os.replace(partial, directory)


def copy_side_files(source: Path, destination: Path) -> list[str]:
    """Copies tokenizer, generation settings and the like; returns the names of files that were left behind."""
    left_behind = []
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name in _NEVER_COPIED or path.suffix == ".safetensors":
            continue
        if path.name.startswith(".") or path.suffix not in COPIED_SUFFIXES or path.stat().st_size > _MAX_COPIED_BYTES:
            left_behind.append(path.name)
            continue
        with atomic_write(destination / path.name) as temporary:
            shutil.copyfile(path, temporary)
    return left_behind
