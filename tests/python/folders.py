"""Tiny model folders for the tests: built from configurations, saved as Hugging Face, GPTQ or QQQ folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),  # has biases
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
}
# Not among the families: experts are no linear layers, so they stay as they are.
MIXTRAL = (MixtralConfig, {"num_local_experts": 2, "num_experts_per_tok": 1})
VOCABULARY = 256


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float16, seed: int = 0, **overrides: Any) -> Any:
    """Two blocks, hidden size 128: every linear layer fits the format. Biases and weights are random."""
    config_class, extra = (FAMILIES | {"mixtral": MIXTRAL})[family]
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**(sizes | extra | overrides)), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # attention that attends
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_float_folder(path: Path, family: str = "llama", max_shard_size: str = "5GB", **arguments: Any) -> Any:
    """Saves a tiny model with its tokenizer; returns the model."""
    model = tiny_model(family, **arguments)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(path)
    return model


def rewrite_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces (or with None removes) tensors of a folder with a single model.safetensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


def rewrite_config(folder: Path, **change: Any) -> None:
    """Updates config.json; a value of None removes the key."""
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def save_gptq_folder(path: Path, group_size: int, *, v2: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LLaMA whose linear layers are in GPTQ's int4 layout; returns the weights fp32 [N, K] that they stand for."""
    model = save_float_folder(path, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    change: dict[str, torch.Tensor | None] = {}
    weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        n, k = module.weight.shape
        group = k if group_size == -1 else group_size
        codes = torch.randint(0, 16, (k, n), generator=generator)
        scales = (torch.rand(k // group, n, generator=generator) * 0.02 + 0.01).half()
        index = torch.arange(k) // group
        weights[name] = ((codes - 8) * scales.float()[index]).t()
        zero = 8 if v2 else 7
        change |= {
            f"{name}.weight": None,
            f"{name}.qweight": pack_words(codes.t().contiguous()).t().contiguous(),
            f"{name}.qzeros": pack_words(torch.full((k // group, n), zero)),
            f"{name}.scales": scales,
            f"{name}.g_idx": index.int(),
        }
    rewrite_tensors(path, change)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    rewrite_config(path, quantization_config=quantization | ({"checkpoint_format": "gptq_v2"} if v2 else {}))
    return weights


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit codes along the last dimension in an int32, the first in the low bits."""
    fields = codes.long().reshape(*codes.shape[:-1], -1, 8) << torch.arange(0, 32, 4)
    words = fields.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()
