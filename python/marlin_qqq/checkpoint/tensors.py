"""Reading tensors of an untrusted folder: safetensors only, one file or shards with an index.

The safetensors library checks a file's header (size, JSON, offsets that cover the data without gaps or overlaps). What
is checked here is the folder: regular files, shard names that stay inside, an index and shards that agree, no pickles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from marlin_qqq.checkpoint.config import read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it; the data is not read."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class TensorFolder:
    """The tensors of a folder of safetensors files.

    Args:
        directory: a folder with model.safetensors, or with model.safetensors.index.json and its shards.

    Raises:
        CheckpointError: anything that is not such a folder. Pickles are never opened.

    Example:
        >>> folder = TensorFolder("TinyLlama")  # doctest: +SKIP
        >>> folder.read("model.norm.weight").shape  # doctest: +SKIP
        torch.Size([2048])
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a folder")
        index_path = self.directory / INDEX_FILE
        weight_map: dict[str, str] | None = None
        if index_path.exists():
            weight_map = _read_weight_map(index_path)
            names = sorted(set(weight_map.values()))
        elif (self.directory / SINGLE_FILE).exists():
            names = [SINGLE_FILE]
        else:
            raise CheckpointError(_missing_weights_message(self.directory))
        self.files: list[Path] = [self.directory / name for name in names]
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in read_header(file):
                if info.name in self.tensors:
                    raise CheckpointError(
                        f"tensor {info.name} is in both {self.tensors[info.name].file.name} and {file.name}"
                    )
                self.tensors[info.name] = info
        if weight_map is not None:
            _check_weight_map(index_path, weight_map, self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, backed by the file's mapping where safetensors does so."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        try:
            with safe_open(info.file, framework="pt", device="cpu") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"tensor {name} of {info.file} is unreadable: {error}") from error


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors that a safetensors file holds, after the safetensors library has checked its header."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing")
    if not file.is_file():
        raise CheckpointError(f"{file} is not a regular file")
    infos = []
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping, `in handle` does not work
                if not name.isprintable():  # it would reach terminals and logs
                    raise CheckpointError(f"{file} holds a tensor named {name!r}; printable names are allowed")
                view = handle.get_slice(name)
                dtype = _DTYPES.get(str(view.get_dtype()))
                if dtype is None:
                    raise CheckpointError(
                        f"tensor {name} of {file} has dtype {view.get_dtype()}, which is not supported"
                    )
                infos.append(TensorInfo(name, file, dtype, tuple(view.get_shape())))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is not a valid safetensors file: {error}") from error
    return infos


def _read_weight_map(index_path: Path) -> dict[str, str]:
    weight_map: Any = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} maps {tensor} to {name!r}; only .safetensors files are read")
        if name != os.path.basename(name) or "\\" in name or not name.isprintable() or name.startswith("."):
            raise CheckpointError(
                f"{index_path} maps {tensor} to {name!r}, which is not a plain file name in the folder"
            )
    return weight_map


def _check_weight_map(index_path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{index_path} says that {name} is in {file}, but it is not")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{info.file} holds {name}, which {index_path.name} does not list")


def _missing_weights_message(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{directory} has no {SINGLE_FILE} or {INDEX_FILE}, only pickled files ({', '.join(pickles[:3])}): "
            "a pickle can run code when it is loaded and is never opened here; save the model as safetensors first"
        )
    return f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}"
