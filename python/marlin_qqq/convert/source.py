"""What is in a model folder: a float model, a GPTQ model or a QQQ model, and which of its layers can become QQQ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from marlin_qqq.checkpoint.architecture import tensor_problems
from marlin_qqq.checkpoint.config import SUPPORTED_GROUP_SIZES, find_quantization_config, read_json_object
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import Checkpoint, natural_key
from marlin_qqq.checkpoint.tensors import TensorFolder
from marlin_qqq.limits import check_in_features_limit
from marlin_qqq.packing import IN_FEATURES_MULTIPLE, OUT_FEATURES_MULTIPLE
from marlin_qqq.quantization.model import is_skipped

Kind = Literal["float", "gptq", "qqq"]
# Layers that inference engines merge into one: they are quantised together or not at all.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of the source: its sizes, and the source tensors that it is made of (part -> tensor name)."""

    name: str
    in_features: int
    out_features: int
    parts: Mapping[str, str]


@dataclass
class Source:
    """A model folder, looked at but not read.

    Attributes:
        kind: "float" (fp16, bf16 or fp32 weights), "gptq" (4-bit GPTQ) or "qqq" (either flavour).
        config: config.json without quantization_config.
        layers: linear layers to quantise, in natural order of their names.
        skipped: linear layers that stay as they are -> the reason.
        output_embeddings: the layer that makes logits, which always stays as it is.
        others: tensors that are copied.
        joined: parameters that hold several matrices, such as experts, and stay as they are -> a sentence.
        group_size: of a "gptq" or "qqq" source.
    """

    directory: Path
    kind: Kind
    config: dict[str, Any]
    folder: TensorFolder
    layers: dict[str, LinearLayer]
    skipped: dict[str, str]
    others: list[str]
    group_size: int | None = None
    quantization_config: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    output_embeddings: str = "lm_head"
    joined: dict[str, str] = field(default_factory=dict)

    @property
    def gptq_format(self) -> Literal["gptq", "gptq_v2"]:
        """How a GPTQ source stores its zeros."""
        name: Any = (
            self.quantization_config.get("checkpoint_format") or self.quantization_config.get("format") or "gptq"
        )
        if name not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{self.directory}: GPTQ format {name!r}; 'gptq' and 'gptq_v2' are convertible")
        return name


def open_source(directory: Path, skip: Iterable[str] = ()) -> Source:
    """Looks at a model folder.

    Args:
        directory: a Hugging Face folder with config.json and safetensors.
        skip: modules to leave as they are: names, or dotted parts of names ("layers.0", "down_proj").

    Raises:
        CheckpointError: no config, no safetensors, another quantisation method, or an architecture that Transformers
            does not know.
    """
    found = find_quantization_config(directory)
    config = read_json_object(directory / "config.json")
    config.pop("quantization_config", None)
    folder = TensorFolder(directory)
    check_num_layers(config, folder)
    skip = tuple(skip)
    if found is None:
        return _float_source(directory, config, folder, skip)
    if found.is_qqq:
        return _qqq_source(directory, config, folder)
    # The oldest GPTQ folders name no method.
    if found.method == "gptq" or (found.method is None and "bits" in found.fields):
        return _gptq_source(directory, config, folder, dict(found.fields), skip)
    raise CheckpointError(
        f"{found.source}: quantised with {found.method!r}; convertible: unquantised, 'gptq' (4 bits), 'qqq'"
    )


def _float_source(directory: Path, config: dict[str, Any], folder: TensorFolder, skip: tuple[str, ...]) -> Source:
    model = build_empty_model(config, directory)
    _refuse_unknown(skip, linear_modules(model))
    head = model.get_output_embeddings()
    layers, skipped, output_embeddings = {}, {}, "lm_head"
    for name, module in sorted(linear_modules(model).items(), key=lambda item: natural_key(item[0])):
        out_features, in_features = module.out_features, module.in_features
        if module is head:
            output_embeddings = name
        info = folder.tensors.get(f"{name}.weight")
        if info is None:
            continue  # tied to another tensor, or under another name, which loaders know
        if info.dtype not in _FLOAT_DTYPES or info.shape != (out_features, in_features):
            raise CheckpointError(
                f"{info.name} is {info.dtype} {list(info.shape)}; the model's configuration needs a floating-point "
                f"[{out_features}, {in_features}]"
            )
        reason = _reason_to_skip(name, in_features, out_features, skip)
        if module is head:
            reason = "output embeddings"
        if reason:
            skipped[name] = reason
            continue
        parts = {"weight": info.name}
        if f"{name}.bias" in folder:
            parts["bias"] = _checked_bias(folder, name, out_features)
        layers[name] = LinearLayer(name, in_features, out_features, parts)
    problems = tensor_problems(model, folder.tensors.values())
    if problems:  # loaders would fill what is missing with random numbers
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{directory} is not the model of its config.json: {problems[0]}{more}")
    source = Source(directory, "float", config, folder, layers, skipped, [], output_embeddings=output_embeddings)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            source.joined[name] = f"{list(parameter.shape)}: several matrices in one tensor, no linear layer"
    return _finish(source)


def _gptq_source(
    directory: Path, config: dict[str, Any], folder: TensorFolder, quantization: dict[str, Any], skip: tuple[str, ...]
) -> Source:
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if bits != 4 or group_size not in SUPPORTED_GROUP_SIZES:
        raise CheckpointError(
            f"{directory}: GPTQ with {bits} bits, group_size {group_size}; 4 bits, 128 or -1 are convertible"
        )
    if quantization.get("sym") is False:
        raise CheckpointError(f"{directory}: GPTQ with zero points (sym is false); QQQ's codes are symmetric")
    layers = {}
    for key in sorted(folder.tensors, key=natural_key):
        name, _, part = key.rpartition(".")
        if part != "qweight":
            continue
        shape = folder.tensors[key].shape
        if len(shape) != 2 or folder.tensors[key].dtype != torch.int32:
            raise CheckpointError(
                f"{key} is {folder.tensors[key].dtype} {list(shape)}; int32 [in_features / 8, N] is needed"
            )
        in_features, out_features = shape[0] * 8, shape[1]
        parts = {part: f"{name}.{part}" for part in GPTQ_PARTS if f"{name}.{part}" in folder}
        if f"{name}.bias" in folder:
            parts["bias"] = _checked_bias(folder, name, out_features)
        reason = _reason_to_skip(name, in_features, out_features, skip)
        if reason is None and not {"scales", "qzeros"} <= parts.keys():
            reason = "scales or qzeros is missing"
        if reason is not None:
            raise CheckpointError(f"{name} is GPTQ in the files and cannot stay so: {reason}")
        layers[name] = LinearLayer(name, in_features, out_features, parts)
    _refuse_unknown(skip, layers)
    return _finish(Source(directory, "gptq", config, folder, layers, {}, [], int(group_size), quantization))


def _refuse_unknown(skip: tuple[str, ...], layers: Iterable[str]) -> None:
    """Refuses what names no layer: it may be misspelt, and the layer that was meant would be quantised."""
    names = list(layers)
    for part in skip:
        if not any(is_skipped(name, [part]) for name in names):
            raise CheckpointError(
                f"skip is {part!r}, which names no linear layer of the model; they are called {names[0]} and so on"
                if names
                else f"skip is {part!r}, but the model has no linear layers"
            )


def _checked_bias(folder: TensorFolder, name: str, out_features: int) -> str:
    info = folder.tensors[f"{name}.bias"]
    if info.dtype not in _FLOAT_DTYPES or info.shape != (out_features,):
        raise CheckpointError(
            f"{info.name} is {info.dtype} {list(info.shape)}; a floating-point [{out_features}] is needed"
        )
    return info.name


def _qqq_source(directory: Path, config: dict[str, Any], folder: TensorFolder) -> Source:
    checkpoint = Checkpoint(directory)
    layers = {}
    for name, module in checkpoint.modules.items():
        parts = {part: f"{name}.{part}" for part in ("B", "s_channel", "s_group", "bias") if f"{name}.{part}" in folder}
        layers[name] = LinearLayer(name, module.in_features, module.out_features, parts)
    size = checkpoint.settings.group_size
    return _finish(Source(directory, "qqq", config, folder, layers, {}, [], size, checkpoint=checkpoint))


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def check_num_layers(config: Mapping[str, Any], folder: TensorFolder) -> None:
    """Refuses more layers than there are tensors: to build a million of them takes hours, even without weights."""
    count = config.get("num_hidden_layers")
    if isinstance(count, int) and count > len(folder.tensors):
        raise CheckpointError(
            f"{folder.directory}/config.json: num_hidden_layers is {count}, but the files hold {len(folder.tensors)} "
            "tensors in all"
        )


def build_empty_model(config: Mapping[str, Any], directory: Path) -> Any:
    """The causal language model that `config` describes, on the meta device.

    It is Transformers' own code: code that a folder brings along is not run.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(
            "transformers is needed to know a model's layers; in a clone: pip install '.[transformers]', elsewhere: "
            "pip install 'transformers>=5' tokenizers"
        ) from error
    model_type = config.get("model_type")
    try:
        parsed = AutoConfig.for_model(**config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except Exception as error:  # Transformers raises all kinds of exceptions on a config that lies
        raise CheckpointError(
            f"{directory}/config.json: Transformers cannot build a causal language model of model_type "
            f"{model_type!r}: {error}"
        ) from error


def decoder_layer_of(module_name: str) -> str | None:
    """The block that a module belongs to: "model.layers.3" of "model.layers.3.mlp.up_proj", None outside of blocks."""
    match = re.match(r"(.*?\.\d+)\.", module_name)
    return match.group(1) if match else None


def _reason_to_skip(name: str, in_features: int, out_features: int, skip: tuple[str, ...]) -> str | None:
    for part in skip:
        if is_skipped(name, [part]):
            return f"named by skip ({part})"
    if in_features % IN_FEATURES_MULTIPLE or out_features % OUT_FEATURES_MULTIPLE:
        return (
            f"[{out_features}, {in_features}]: out_features must be a multiple of {OUT_FEATURES_MULTIPLE}, "
            f"in_features of {IN_FEATURES_MULTIPLE}"
        )
    try:
        check_in_features_limit(in_features, f"[{out_features}, {in_features}]")
    except ValueError as error:
        return str(error)
    return None


def _finish(source: Source) -> Source:
    for name in list(source.layers):
        parent, _, leaf = name.rpartition(".")
        for group in _FUSED:
            blocked = [part for part in group if f"{parent}.{part}" in source.skipped]
            if leaf in group and blocked:
                source.skipped[name] = f"merged with {blocked[0]} by inference engines, which is skipped"
                del source.layers[name]
                break
    used = {tensor for layer in source.layers.values() for tensor in layer.parts.values()}
    source.others = sorted((name for name in source.folder.tensors if name not in used), key=natural_key)
    if not source.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(source.skipped.items())[:3])
        raise CheckpointError(
            f"{source.directory} has no linear layer to quantise" + (f" ({reasons})" if reasons else "")
        )
    return source
