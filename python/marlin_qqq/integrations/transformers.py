"""Transformers plug-in: after `enable_transformers()`, `from_pretrained` and `save_pretrained` know QQQ checkpoints.

Only translation happens here: the layer is `QQQLinear`, the checks are `checkpoint`'s, the arithmetic the op's.
Transformers looks a quantisation method up by name and only warns when it does not know it, so this must run first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin_qqq.checkpoint.config import QUANT_METHOD, parse_quantization_config
from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.checkpoint.reader import GROUP_SCALE, QuantizedModule, check_values, find_quantized_modules
from marlin_qqq.checkpoint.tensors import TensorInfo, read_header
from marlin_qqq.linear import QQQLinear

logger = logging.getLogger(__name__)


class QQQConfig(QuantizationConfigMixin):
    """`quantization_config` of a QQQ model, as Transformers wants it.

    Args:
        group_size: 128 or -1.
        modules_to_not_convert: module names that stay unquantised; None means the output embeddings.
        **fields: what else a flavour's configuration holds (`wbits`, `bits`, `desc_act`, ...); checked, not kept.

    Raises:
        CheckpointError: a configuration that cannot be computed correctly.

    Example:
        >>> config = QQQConfig(group_size=128)
        >>> AutoModelForCausalLM.from_pretrained("TinyLlama", quantization_config=config)  # doctest: +SKIP
    """

    def __init__(
        self, group_size: int = -1, modules_to_not_convert: Iterable[str] | None = None, **fields: Any
    ) -> None:
        if not any(name in fields for name in ("wbits", "bits", "w_bit")):
            fields["wbits"] = 4
        skipped = ("lm_head",) if modules_to_not_convert is None else tuple(modules_to_not_convert)
        described = fields | {"group_size": group_size, "modules_to_not_convert": skipped}
        self.settings = parse_quantization_config({"quant_method": QUANT_METHOD} | described)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # Transformers' enum has its own methods only
        self.group_size = group_size
        self.modules_to_not_convert = list(skipped)

    def to_dict(self) -> dict[str, Any]:
        return self.settings.to_dict()


class QQQQuantizer(HfQuantizer):
    """Puts QQQLinear layers where a checkpoint has packed weights, and checks what was loaded into them."""

    requires_calibration = False
    quantization_config: QQQConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map sends layers to disk; QQQ layers stay in memory (of the CPU or a GPU)")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        if not self.pre_quantized:
            return model
        infos = _read_headers(kwargs.get("checkpoint_files"))
        modules = find_quantized_modules(infos, self.quantization_config.settings)
        if not modules:
            raise CheckpointError("quant_method is 'qqq', but the files hold no quantised module (no <module>.B)")
        replaced = replace_linear_layers(model, modules.values())
        _check_shapes(model, infos)
        logger.info("%d linear layers replaced by QQQLinear", replaced)
        # Per-channel files may leave the empty group scales out (HandH1998/QQQ does) or hold them (GPTQModel does).
        for attribute in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            patterns = set(getattr(model, attribute, None) or ())
            setattr(model, attribute, patterns | {rf"\.{GROUP_SCALE}$"})
        return model

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        if not self.pre_quantized:
            from marlin_qqq import quantize_model

            settings = self.quantization_config.settings
            return quantize_model(model, group_size=settings.group_size, skip=settings.modules_to_not_convert)
        for name, module in model.named_modules():
            if isinstance(module, QQQLinear):
                _check_loaded_layer(name, module)
        return model

    def get_state_dict_and_metadata(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        return stored_state_dict(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def enable_transformers() -> None:
    """Registers "qqq" with Transformers. Call it before `from_pretrained`; calling it again does nothing.

    Example:
        >>> import marlin_qqq
        >>> marlin_qqq.enable_transformers()
    """
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is not QQQConfig:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
        register_quantization_config(QUANT_METHOD)(QQQConfig)
    if AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not QQQQuantizer:
        AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
        register_quantizer(QUANT_METHOD)(QQQQuantizer)


def mark_quantized(model: Any, group_size: int, modules_to_not_convert: Iterable[str]) -> None:
    """Gives a model whose layers were replaced in memory what `save_pretrained` needs to write a QQQ folder.

    `quantize_model` calls it for every Transformers model.
    """
    config = QQQConfig(group_size, modules_to_not_convert)
    model.config.quantization_config = config
    model.hf_quantizer = QQQQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def replace_linear_layers(model: torch.nn.Module, modules: Iterable[QuantizedModule]) -> int:
    """Replaces the named nn.Linear layers by empty QQQLinear layers on the meta device; returns how many.

    Raises:
        CheckpointError: a name that is no linear layer of the model, or sizes that differ from the checkpoint's.
    """
    prefix = getattr(model, "base_model_prefix", "")
    replaced, absent = 0, []
    for module in modules:
        path = _module_path(model, module.name, prefix)
        if path is None:
            absent.append(module.name)
            continue
        linear = model.get_submodule(path)
        if not isinstance(linear, torch.nn.Linear):
            raise CheckpointError(f"{module.name} is quantised in the files but a {type(linear).__name__} in the model")
        model.set_submodule(path, _empty_layer(linear, module))
        replaced += 1
    if not replaced:
        raise CheckpointError(
            f"none of the {len(absent)} quantised modules (such as {absent[0]}) is in the {type(model).__name__}"
        )
    if absent:
        logger.warning("%d quantised modules are not in the model and ignored, such as %s", len(absent), absent[0])
    return replaced


def stored_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict without the empty group scales of per-channel layers, as HandH1998/QQQ stores it."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.numel() or not name.endswith(f".{GROUP_SCALE}")
    }


def _read_headers(checkpoint_files: Iterable[str] | None) -> dict[str, TensorInfo]:
    if not checkpoint_files:
        raise CheckpointError("no weight files were found: a QQQ model is loaded from safetensors files")
    infos: dict[str, TensorInfo] = {}
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(
                f"{file} is no safetensors file; a pickle can run code when loaded and is never opened"
            )
        infos.update((info.name, info) for info in read_header(Path(file)))
    return infos


def _check_shapes(model: torch.nn.Module, infos: Mapping[str, TensorInfo]) -> None:
    """Transformers does not compare shapes when a quantiser is at work: a lie would reach the forward pass."""
    expected = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    for info in infos.values():
        for name in (info.name, info.name.removeprefix(f"{prefix}."), f"{prefix}.{info.name}"):
            if name in expected and expected[name].numel() and tuple(expected[name].shape) != info.shape:
                needed = list(expected[name].shape)
                raise CheckpointError(f"{info.name} of {info.file} has shape {list(info.shape)}; {needed} is needed")


def _module_path(model: torch.nn.Module, name: str, prefix: str) -> str | None:
    """The module's path in this model: with or without the prefix that a head adds around the base model."""
    for path in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def _empty_layer(linear: torch.nn.Linear, module: QuantizedModule) -> QQQLinear:
    layer = QQQLinear(
        linear.in_features,
        linear.out_features,
        bias=module.bias,
        group_size=module.group_size,
        dtype=linear.weight.dtype,
        device="meta",
    )
    expected = (layer.padded_in_features, layer.padded_out_features)
    if expected != (module.in_features, module.out_features):
        raise CheckpointError(
            f"{module.name}.B holds [{module.out_features}, {module.in_features}] weights; the model's layer has "
            f"[{linear.out_features}, {linear.in_features}]"
        )
    return layer


def _check_loaded_layer(name: str, layer: QQQLinear) -> None:
    if layer.B.is_meta:
        raise CheckpointError(f"{name} was not loaded")
    loaded = check_values(name, layer.B, layer.s_channel, layer.s_group, layer.bias)
    if loaded.repaired_columns:
        layer.s_channel, layer.s_group = loaded.weight.s_channel, loaded.weight.s_group


enable_transformers()
