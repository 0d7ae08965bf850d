"""Opening any local model folder, quantised or not, with the same caution as a QQQ checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_qqq.checkpoint import CheckpointError, TensorFolder, load_quantized_model, read_json_object
from marlin_qqq.checkpoint.config import find_quantization_config
from marlin_qqq.checkpoint.model import refuse_missing


def load_model(directory: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype | str = "auto") -> Any:
    """A causal language model of a local folder: QQQ through this library's op, anything else as Transformers does.

    Raises:
        CheckpointError: the folder is unusable.

    Example:
        >>> load_model("TinyLlama").config.model_type  # doctest: +SKIP
        'llama'
    """
    folder = Path(directory)
    found = find_quantization_config(folder)
    if found is not None and found.is_qqq:
        return load_quantized_model(folder, device=device, dtype=dtype)
    read_json_object(folder / "config.json")  # refuses a missing or damaged one with a sentence,
    TensorFolder(folder)  # and pickles and damaged files
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            os.fspath(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"{folder}: Transformers cannot load this model: {error}") from error
    model, report = loaded
    # Transformers fills what it did not load with random numbers, and only warns.
    for name, stored, needed in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{name} of {folder} has shape {list(stored)}; {list(needed)} is needed")
    refuse_missing(folder, report["missing_keys"])
    return model.to(device).eval()


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder.

    Raises:
        CheckpointError: there is none that Transformers can load.
    """
    if not Path(directory).is_dir():  # Transformers would take it for a name on the hub
        raise CheckpointError(f"{directory} is not a folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Transformers raises all kinds of exceptions on a missing or broken tokenizer
        raise CheckpointError(f"{directory} has no tokenizer that Transformers can load: {error}") from error


def read_tokens(tokenizer: Any, text_file: Path) -> Tensor:
    """The tokens of a UTF-8 text file, without special tokens: int64 [num_tokens].

    Raises:
        CheckpointError: the file is missing or not UTF-8.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{text_file} is not readable UTF-8 text: {error}") from error
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
