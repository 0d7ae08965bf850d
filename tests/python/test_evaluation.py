"""Perplexity, greedy continuation and sizes, against computations written out here."""

from __future__ import annotations

import math

import pytest
import torch
from folders import byte_tokenizer, tiny_model

from marlin_qqq import quantize_model
from marlin_qqq.evaluation import continue_greedily, linear_weight_bytes, measure_perplexity, num_windows


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


def negative_log_likelihoods(model, ids: list[int]) -> list[float]:
    """Of every token after the first, one position at a time, in fp64."""
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-log_probabilities[i, token].item() for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("start_token", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("num_tokens", [2, 16, 17, 48, 53])
def test_perplexity_is_that_of_the_windows(model, start_token, batch_size, num_tokens) -> None:
    ids = torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    window, expected, calls = 16, [], []
    for first in range(0, num_tokens, window):
        row = ids[first : first + window].tolist()
        expected += negative_log_likelihoods(model, row if start_token is None else [start_token, *row])
    result = measure_perplexity(
        model, ids, window, start_token=start_token, batch_size=batch_size, on_window=calls.append
    )
    assert result.num_tokens == len(expected)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.value == math.exp(result.loss)
    if start_token is not None:
        assert result.num_tokens == num_tokens
        assert sum(calls) == num_windows(num_tokens, window)


@pytest.mark.parametrize(
    ("shape", "window", "batch_size"), [((1,), 16, 1), ((2, 8), 16, 1), ((9,), 1, 1), ((9,), 4, 0)]
)
def test_bad_arguments(model, shape, window, batch_size) -> None:
    with pytest.raises(ValueError, match=r"needed|allowed"):
        measure_perplexity(model, torch.zeros(shape, dtype=torch.long), window, batch_size=batch_size)


@pytest.mark.filterwarnings("error")
def test_continuation_equals_generate(model) -> None:
    tokenizer, prompt = byte_tokenizer(), "class Stack:"
    calls: list[int] = []
    result = continue_greedily(model, tokenizer, prompt, 12, on_token=calls.append)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1
    )
    assert list(result.token_ids) == [
        i for i in generated[0, ids.shape[1] :].tolist() if i != model.config.eos_token_id
    ]
    assert result.text == tokenizer.decode(result.token_ids)
    assert len(calls) == len(result.token_ids)


def test_continuation_stops_at_the_end_token() -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), byte_tokenizer()
    first, *_ = continue_greedily(model, tokenizer, "class", 1).token_ids
    model.generation_config.eos_token_id = [255, first]
    assert continue_greedily(model, tokenizer, "class", 5).token_ids == ()


def test_continuation_refuses_nothing_to_do(model) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        continue_greedily(model, byte_tokenizer(), "x", 0)
    with pytest.raises(ValueError, match="no token"):
        continue_greedily(model, byte_tokenizer(), "", 1)


def test_linear_weight_bytes() -> None:
    model = tiny_model(dtype=torch.float32)
    # hidden 128, 4 heads and 2 key/value heads of 32, intermediate 256, two layers
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    outputs = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
    groups = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 2 * 128)  # K is 256 for down_proj alone
    assert linear_weight_bytes(model) == 4 * weights
    assert linear_weight_bytes(model, bytes_per_element=2) == 2 * weights
    assert linear_weight_bytes(quantize_model(tiny_model(), -1)) == weights // 2 + 4 * outputs
    assert linear_weight_bytes(quantize_model(tiny_model(), 128)) == weights // 2 + 4 * outputs + 2 * groups
