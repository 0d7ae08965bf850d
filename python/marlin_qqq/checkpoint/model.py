"""A whole quantised model to a folder and back."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from marlin_qqq._files import TEMPORARY_SUFFIX, write_json_atomically
from marlin_qqq.checkpoint.config import QuantizationSettings, read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import GROUP_SCALE, Checkpoint, find_quantized_modules, natural_key
from marlin_qqq.checkpoint.tensors import TensorInfo
from marlin_qqq.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    copy_side_files,
    model_config,
    plan_shards,
    publish,
    refuse_existing,
    write_index,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_checkpoint(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    directory: str | os.PathLike[str],
    *,
    group_size: int | None = None,
    config: Mapping[str, Any] | Any | None = None,
    source: str | os.PathLike[str] | None = None,
    modules_to_not_convert: tuple[str, ...] = ("lm_head",),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Writes a quantised model as a QQQ folder in HandH1998's layout. The folder appears complete or not at all.

    Args:
        model: a module with QQQLinear layers (see `quantize_model`), or a state dict with `<module>.B`, `.s_channel`
            and `.s_group`.
        directory: the folder to make; it must not exist, or be empty.
        group_size: 128 or -1; None takes it from the model's QQQLinear layers.
        config: the model's configuration without quantization_config, as an object or a Transformers config; None takes
            `model.config`, else config.json of `source`.
        source: a folder whose tokenizer, generation settings and the like are copied.
        modules_to_not_convert: recorded in config.json for loaders that decide by name.
        max_shard_bytes: files larger than this are split.

    Returns:
        The folder's path.

    Raises:
        CheckpointError: the folder exists, no configuration was found, or the tensors are no QQQ model.

    Example:
        >>> write_checkpoint(quantize_model(model, 128), "TinyLlama-QQQ", source="TinyLlama")  # doctest: +SKIP
    """
    target = Path(directory)
    refuse_existing(target)
    source_config = _config_dict(model, config, source)
    tensors = _tensors_to_write(model, bool(source_config.get("tie_word_embeddings")))
    settings = QuantizationSettings(
        group_size=_group_size_of(model) if group_size is None else group_size,
        modules_to_not_convert=modules_to_not_convert,
    )
    infos = {name: TensorInfo(name, target, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if not find_quantized_modules(infos, settings):
        raise CheckpointError("the model has no quantised module (no tensor named <module>.B); quantise it first")

    shards = plan_shards([(name, infos[name].num_bytes) for name in sorted(infos, key=natural_key)], max_shard_bytes)
    # A name that nobody else has: `<name>.partial` may be a conversion that somebody wants to go on with.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    partial.mkdir(parents=True)
    try:
        for shard in shards:
            write_tensors(partial / shard.file_name, {name: tensors[name] for name in shard.tensors})
        write_index(partial, shards)
        if source is not None:
            copy_side_files(Path(source), partial)
        write_json_atomically(
            partial / "config.json", model_config(source_config, None, settings.to_dict()), sort_keys=True
        )
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def load_quantized_model(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """A Transformers causal language model of a QQQ folder, either flavour, ready to generate.

    Every tensor's shape and dtype is checked before weights are read, and scales that leave the int8 range are repaired
    (one log line a layer). Only local safetensors are read, no code of the folder is run.

    Args:
        directory: the QQQ folder.
        device: where the model goes.
        dtype: type of activations and unquantised weights: float16, bfloat16, float32 or "auto" (the config's).

    Raises:
        CheckpointError: the folder is no usable QQQ checkpoint.

    Example:
        >>> model = load_quantized_model("TinyLlama-QQQ", device="cuda")  # doctest: +SKIP
    """
    from marlin_qqq.integrations.transformers import enable_transformers

    enable_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint(directory)
    folder = os.fspath(directory)
    if not (Path(directory) / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json, so the model's architecture is unknown")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Older folders keep the settings in a side file, which Transformers does not look at.
    config.quantization_config = checkpoint.settings.to_dict()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, report = loaded
    refuse_missing(folder, report["missing_keys"])
    return model.to(device).eval()


def refuse_missing(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuses a folder in which Transformers did not find all of the model's tensors."""
    missing = sorted(names)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, such as {missing[0]}")


def _config_dict(model: Any, config: Any, source: str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is None:
        config = getattr(model, "config", None)
    if config is None and source is not None:
        config = read_json_object(Path(source) / "config.json")
    if config is None:
        raise CheckpointError("no model configuration: pass config, or source with a config.json in it")
    result = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    result.pop("quantization_config", None)
    return result


def _tensors_to_write(model: Any, tie_word_embeddings: bool) -> dict[str, torch.Tensor]:
    state = model.state_dict() if isinstance(model, torch.nn.Module) else dict(model)
    tensors = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        # HandH1998/QQQ leaves the empty group scales of per-channel layers out of its files, and so does this.
        if name.endswith("." + GROUP_SCALE) and tensor.numel() == 0:
            continue
        address = tensor.data_ptr()
        if tie_word_embeddings and address in seen:
            continue
        seen.add(address)
        tensors[name] = tensor
    return tensors


def _group_size_of(model: Any) -> int:
    from marlin_qqq.linear import QQQLinear

    if not isinstance(model, torch.nn.Module):
        raise CheckpointError("group_size is needed when tensors are given in place of a model")
    sizes = {module.group_size for module in model.modules() if isinstance(module, QQQLinear)}
    if len(sizes) != 1:
        raise CheckpointError(f"the model's QQQLinear layers have group sizes {sorted(sizes)}; exactly one is needed")
    return sizes.pop()
