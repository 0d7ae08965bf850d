"""Thousands of random problems and replays on a GPU: what a small grid may miss (races, stale state, rare plans)."""

from __future__ import annotations

import random

import pytest
import reference
import torch
from reference import bits

from marlin_qqq import marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token

pytestmark = pytest.mark.gpu

PROBLEMS = 10_000
REPLAYS = 10_000
SHAPES = [
    *((64, 128), (64, 8192), (192, 256), (320, 1280), (1024, 640), (1600, 4096)),
    *((2048, 2048), (4096, 1024), (5120, 896), (8192, 384), (9216, 2176)),
]


class Layer:
    """A random problem's weights on the GPU, with the int8 weight that a plain integer product multiplies with."""

    def __init__(self, out_features: int, in_features: int, group_size: int, seed: int) -> None:
        problem = reference.random_problem(1, out_features, in_features, group_size, seed=seed)
        self.int8_weight = reference.int8_weight(problem.codes, problem.group_scale).to(torch.int8).cuda()
        self.channel_scale = problem.channel_scale.cuda()
        self.stored = [tensor.cuda() for tensor in (problem.b_q_weight, problem.s_ch, problem.s_group)]
        self.workspace = problem.workspace.cuda()
        self.out_features, self.in_features = out_features, in_features

    def expected(self, a: torch.Tensor, s_tok: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype):
        rows = a.shape[0]
        padded = torch.nn.functional.pad(a, (0, 0, 0, max(32, -(-rows // 8) * 8) - rows))  # _int_mm's own limits
        sums = torch._int_mm(padded, self.int8_weight)[:rows]
        values = sums.float() * self.channel_scale * s_tok
        return (values if bias is None else values + bias.float()).to(out_dtype)

    def run(self, a: torch.Tensor, s_tok: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype, **flags):
        b, s_ch, s_group = self.stored
        sizes = (a.shape[0], self.out_features, self.in_features)
        return marlin_qqq_gemm(
            a, b, s_tok, s_ch, s_group, self.workspace, *sizes, bias=bias, out_dtype=out_dtype, **flags
        )


def random_activations(num_tokens: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randint(-128, 128, (num_tokens, in_features), dtype=torch.int8, device="cuda")
    return a, torch.rand(num_tokens, 1, device="cuda") * 0.1 + 1e-4


def test_random_problems_on_two_streams():
    """Two streams at once share every layer, its workspace included."""
    layers = [Layer(n, k, g, seed=i) for i, (n, k) in enumerate(SHAPES) for g in (-1, 128)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    rng = random.Random(1)
    wrong = []
    for first in range(0, PROBLEMS, 100):
        differences = []
        for number in range(first, first + 100):
            layer = rng.choice(layers)
            num_tokens = rng.choice((rng.randint(1, 16), rng.randint(1, 300), rng.randint(1, 1100)))
            out_dtype = rng.choice((torch.float16, torch.bfloat16))
            with_bias, constant, linear = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.4
            with torch.cuda.stream(streams[number % 2]):
                bias = torch.randn(layer.out_features, device="cuda").to(out_dtype) if with_bias else None
                if linear:
                    x = torch.randn(num_tokens, layer.in_features, device="cuda").to(out_dtype)
                    got = marlin_qqq_linear(x, *layer.stored, bias=bias, constant_weights=constant)
                    a, s_tok = quantize_per_token(x)
                else:
                    a, s_tok = random_activations(num_tokens, layer.in_features)
                    got = layer.run(a, s_tok, bias, out_dtype, constant_weights=constant)
                different = (bits(got) != bits(layer.expected(a, s_tok, bias, out_dtype))).any()
            what = (layer.out_features, layer.in_features, layer.stored[2].numel() > 0, num_tokens, out_dtype)
            differences.append((different, (*what, with_bias, constant, linear)))
        torch.cuda.synchronize()
        wrong += [what for different, what in differences if different.item()]
    assert not wrong, f"{len(wrong)} of {PROBLEMS} wrong: {wrong[:10]}"


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 200, 1024])
def test_replays_give_equal_bits(num_tokens):
    layers = [Layer(n, k, g, seed=3) for n, k in ((1600, 4096), (8704, 2048), (4096, 1024)) for g in (-1, 128)]
    inputs = [random_activations(num_tokens, layer.in_features) for layer in layers]
    mismatches = torch.zeros((), dtype=torch.int64, device="cuda")
    expected = [layer.expected(*pair, None, torch.float16) for layer, pair in zip(layers, inputs, strict=True)]
    layers[0].run(*inputs[0], None, torch.float16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Back to back first, so that dependent launches overlap; compared afterwards.
        outputs = [
            layer.run(*pair, None, torch.float16, constant_weights=True)
            for layer, pair in zip(layers, inputs, strict=True)
        ]
        for got, want in zip(outputs, expected, strict=True):
            mismatches += (bits(got) != bits(want)).sum()
    for _ in range(REPLAYS // 5):
        graph.replay()
    assert mismatches.item() == 0


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 200, 600])
def test_quantised_activations_in_reused_memory(num_tokens):
    """Every product finds its activations and token scales where the last one's were, as a model's layers do: one that
    fetches ahead, or keeps lines in L1, must not see the old ones."""
    shapes = [(1600, 4096), (16384, 1024), (4096, 1024)]
    if num_tokens <= 32:
        shapes.insert(2, (8704, 2048))  # whose rings flow from tile to tile
    layers = [Layer(n, k, g, seed=4) for n, k in shapes for g in (-1, 128)]
    inputs = [
        torch.randn(num_tokens, layer.in_features, device="cuda", dtype=torch.float16) * (step + 1)
        for step in range(8)
        for layer in layers
    ]

    def run(layer, x):
        quantized, token_scale = quantize_per_token(x)
        output = layer.run(quantized, token_scale, None, torch.float16, constant_weights=True)
        return output, (quantized.data_ptr(), token_scale.data_ptr())

    expected = []
    for index, x in enumerate(inputs):
        expected.append(run(layers[index % len(layers)], x)[0])
        torch.cuda.synchronize()
    mismatches = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, places = zip(*(run(layers[i % len(layers)], x) for i, x in enumerate(inputs)), strict=True)
        for got, want in zip(outputs, expected, strict=True):
            mismatches += (bits(got) != bits(want)).sum()
    assert len(set(places)) <= len(layers), "the allocator gave every launch new memory: the test shows nothing"
    for _ in range(200):
        graph.replay()
    assert mismatches.item() == 0


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 40, 64, 200, 600])
def test_chain_of_layers_in_two_buffers(num_tokens, group_size):
    """Every layer reads what the last one wrote, where the layer two before found its own input: one that is early, or
    keeps lines in L1, sees the wrong one. Quantisations of their own and those in the product's kernel by turns."""
    size = 2048
    layers = [Layer(size, size, group_size, seed=seed) for seed in range(3)]
    for layer in layers:  # an output's values are about as large as its input's, and add up to about nothing
        signs = torch.where(torch.rand_like(layer.stored[1]) < 0.5, -1.0, 1.0)
        layer.stored[1] = signs / (layer.int8_weight.float().std() * size**0.5)
    first = torch.randn(num_tokens, size, device="cuda", dtype=torch.float16)

    def run(fused: bool, synchronize: bool) -> tuple[torch.Tensor, list[int]]:
        x, places = first, []
        for step in range(48):
            layer = layers[step % len(layers)]
            if fused and step % 3 != 2:
                x = marlin_qqq_linear(x, *layer.stored, constant_weights=True)
            else:
                x = layer.run(*quantize_per_token(x), None, torch.float16, constant_weights=step % 2 == 0)
            places.append(x.data_ptr())
            if synchronize:
                torch.cuda.synchronize()
        return x, places

    expected, _ = run(False, synchronize=True)
    assert expected.isfinite().all() and expected.std() > 1e-2, "the chain died out: the test shows nothing"
    mismatches = torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(fused, synchronize=False) for fused in (False, True)]
        for got, _ in results:
            mismatches += (bits(got) != bits(expected)).sum()
    assert all(len(set(places)) <= 8 for _, places in results), "new memory for every output: the test shows nothing"
    for _ in range(200):
        graph.replay()
    assert mismatches.item() == 0
