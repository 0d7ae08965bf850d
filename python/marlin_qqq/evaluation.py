"""How good and how fast a causal language model is: perplexity, greedy continuation, size of its linear layers.

Works on any Transformers causal language model, quantised or not; `marlin-qqq demo` and `marlin-qqq perplexity` use it.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Continuation",
    "Perplexity",
    "continue_greedily",
    "linear_weight_bytes",
    "measure_perplexity",
    "num_windows",
]


@dataclass(frozen=True)
class Perplexity:
    """Result of :func:`measure_perplexity`. `loss` is the mean negative log-likelihood of a token, in nats."""

    loss: float
    num_tokens: int
    seconds: float

    @property
    def value(self) -> float:
        """exp(loss), infinity where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else math.inf


@dataclass(frozen=True)
class Continuation:
    """Result of :func:`continue_greedily`; `token_ids` and `text` are the new tokens alone."""

    token_ids: tuple[int, ...]
    text: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else math.inf


def num_windows(num_tokens: int, window: int) -> int:
    """Windows that :func:`measure_perplexity` cuts a text of `num_tokens` into. The last one may be shorter."""
    return math.ceil(num_tokens / window)


@torch.inference_mode()
def measure_perplexity(
    model: Any,
    token_ids: Tensor,
    window: int,
    *,
    start_token: int | None = None,
    batch_size: int = 1,
    on_window: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity over consecutive windows that do not overlap.

    Args:
        model: a Transformers causal language model.
        token_ids: integer ``[num_tokens]``, without special tokens.
        window: tokens predicted in one forward pass, at least 2; the model reads one more with `start_token`.
        start_token: put before every window, so that its first token is predicted too; None: a window's first token is
            context only.
        batch_size: windows in a forward pass.
        on_window: called with the number of windows done since the last call.

    Returns:
        Perplexity: exp of the mean over all predicted tokens.

    Raises:
        ValueError: a text shorter than 2 tokens, `token_ids` of another rank, or `window` or `batch_size` too small.

    Example:
        >>> ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]  # doctest: +SKIP
        >>> measure_perplexity(model, ids, 512, start_token=tokenizer.bos_token_id).value  # doctest: +SKIP
        3.4
    """
    if token_ids.dim() != 1 or token_ids.numel() < 2:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; one dimension of at least 2 tokens is needed")
    if window < 2 or batch_size < 1:
        raise ValueError(f"window is {window} and batch_size {batch_size}; allowed: window >= 2, batch_size >= 1")
    device = next(model.parameters()).device
    token_ids = token_ids.to(device=device, dtype=torch.long)
    full = token_ids.numel() // window
    batches = list(token_ids[: full * window].view(full, window).split(batch_size)) if full else []
    tail = token_ids[full * window :]
    if tail.numel() >= (1 if start_token is not None else 2):
        batches.append(tail[None])

    total, predicted = 0.0, 0
    begin = time.perf_counter()
    for rows in batches:
        if start_token is not None:
            rows = torch.cat([rows.new_full((rows.shape[0], 1), start_token), rows], dim=1)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        logits = model(input_ids=inputs, use_cache=False).logits
        # .item() also waits for the device, so the clock covers the work
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        total += loss.item()
        predicted += targets.numel()
        if on_window is not None:
            on_window(rows.shape[0])
    return Perplexity(total / predicted, predicted, time.perf_counter() - begin)


@torch.inference_mode()
def continue_greedily(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    on_token: Callable[[int], None] | None = None,
) -> Continuation:
    """The most likely continuation of `prompt`, token by token with a key-value cache.

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        prompt: the text to continue; must hold at least one token.
        max_new_tokens: at most this many new tokens; an end-of-sequence token stops earlier.
        on_token: called with 1 after each new token.

    Returns:
        Continuation: the new tokens and the time they took, the prompt's included.

    Raises:
        ValueError: an empty prompt, or `max_new_tokens` below 1.

    Example:
        >>> continue_greedily(model, tokenizer, "def main(", 32).text  # doctest: +SKIP
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device, dtype=torch.long)
    if ids.numel() == 0:
        raise ValueError("the prompt holds no token; give it some text")
    end_tokens = model.generation_config.eos_token_id
    end_tokens = {end_tokens} if isinstance(end_tokens, int) else set(end_tokens or ())

    # Transformers 5.24 renamed argument and result, and warns about the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    new_ids: list[int] = []
    cache: dict[str, Any] = {}
    begin = time.perf_counter()
    while len(new_ids) < max_new_tokens:
        output = model(input_ids=ids, use_cache=True, **cache)
        cache = {name: getattr(output, name)}
        ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        token = int(ids.item())
        if token in end_tokens:
            break
        new_ids.append(token)
        if on_token is not None:
            on_token(1)
    seconds = time.perf_counter() - begin
    text = tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Continuation(tuple(new_ids), text, seconds)


def linear_weight_bytes(model: torch.nn.Module, bytes_per_element: int | None = None) -> int:
    """Bytes of all linear layers' weights, scales included; biases and output embeddings are not counted.

    Args:
        model: a model with `torch.nn.Linear` or `QQQLinear` layers.
        bytes_per_element: counts each unquantised weight element with this size, whatever type it has in memory
            (2 for a model that is stored in fp16 and computed in fp32).

    Example:
        >>> linear_weight_bytes(torch.nn.Sequential(torch.nn.Linear(128, 64)), bytes_per_element=2)
        16384
    """
    from marlin_qqq.linear import QQQLinear

    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    total = 0
    for module in model.modules():
        if isinstance(module, QQQLinear):
            total += sum(t.numel() * t.element_size() for t in (module.B, module.s_channel, module.s_group))
        elif isinstance(module, torch.nn.Linear) and module is not head:
            total += module.weight.numel() * (bytes_per_element or module.weight.element_size())
    return total
