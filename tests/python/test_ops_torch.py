"""The ops inside torch: opcheck, torch.compile without recompiles, no gradients, CUDA graphs, streams, devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch

import marlin_qqq
from marlin_qqq import make_workspace, marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUP_SIZES = [128, -1]
ops = torch.ops.marlin_qqq
PACKAGE = str(Path(marlin_qqq.__file__).parents[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("out_dtype, with_bias", [(None, False), (torch.float16, True), (torch.bfloat16, True)])
def test_opcheck_gemm(device, group_size, num_tokens, out_dtype, with_bias):
    problem = reference.random_problem(num_tokens, 128, 256, group_size).to(device)
    bias = torch.randn(128, device=device).to(out_dtype) if with_bias else None
    torch.library.opcheck(
        ops.marlin_qqq_gemm.default,
        problem.arguments,
        {"bias": bias, "out_dtype": out_dtype, "constant_weights": with_bias},
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 100), (2, 3, 64)])
def test_opcheck_quantize(device, dtype, shape):
    torch.library.opcheck(ops.quantize_per_token.default, (torch.randn(shape, device=device).to(dtype),))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_opcheck_packing(group_size):
    codes = torch.randint(-8, 8, (256, 128), dtype=torch.int8)
    torch.library.opcheck(ops.pack_weight.default, (codes, group_size))
    torch.library.opcheck(ops.unpack_weight.default, (ops.pack_weight(codes, group_size), group_size))


@pytest.mark.parametrize("kind", ["group", "channel"])
@pytest.mark.parametrize("direction", ["permute", "unpermute"])
def test_opcheck_scales(kind, direction):
    torch.library.opcheck(getattr(ops, f"{direction}_{kind}_scale").default, (torch.randn(2, 128),))


def test_fakes_have_the_real_shapes():
    codes = torch.zeros(256, 128, dtype=torch.int8)
    packed = ops.pack_weight(codes, 128)
    assert ops.pack_weight(codes.to("meta"), 128).shape == packed.shape
    assert ops.unpack_weight(packed.to("meta"), 128).shape == codes.shape
    for dtype in (torch.float16, torch.bfloat16):
        problem = reference.random_problem(3, 128, 256, 128)
        meta = marlin_qqq_gemm(*problem.to("meta").arguments, out_dtype=dtype)
        real = marlin_qqq_gemm(*problem.arguments, out_dtype=dtype)
        assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


class Layer(torch.nn.Module):
    """A quantised layer between two pointwise operations, with the tensors as buffers, as modules hold them."""

    def __init__(self) -> None:
        super().__init__()
        problem = reference.random_problem(1, 128, 256, 128)
        for name in ("b_q_weight", "s_ch", "s_group", "workspace"):
            self.register_buffer(name, getattr(problem, name))
        self.register_buffer("bias", torch.randn(128).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, s_tok = quantize_per_token(x * 2)
        arguments = (a, self.b_q_weight, s_tok, self.s_ch, self.s_group, self.workspace)
        return marlin_qqq_gemm(*arguments, x.shape[0], 128, 256, bias=self.bias) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_recompiles(device, backend):
    """One graph for every number of tokens, with no break, in either mode."""
    layer = Layer().to(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (2, 3, 16, 17, 64, 200):
            x = torch.randn(num_tokens, 256, device=device).half()
            assert reference.same_bits(compiled(x), layer(x))


# Gradients


def quantized_product(x: torch.Tensor) -> torch.Tensor:
    problem = reference.random_problem(1, 128, 256, 128)
    a, s_tok = quantize_per_token(x)
    arguments = (a, problem.b_q_weight, s_tok, problem.s_ch, problem.s_group, problem.workspace)
    return marlin_qqq_gemm(*arguments, x.shape[0], 128, 256)


def fused_product(x: torch.Tensor) -> torch.Tensor:
    problem = reference.random_problem(1, 128, 256, 128)
    return marlin_qqq_linear(x, problem.b_q_weight, problem.s_ch, problem.s_group)


def scales(x: torch.Tensor) -> torch.Tensor:
    return quantize_per_token(x)[1]


def layer(x: torch.Tensor) -> torch.Tensor:
    problem = reference.random_problem(1, 128, 256, 128)
    weight = marlin_qqq.QQQWeight(problem.b_q_weight, problem.s_ch, problem.s_group)
    return marlin_qqq.QQQLinear.from_quantized(weight, torch.zeros(100), out_features=100)(x)


PRODUCTS = {
    quantized_product: "marlin_qqq_gemm",
    fused_product: "marlin_qqq_linear",
    scales: "quantize_per_token",
    layer: "marlin_qqq_linear",
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_backward_pass_is_refused_and_a_forward_pass_is_not(product):
    x = torch.randn(3, 256)
    expected = product(x)
    assert not expected.requires_grad
    y = product(x.requires_grad_())
    assert torch.equal(y, expected)
    y += 1  # as a residual does
    with pytest.raises(NotImplementedError, match=f"{PRODUCTS[product]} has no gradient: it is for inference"):
        (y.float().sum() + x.sum()).backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(product(x), expected) and not product(x).requires_grad


@pytest.mark.parametrize("tensor", ["s_tok", "s_ch", "bias"])
def test_no_other_input_has_a_gradient(tensor):
    problem = reference.random_problem(3, 128, 256, 128)
    call = dict(zip(("a", "b", "s_tok", "s_ch", "s_group", "workspace"), problem.arguments, strict=False))
    call["bias"] = torch.zeros(128).half()
    call[tensor].requires_grad_()
    *tensors, bias = call.values()
    with pytest.raises(NotImplementedError, match="marlin_qqq_gemm has no gradient"):
        marlin_qqq_gemm(*tensors, *problem.sizes, bias=bias).sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("product", [quantized_product, fused_product])
def test_a_compiled_backward_pass_is_refused_when_it_runs(product, backend):
    """Not when it is traced: a model may be compiled and run where gradients are recorded."""
    problem = reference.random_problem(1, 128, 256, 128)
    weights = problem.b_q_weight, problem.s_ch, problem.s_group

    def model(x: torch.Tensor) -> torch.Tensor:
        if product is fused_product:
            return marlin_qqq_linear(x * 2, *weights) + x[:, :128]
        a, s_tok = quantize_per_token(x * 2)
        arguments = (a, weights[0], s_tok, *weights[1:], problem.workspace)
        return marlin_qqq_gemm(*arguments, x.shape[0], 128, 256) + x[:, :128]

    x = torch.randn(3, 256, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)(x)
    assert torch.equal(y, model(x))
    with pytest.raises(NotImplementedError, match="has no gradient: it is for inference"):
        y.sum().backward()


def test_exports_with_a_dynamic_number_of_tokens():
    layer = Layer()
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(layer, (torch.randn(4, 256).half(),), dynamic_shapes=({0: tokens},)).module()
    for num_tokens in (2, 9, 300):
        x = torch.randn(num_tokens, 256).half()
        assert torch.equal(program(x), layer(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_sizes_that_only_the_run_knows(backend):
    """As a router makes them: the tokens that a mask picks, none and one too."""
    layer = Layer()

    def routed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(mask).flatten()
        return torch.zeros(x.shape[0], 128).half().index_add(0, rows, layer(x[rows]))

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(routed, fullgraph=True, dynamic=True, backend=backend)
        for num_tokens in (5, 0, 1):
            x, mask = torch.randn(6, 256).half(), torch.arange(6) < num_tokens
            assert torch.equal(compiled(x, mask), routed(x, mask))


def test_importing_either_way_registers_the_ops():
    """With the first use of a name, or at once where torch is there already; __init__ alone loads no torch."""
    for code in (
        "import torch, marlin_qqq; torch.ops.marlin_qqq.marlin_qqq_gemm",
        "import marlin_qqq, sys; assert 'torch' not in sys.modules; marlin_qqq.pack_weight; import torch; "
        "torch.ops.marlin_qqq.pack_weight",
    ):
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": PACKAGE})


# CUDA: graphs, streams, devices


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_tokens", [1, 17, 300])
def test_cuda_graph_replays_with_changed_inputs(group_size, num_tokens):
    problem = reference.random_problem(num_tokens, 512, 1024, group_size).to("cuda")
    x = torch.randn(num_tokens, 1024, device="cuda").half()

    def step() -> torch.Tensor:
        a, s_tok = quantize_per_token(x)
        arguments = (a, problem.b_q_weight, s_tok, problem.s_ch, problem.s_group, problem.workspace)
        return marlin_qqq_gemm(*arguments, *problem.sizes)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        x.copy_(torch.randn(num_tokens, 1024, generator=torch.Generator().manual_seed(seed)).half())
        graph.replay()
        torch.cuda.synchronize()
        assert reference.same_bits(out, step())
    # The weights are inputs too.
    other = reference.random_problem(num_tokens, 512, 1024, group_size, seed=1).to("cuda")
    problem.b_q_weight.copy_(other.b_q_weight)
    problem.s_ch.copy_(other.s_ch)
    problem.s_group.copy_(other.s_group)
    graph.replay()
    torch.cuda.synchronize()
    assert reference.same_bits(out, step())


@pytest.mark.gpu
@pytest.mark.parametrize("constant_weights", [False, True])
def test_current_stream_is_used(constant_weights):
    """On a side stream the op waits for what is ahead of it there: a slow producer of its input."""
    problem = reference.random_problem(64, 256, 512, 128)
    expected = reference.gemm(problem)
    good = problem.to("cuda")
    wrong_a = torch.zeros_like(good.a)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        late_a = wrong_a.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            late_a.copy_(good.a)
            out = marlin_qqq_gemm(*good._replace(a=late_a).arguments, constant_weights=constant_weights)
        stream.synchronize()
        assert reference.same_bits(out.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_two_streams_share_a_workspace(group_size):
    """Two streams at once with one workspace: nobody's sums reach the other, and the workspace stays zero."""
    problems = [reference.random_problem(16, 256, 4096, group_size, seed=seed) for seed in (1, 2)]
    expected = [reference.gemm(problem) for problem in problems]
    workspace = make_workspace(256, "cuda")
    on_gpu = [problem.to("cuda")._replace(workspace=workspace) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                outputs[i].append(marlin_qqq_gemm(*on_gpu[i].arguments))
    torch.cuda.synchronize()
    for i in (0, 1):
        assert all(reference.same_bits(out.cpu(), expected[i]) for out in outputs[i])
    assert not workspace.any()


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = reference.random_problem(33, 256, 512, 128)
    with torch.cuda.device(0):
        out = marlin_qqq_gemm(*problem.to("cuda:1").arguments)
        quantized, scale = quantize_per_token(torch.ones(2, 128, device="cuda:1"))
    assert out.device == quantized.device == scale.device == torch.device("cuda:1")
    assert reference.same_bits(out.cpu(), reference.gemm(problem))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_without_cuda_is_a_sentence():
    """With a CPU-only build the op names what is missing, not the dispatcher's table of backends."""
    from marlin_qqq import _library

    if _library.cuda_unavailable_reason is None:
        pytest.skip("this build has the CUDA kernels")
    from marlin_qqq import ops as module

    with pytest.raises(RuntimeError, match="CUDA tensors need the CUDA kernels, but "):
        module._no_cuda()
