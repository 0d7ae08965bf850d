"""marlin_qqq_linear: quantize_per_token and marlin_qqq_gemm in one call, to the bit, whichever kernels it takes."""

from __future__ import annotations

import itertools
import re

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import same_bits

import marlin_qqq
from marlin_qqq import marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUP_SIZES = [128, -1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ops = torch.ops.marlin_qqq


def weights(out_features: int, in_features: int, group_size: int, device: str = "cpu", seed: int = 0) -> tuple:
    problem = reference.random_problem(1, out_features, in_features, group_size, seed=seed).to(device)
    return problem.b_q_weight, problem.s_ch, problem.s_group


def two_ops(x: torch.Tensor, b_q_weight: torch.Tensor, s_ch: torch.Tensor, s_group: torch.Tensor, **options):
    """What the op promises, from the two ops that other tests hold to the specification."""
    out_features = b_q_weight.shape[1] // 2
    a, s_tok = quantize_per_token(x)
    a, s_tok = a.view(-1, x.shape[-1]), s_tok.view(-1, 1)
    workspace = marlin_qqq.make_workspace(out_features, x.device)
    options.setdefault("out_dtype", torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16)
    arguments = (a, b_q_weight, s_tok, s_ch, s_group, workspace, a.shape[0], out_features, x.shape[-1])
    return marlin_qqq_gemm(*arguments, **options).view(*x.shape[:-1], out_features)


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    out_tiles=st.integers(1, 5),
    in_tiles=st.integers(1, 4),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_two_ops(leading, out_tiles, in_tiles, group_size, dtype, out_dtype, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, 128 * in_tiles, generator=generator).to(dtype)
    tensors = weights(64 * out_tiles, 128 * in_tiles, group_size, seed=seed)
    options = {} if out_dtype is None else {"out_dtype": out_dtype}
    if with_bias:
        bias_dtype = out_dtype or (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
        options["bias"] = torch.randn(64 * out_tiles, generator=generator).to(bias_dtype)
    assert same_bits(marlin_qqq_linear(x, *tensors, **options), two_ops(x, *tensors, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 70])
def test_special_rows(device, dtype, num_tokens):
    """Zeros, next to zeros, NaN and infinities: zero and NaN outputs in their own rows, as of the two ops."""
    x = torch.randn(num_tokens, 512, device=device).to(dtype)
    rows = [torch.zeros(512), torch.full((512,), 1e-40), torch.full((512,), float("nan")), torch.full((512,), 1e30)]
    for index, row in enumerate(rows[:num_tokens]):
        x[index] = row.to(x)
    x[-1, 300] = float("-inf")
    for group_size in GROUP_SIZES:
        tensors = weights(192, 512, group_size, device)
        got = marlin_qqq_linear(x, *tensors)
        assert same_bits(got, two_ops(x, *tensors))
        assert got[-1].isnan().all()
        assert num_tokens < 2 or not got[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_may_lie_apart_and_anywhere(device):
    """Slices of a fused activation, odd strides and odd starts (which a kernel cannot load by vectors), transposes."""
    tensors = weights(128, 256, 128, device)
    storage = torch.randn(6, 2000, device=device).half()
    layouts = [storage[:, 512:768], storage[:, 3:259], storage[::2, 8:264], storage[:, :1999][:, 7:263]]
    layouts += [
        torch.randn(256, 6, device=device).half().t(),
        torch.randn(6, device=device).half()[:, None].expand(6, 256),
    ]
    for x in layouts:
        assert same_bits(marlin_qqq_linear(x, *tensors), two_ops(x.contiguous(), *tensors))
    vector = torch.randn(256, device=device).half()
    assert marlin_qqq_linear(vector, *tensors).shape == (128,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_no_tokens(device, shape):
    got = marlin_qqq_linear(torch.empty(shape, dtype=torch.bfloat16, device=device), *weights(128, 256, -1, device))
    assert (got.shape, got.dtype) == ((*shape[:-1], 128), torch.bfloat16)


MISTAKES = {
    "x dtype": (lambda x, w: (x.double(), *w), "x must be float16, bfloat16 or float32, got float64"),
    "x scalar": (lambda x, w: (x[0, 0], *w), "x must have at least 1 dimension, [..., in_features], got a scalar"),
    "x columns": (
        lambda x, w: (x[:, :100], *w),
        "in_features (x's last size) must be a positive multiple of 128, got 100",
    ),
    "b dtype": (lambda x, w: (x, w[0].long(), *w[1:]), "b_q_weight must be int32, got int64"),
    "b rows": (lambda x, w: (x, w[0][:8], *w[1:]), "b_q_weight's first size must be in_features / 16 = 16, got 8"),
    "b strides": (lambda x, w: (x, w[0].t().contiguous().t(), *w[1:]), "b_q_weight must be contiguous"),
    "s_ch count": (lambda x, w: (x, w[0], w[1][:, :64], w[2]), "s_ch must hold out_features = 128 values"),
    "s_group shape": (lambda x, w: (x, w[0], w[1], w[2][:1]), "s_group must have shape [in_features / 128"),
    "x missing": (lambda x, w: (None, *w), "x must be a tensor, got None"),
    "b missing": (lambda x, w: (x, None, *w[1:]), "b_q_weight must be a tensor, got None"),
    "s_ch missing": (lambda x, w: (x, w[0], None, w[2]), "s_ch must be a tensor, got None"),
    "s_group missing": (
        lambda x, w: (x, w[0], w[1], None),
        "s_group must be a tensor, got None; for per-channel weights pass a tensor without values",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_named_and_the_next_call_works(device, mistake):
    change, message = MISTAKES[mistake]
    x, tensors = torch.randn(5, 256, device=device).half(), weights(128, 256, 128, device)
    with pytest.raises(RuntimeError, match=re.escape(message)) as raised:
        marlin_qqq_linear(*change(x, tensors))
    assert str(raised.value).startswith("marlin_qqq_linear: ")
    assert same_bits(marlin_qqq_linear(x, *tensors), two_ops(x, *tensors))


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if "strides" not in mistake])
def test_fake_names_the_same(mistake):
    change, message = MISTAKES[mistake]
    x, tensors = torch.randn(5, 256).half().to("meta"), [tensor.to("meta") for tensor in weights(128, 256, 128)]
    with pytest.raises(RuntimeError, match="marlin_qqq_linear: " + re.escape(message)):
        marlin_qqq_linear(*change(x, tensors))
    assert marlin_qqq_linear(x, *tensors).shape == (5, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("device, other", [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("index", range(5))
def test_mixed_devices_are_refused(index, device, other):
    x, tensors, bias = torch.randn(5, 256).half(), weights(128, 256, 128), torch.zeros(128).half()
    mixed = [tensor.to(device) for tensor in (x, *tensors, bias)]
    mixed[index] = mixed[index].to(other)
    of_x, got = (other, device) if index == 0 else (device, other)
    with pytest.raises(RuntimeError, match=rf"marlin_qqq_linear: .* must be on the device of x, {of_x}.*, got {got}"):
        marlin_qqq_linear(*mixed[:4], bias=mixed[4])
    on_gpu = [tensor.cuda() for tensor in (x, *tensors)]
    assert same_bits(marlin_qqq_linear(*on_gpu), two_ops(*on_gpu))


@pytest.mark.parametrize("index", range(5))
def test_a_meta_tensor_among_real_ones_is_refused(index):
    """It would reach the fake, whose output nothing fills."""
    tensors = [torch.randn(5, 256).half(), *weights(128, 256, 128), torch.zeros(128).half()]
    tensors[index] = tensors[index].to("meta")
    devices = "meta, got cpu" if index == 0 else "cpu, got meta"
    with pytest.raises(RuntimeError, match=f"marlin_qqq_linear: .* must be on the device of x, {devices}"):
        marlin_qqq_linear(*tensors[:4], bias=tensors[4])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_options_are_named(device):
    x, tensors = torch.randn(5, 256).half().to(device), [tensor.to(device) for tensor in weights(128, 256, 128)]
    with pytest.raises(RuntimeError, match="out_dtype must be float16 or bfloat16, got float32"):
        marlin_qqq_linear(x, *tensors, out_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="bias must have the output's dtype, bfloat16, got float16"):
        marlin_qqq_linear(x.bfloat16(), *tensors, bias=torch.zeros(128, device=device).half())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (2, 3, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    torch.library.opcheck(
        ops.marlin_qqq_linear.default, (x, *weights(128, 256, 128, device)), {"constant_weights": True}
    )


class Layer(torch.nn.Module):
    def __init__(self, b_q_weight: torch.Tensor, s_ch: torch.Tensor, s_group: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in (("b_q_weight", b_q_weight), ("s_ch", s_ch), ("s_group", s_group)):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return marlin_qqq_linear(x * 2, self.b_q_weight, self.s_ch, self.s_group) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_recompiling(device, backend):
    layer = Layer(*weights(128, 256, 128, device))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (2, 3, 8, 9, 200):
            x = torch.randn(num_tokens, 256, device=device).half()
            assert same_bits(compiled(x), layer(x))


def test_plans_of_kernels_that_quantise():
    """Few tokens of few inputs, on Hopper; the two ops' launches otherwise."""
    plan = marlin_qqq.plan(1, 4096, 4096, 128, quantizes=True)
    assert plan.quantizes and plan.name.endswith("/quantizing")
    assert marlin_qqq.plan(1, 4096, 4096, 128, quantizes=True, tile=plan.name).name == plan.name
    for num_tokens, in_features, device in [
        (9, 4096, "sm_90"),
        (8, 8192, "sm_90"),
        (1, 32768, "sm_90"),
        (1, 4096, "sm_80"),
    ]:
        plans = marlin_qqq.candidates(num_tokens, 4096, in_features, 128, device, quantizes=True)
        assert plans and not any(plan.quantizes for plan in plans)
        names = [plan.name for plan in marlin_qqq.candidates(num_tokens, 4096, in_features, 128, device)]
        assert sorted(names) == sorted(plan.name for plan in plans)
    assert not any(plan.quantizes for plan in marlin_qqq.candidates(1, 4096, 4096))


@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features", "group_size", "quantizes"),
    [
        (1, 4096, 4096, -1, True),
        (2, 4096, 4096, -1, True),
        (1, 4096, 4096, 128, True),
        (2, 4096, 4096, 128, False),  # level alone, a tenth of a decoder layer slower
        (4, 2560, 2560, 128, True),
        (1, 6144, 4096, 128, False),
        (1, 28672, 4096, -1, True),
    ],
)
def test_where_the_products_kernel_quantises(num_tokens, out_features, in_features, group_size, quantizes):
    """As docs/kernel-sm90.md, "Quantisation inside the product", has it from measurements."""
    plan = marlin_qqq.plan(
        num_tokens, out_features, in_features, group_size, "sm_90", quantizes=True, constant_weights=True
    )
    assert plan.quantizes == quantizes, str(plan)


@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features", "group_size", "quantizes"),
    [
        (1, 4096, 4096, -1, True),
        (4, 4096, 4096, -1, True),
        (8, 4096, 4096, -1, False),
        (2, 4096, 4096, 128, True),
        (1, 6144, 4096, 128, True),
        (2, 10240, 8192, -1, True),
        (4, 7168, 8192, 128, False),
    ],
)
def test_where_it_does_between_other_kernels(num_tokens, out_features, in_features, group_size, quantizes):
    sizes = (num_tokens, out_features, in_features, group_size)
    plan = marlin_qqq.plan(*sizes, "sm_90", quantizes=True, constant_weights=True, standalone=True)
    assert plan.quantizes == quantizes, str(plan)


# Kernels that quantise: every split, on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sizes", [(64, 128), (192, 2048), (1280, 3840), (8448, 1024), (576, 16384), (8704, 2176)])
def test_every_quantizing_launch_has_the_bits_of_the_two_ops(monkeypatch, dtype, group_size, sizes):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels that quantise are for compute capability 9.0")
    out_features, in_features = sizes
    tensors = weights(out_features, in_features, group_size, "cuda")
    bias = torch.randn(out_features, device="cuda").to(dtype)
    flows = out_features > 64 * torch.cuda.get_device_properties(0).multi_processor_count
    launched = dict.fromkeys(("warp8", "quad8", "stream8", "flow8") if flows else ("warp8", "quad8", "stream8"), 0)
    for num_tokens in range(1, 9):
        x = torch.randn(num_tokens, in_features + 8, device="cuda").to(dtype)[:, 8:]
        if num_tokens > 2:
            x[1], x[2, -1] = 0, float("nan")
        expected = two_ops(x, *tensors, bias=bias)
        for tile, split in itertools.product(launched, ("1x1", "2x1", "3x1", "5x1", "8x1", "1x2", "1x3", "1x16")):
            monkeypatch.setenv("MARLIN_QQQ_TILE", f"{tile}/{split}/1/quantizing")
            for constant_weights, standalone in itertools.product((False, True), "01"):
                monkeypatch.setenv("MARLIN_QQQ_STANDALONE", standalone)
                try:
                    got = marlin_qqq_linear(x, *tensors, bias=bias, constant_weights=constant_weights)
                except ValueError as error:
                    assert f"MARLIN_QQQ_TILE is '{tile}/{split}/1/quantizing'; allowed for" in str(
                        error
                    )  # more blocks than stages, more inputs than fit, two waves
                    continue
                launched[tile] += 1
                assert same_bits(got, expected), (num_tokens, tile, split, standalone)
        monkeypatch.delenv("MARLIN_QQQ_TILE")
        monkeypatch.delenv("MARLIN_QQQ_STANDALONE")
        assert same_bits(marlin_qqq_linear(x, *tensors, bias=bias, constant_weights=True), expected)
    assert min(launched.values()) >= 8, launched


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_layers_in_a_chain_see_each_others_outputs(group_size):
    """48 layers in one graph, each reading what the one before it has just written, over and over the same memory."""
    tensors = weights(1024, 1024, group_size, "cuda")
    for num_tokens in (1, 2, 5, 8):
        buffers = [torch.zeros(num_tokens, 1024, device="cuda").half() for _ in range(2)]
        start = torch.randn(num_tokens, 1024, device="cuda").half()

        def chain(buffers=buffers):
            for step in range(48):
                y = marlin_qqq_linear(buffers[step % 2], *tensors, constant_weights=True)
                buffers[1 - step % 2].copy_(y / y.abs().max(dim=1, keepdim=True).values)

        expected = start
        for _ in range(48):
            y = two_ops(expected, *tensors)
            expected = y / y.abs().max(dim=1, keepdim=True).values
        buffers[0].copy_(start)
        chain()
        buffers[0].copy_(start)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(5):
            buffers[0].copy_(start)
            graph.replay()
            assert same_bits(buffers[0], expected)
