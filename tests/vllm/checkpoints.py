"""QQQ folders for the tests: the demo model, and tiny random models for what the demo model does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import marlin_qqq
from marlin_qqq.checkpoint import write_checkpoint

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
TINY = {"vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}


def demo_model(folder: Path, group_size: int) -> Path:
    """The trained demo model, quantised."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float16)
    marlin_qqq.quantize_model(model, group_size=group_size)
    return write_checkpoint(model, folder, source=DEMO_MODEL)


def _tiny(config: LlamaConfig | Qwen2Config, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.half().eval()


def bias_and_skipped(folder: Path, group_size: int, listed: bool) -> Path:
    """Qwen2 (bias on q, k, v) with two modules left unquantised; `listed`: the configuration names them."""
    config = Qwen2Config(
        **TINY,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    skip = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn")
    model = marlin_qqq.quantize_model(_tiny(config, seed=1), group_size=group_size, skip=skip)
    return write_checkpoint(model, folder, modules_to_not_convert=skip if listed else ("lm_head",))


def odd_sizes(folder: Path, group_size: int) -> Path:
    """No size is a whole number of tiles: 160 inputs, 160 + 32 + 32 outputs of q, k, v, 200 of gate and up."""
    config = LlamaConfig(
        **TINY,
        hidden_size=160,
        intermediate_size=200,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.1,
    )
    model = marlin_qqq.quantize_model(_tiny(config, seed=2), group_size=group_size)
    return write_checkpoint(model, folder)


def out_of_range(source: Path, folder: Path) -> Path:
    """Group scales 1.5 times too large, channel scales as much smaller: the same weights, outside the range of int8."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".s_group"):
                tensors[name] = (tensors[name].float() * 1.5).half()
            elif name.endswith(".s_channel"):
                tensors[name] = tensors[name] / 1.5

    return changed_copy(source, folder, change)


def wrong_scale_order(source: Path, folder: Path) -> Path:
    """Channel scales in natural order: everything loads, and every number is wrong."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".s_channel"):
                tensors[name] = marlin_qqq.unpermute_channel_scale(tensors[name])

    return changed_copy(source, folder, change)


def without_tensor(source: Path, folder: Path, name: str) -> Path:
    """A folder that lacks one tensor."""
    return changed_copy(source, folder, lambda tensors: tensors.pop(name))


def gptqmodel_flavour(source: Path, folder: Path, group_size: int) -> Path:
    """GPTQModel's field names, and its empty group scales in per-channel files."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if group_size == -1:
            names = [name.removesuffix(".B") for name in tensors if name.endswith(".B")]
            tensors.update({f"{name}.s_group": torch.empty(0, dtype=torch.float16) for name in names})

    fields = {"bits": 4, "group_size": group_size, "desc_act": False, "sym": True, "lm_head": False}
    fields |= {"quant_method": "qqq", "format": "qqq", "checkpoint_format": "qqq", "pack_dtype": "int32", "meta": {}}
    changed_copy(source, folder, change)
    _change_config(folder, lambda config: config.update(quantization_config=fields))
    return folder


def side_file_flavour(source: Path, folder: Path) -> Path:
    """The oldest folders: nothing in config.json, a quant_config.json beside it."""
    changed_copy(source, folder, lambda tensors: None)

    def move(config: dict) -> None:
        settings = config.pop("quantization_config")
        fields = {"wbits": settings["wbits"], "group_size": settings["group_size"]}
        (folder / "quant_config.json").write_text(json.dumps(fields))

    _change_config(folder, move)
    return folder


def changed_copy(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a folder with a single safetensors file, after `change` has had its tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def _change_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def architecture(folder: Path) -> str:
    return AutoConfig.from_pretrained(folder).architectures[0]
