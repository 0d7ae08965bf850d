"""Opening any local model folder, quantised or not, with the same caution as a QQQ checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_qqq.checkpoint import CheckpointError, TensorFolder, load_quantized_model, read_json_object
from marlin_qqq.checkpoint.config import QUANT_METHOD, SIDE_FILES


def load_model(directory: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype | str = "auto") -> Any:
    """A causal language model of a local folder: QQQ through this library's op, anything else as Transformers does.

    Raises:
        CheckpointError: the folder is unusable.

    Example:
        >>> load_model("TinyLlama").config.model_type  # doctest: +SKIP
        'llama'
    """
    folder = Path(directory)
    config = read_json_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None:
        side = next((folder / name for name in SIDE_FILES if (folder / name).exists()), None)
        quantization = read_json_object(side) if side is not None else None
    if isinstance(quantization, dict) and QUANT_METHOD in (
        quantization.get("quant_method"),
        quantization.get("method"),
        quantization.get("checkpoint_format"),
        QUANT_METHOD if "wbits" in quantization else None,
    ):
        return load_quantized_model(folder, device=device, dtype=dtype)
    TensorFolder(folder)  # refuses pickles and damaged files with a sentence
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            os.fspath(folder), dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"{folder}: Transformers cannot load this model: {error}") from error
    return model.to(device).eval()


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder.

    Raises:
        CheckpointError: there is none that Transformers can load.
    """
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
