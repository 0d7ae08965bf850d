"""What the engine must agree with: a Transformers model whose linear layers run the exact ops, one module at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import marlin_qqq.integrations.transformers  # noqa: F401  from_pretrained of QQQ folders
from marlin_qqq import QQQLinear
from marlin_qqq.packing import slice_in_features

ROW_PARALLEL = ("o_proj", "down_proj")


class RowParallel(torch.nn.Module):
    """A layer whose inputs are divided over ranks: each rank quantises its part of the token, the outputs are added."""

    def __init__(self, layer: QQQLinear, ranks: int) -> None:
        super().__init__()
        size = layer.in_features // ranks
        self.shards = torch.nn.ModuleList(
            QQQLinear.from_quantized(
                type(weight)(*(tensor.contiguous() for tensor in weight)), layer.bias if rank == 0 else None
            )
            for rank in range(ranks)
            for weight in [slice_in_features(layer.quantized_weight(), rank * size, (rank + 1) * size)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.shards), dim=-1)
        return sum(shard(part.contiguous()) for shard, part in zip(self.shards, parts, strict=True))


@dataclass
class Continuation:
    """Greedy tokens, and the smallest distance of a chosen token's logit from the runner-up's."""

    prompt: list[int]
    tokens: list[int]
    margin: float


def load(folder: Path, dtype: torch.dtype = torch.float16, tensor_parallel_size: int = 1) -> PreTrainedModel:
    """The reference for a folder, computed as `tensor_parallel_size` ranks do."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    if tensor_parallel_size > 1:
        for name, module in list(model.named_modules()):
            if isinstance(module, QQQLinear) and name.endswith(ROW_PARALLEL):
                model.set_submodule(name, RowParallel(module, tensor_parallel_size))
    return model


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> list[Continuation]:
    """Greedy continuations of prompts of equal length."""
    tokens = torch.tensor(prompts)
    margins = torch.full((len(prompts),), torch.inf)
    cache = None
    step = tokens
    for _ in range(num_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[:, -1].float().topk(2)
        margins = torch.minimum(margins, best.values[:, 0] - best.values[:, 1])
        step = best.indices[:, :1]
        tokens = torch.cat([tokens, step], dim=1)
    length = len(prompts[0])
    rows = tokens.tolist()
    return [
        Continuation(row[:length], row[length:], margin) for row, margin in zip(rows, margins.tolist(), strict=True)
    ]


def text_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens from the demo model's held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (Path(__file__).resolve().parents[2] / "demo" / "model" / "heldout.txt").read_text()
    ids = tokenizer(text[: 40 * count * length])["input_ids"]
    stride = len(ids) // count
    return [ids[i * stride : i * stride + length] for i in range(count)]


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, vocab_size, (count, length), generator=generator).tolist()
