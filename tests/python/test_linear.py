"""QQQLinear's numbers, shapes, dtypes and life as a module. Loading: test_linear_loading.py."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import RecordedCalls
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import marlin_qqq
from marlin_qqq import QQQLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUP_SIZES = [128, -1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_linear(in_features: int, out_features: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def random_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_op_is_promised_constant_weights():
    """What the docstring says: a kernel may fetch them before the one in front of it has ended."""
    layer = QQQLinear.from_linear(random_linear(128, 64), group_size=128)
    with RecordedCalls() as recorded:
        layer(random_input(2, 128))
    ((name, arguments),) = recorded.calls
    assert (name, arguments["constant_weights"]) == ("marlin_qqq_linear", True)


def by_the_formula(layer: QQQLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer from its buffers by the reference alone."""
    layer = copy.deepcopy(layer).cpu()
    x = x.cpu()
    k, n = 16 * layer.B.shape[0], layer.B.shape[1] // 2
    rows = x.reshape(-1, layer.in_features)
    rows = torch.cat([rows, rows.new_zeros(rows.shape[0], k - layer.in_features)], 1)
    a, s_tok = reference.quantize_per_token(rows)
    row, word, nibble = reference.packed_position(k, n, layer.group_size)
    code = (layer.B.long()[row, word] >> (4 * nibble)) & 0xF
    grouped = layer.group_size == 128
    problem = reference.Problem(
        a=a,
        s_tok=s_tok,
        codes=code - 8 if grouped else torch.where(code > 7, code - 16, code),
        channel_scale=layer.s_channel[0, reference.stored_channel_column(n)],
        group_scale=layer.s_group[:, reference.stored_group_column(n)] if grouped else None,
        b_q_weight=layer.B,
        s_ch=layer.s_channel,
        s_group=layer.s_group,
        workspace=marlin_qqq.make_workspace(n, "cpu"),
    )
    output_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    bias = None
    if layer.bias is not None:
        bias = torch.cat([layer.bias.to(output_dtype), torch.zeros(n - layer.out_features, dtype=output_dtype)])
    y = reference.gemm(problem, bias, output_dtype)[:, : layer.out_features]
    return y.reshape(*x.shape[:-1], layer.out_features).to(x.dtype)


@settings(max_examples=30, deadline=None)
@given(
    in_features=st.integers(1, 400),
    out_features=st.integers(1, 200),
    leading=st.lists(st.integers(0, 4), max_size=3),
    group_size=st.sampled_from(GROUP_SIZES),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_size_equals_the_formula(in_features, out_features, leading, group_size, bias, dtype, seed):
    layer = QQQLinear.from_linear(random_linear(in_features, out_features, bias, seed), group_size)
    x = random_input(*leading, in_features, dtype=dtype, seed=seed)
    y = layer(x)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, by_the_formula(layer, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(256, 192), (200, 100)])
def test_every_device_equals_the_formula(device, group_size, dtype, sizes):
    layer = QQQLinear.from_linear(random_linear(*sizes).to(dtype), group_size).to(device)
    x = random_input(3, 7, sizes[0], dtype=dtype)
    assert torch.equal(layer(x.to(device)).cpu(), by_the_formula(layer, x))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_output_is_near_the_float_layer(group_size, method):
    linear = random_linear(512, 256)
    layer = QQQLinear.from_linear(linear, group_size, method)
    x = random_input(64, 512)
    with torch.no_grad():
        error = (layer(x) - linear(x)).square().mean() / linear(x).square().mean()
    assert error < 0.03
    dequantized = nn.functional.linear(x, layer.dequantize(), linear.bias)
    assert (layer(x) - dequantized).square().mean() < 1e-3 * dequantized.square().mean()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_strided_inputs(group_size):
    layer = QQQLinear.from_linear(random_linear(200, 64), group_size)
    base = random_input(6, 5, 400)
    for x in (
        base[..., :200],
        base[::2, :, 100:300],
        base.transpose(0, 1)[..., 50:250],
        base[:, 1, ::2],
        base[0, 0, :200],
    ):
        assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))
    expanded = base[:1, :1, :200].expand(3, 4, 200)
    assert torch.equal(layer(expanded), layer(expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 200), (3, 0, 200), (0, 0, 200)])
def test_empty_inputs(shape):
    y = QQQLinear.from_linear(random_linear(200, 100))(torch.empty(shape, dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 100) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_does_not_depend_on_its_batch(group_size):
    layer = QQQLinear.from_linear(random_linear(256, 128), group_size)
    x = random_input(70, 256)
    whole = layer(x)
    assert all(torch.equal(layer(x[row : row + 1]), whole[row : row + 1]) for row in range(0, 70, 7))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_no_other(value):
    layer = QQQLinear.from_linear(random_linear(256, 128))
    x = random_input(4, 256)
    x[2, 9] = value
    y = layer(x)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_fp32_activations_are_the_fp16_result():
    layer = QQQLinear.from_linear(random_linear(256, 128))
    x = random_input(4, 256, dtype=torch.float16)
    assert torch.equal(layer(x.float()), layer(x).float())
    assert layer(1e6 * x.float()).isinf().any(), "documented: above 65504 the result is infinite"
    assert layer((1e6 * x.float()).bfloat16()).isfinite().all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gptq_on_a_padded_layer_takes_the_unpadded_hessian(group_size):
    linear = random_linear(200, 100)
    x = random_input(2000, 200) @ (torch.eye(200) + 0.2 * random_input(200, 200, seed=1))
    accumulator = marlin_qqq.quantization.HessianAccumulator(200)
    accumulator.add(x)
    solved = QQQLinear.from_linear(linear, group_size, "gptq", hessian=accumulator.hessian)
    nearest = QQQLinear.from_linear(linear, group_size)
    with torch.no_grad():
        expected = nn.functional.linear(x, linear.weight)
    error = [(nn.functional.linear(x, layer.dequantize()) - expected).square().mean() for layer in (solved, nearest)]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_slice_of_a_weight_is_a_layer(group_size):
    """Its rows lie apart, and the op takes none such."""
    weight = marlin_qqq.quantize_weight(random_linear(256, 192).weight, group_size)
    x = random_input(3, 256)
    part = QQQLinear.from_quantized(marlin_qqq.packing.slice_out_features(weight, 64, 128))
    assert torch.equal(part(x), QQQLinear.from_quantized(weight)(x)[:, 64:128])


# Bad input


def test_bad_inputs_are_refused_and_the_next_call_works():
    layer = QQQLinear.from_linear(random_linear(200, 100))
    x = random_input(3, 200)
    expected = layer(x)
    for bad, error, message in (
        (x.double(), TypeError, "x is torch.float64; it must be float16, bfloat16 or float32"),
        (x.int(), TypeError, "x is torch.int32"),
        (x[:, :199], ValueError, r"x has shape \[3, 199\]; the last dimension must be in_features = 200"),
        (torch.tensor(1.0), ValueError, r"x has shape \[\]"),
    ):
        with pytest.raises(error, match=message):
            layer(bad)
        assert torch.equal(layer(x), expected)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="in_features is 0; it must be positive"):
        QQQLinear(0, 64)
    with pytest.raises(ValueError, match="out_features is -1; it must be positive"):
        QQQLinear(64, -1)
    for size in (64.0, "64", None):
        with pytest.raises(TypeError, match=f"in_features is {size!r}; it must be an integer"):
            QQQLinear(size, 64)
    too_large = r"in_features is 132097, padded to 132224; in_features must be below 132104, where the int32 sum could"
    with pytest.raises(ValueError, match=too_large):
        QQQLinear(132097, 64, device="meta")
    with pytest.raises(ValueError, match=too_large):
        QQQLinear.from_linear(nn.Linear(132097, 64, device="meta"))
    assert QQQLinear(132096, 64, device="meta").padded_in_features == 132096
    with pytest.raises(ValueError, match="group_size is 64; allowed: 128, or -1"):
        QQQLinear(64, 64, group_size=64)
    with pytest.raises(TypeError, match=r"linear is a Conv1d; it must be a torch\.nn\.Linear"):
        QQQLinear.from_linear(nn.Conv1d(1, 1, 1))
    weight = marlin_qqq.quantize_weight(torch.ones(64, 128))
    for in_features, out_features in ((129, 64), (128, 65)):
        with pytest.raises(RuntimeError, match="B has shape"):
            QQQLinear.from_quantized(weight, None, in_features, out_features)
    with pytest.raises(RuntimeError, match=r"bias has shape \[63\]"):
        QQQLinear.from_quantized(weight, torch.zeros(63))


# As a module


def fixed_bits(layer: QQQLinear) -> list[torch.Tensor]:
    return [layer.B.clone(), layer.s_channel.clone().view(torch.int32), layer.s_group.clone().view(torch.int16)]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(
    "convert, bias_dtype",
    [
        (lambda module: module.half(), torch.float16),
        (lambda module: module.bfloat16(), torch.bfloat16),
        (lambda module: module.double(), torch.float64),
        (lambda module: module.to(torch.bfloat16), torch.bfloat16),
        (lambda module: module.to(torch.float16).float(), torch.float32),
        (lambda module: module.type(torch.float16), torch.float16),
        (lambda module: module.to(device="cpu", dtype=torch.float16, non_blocking=True), torch.float16),
        (lambda module: module.share_memory(), torch.float32),
    ],
)
def test_conversions_reach_the_bias_alone(group_size, convert, bias_dtype):
    model = nn.Sequential(QQQLinear.from_linear(random_linear(256, 64), group_size))
    before, keys = fixed_bits(model[0]), list(model.state_dict())
    model = convert(model)
    layer = model[0]
    assert (layer.B.dtype, layer.s_channel.dtype, layer.s_group.dtype) == (torch.int32, torch.float32, torch.float16)
    assert layer.bias.dtype == bias_dtype
    assert all(torch.equal(one, other) for one, other in zip(fixed_bits(layer), before, strict=True))
    assert list(model.state_dict()) == keys
    x = random_input(3, 256, dtype=torch.bfloat16)
    assert torch.equal(layer(x), by_the_formula(layer, x))


def test_meta_and_back():
    layer = QQQLinear.from_linear(random_linear(256, 64), 128)
    empty = copy.deepcopy(layer).to("meta")
    assert all(buffer.is_meta for buffer in empty.buffers())
    x = random_input(3, 256)
    with pytest.raises(RuntimeError, match="b_q_weight must be on the device of x, cpu, got meta"):
        empty(x)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_copies_and_pickles_compute_the_same_and_stand_alone(group_size):
    layer = QQQLinear.from_linear(random_linear(200, 100), group_size)
    x = random_input(3, 200)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        other.s_channel.zero_()
    assert torch.equal(layer(x), expected)


def test_repr_names_sizes_and_group():
    layer = QQQLinear(200, 100, bias=False, group_size=128)
    assert repr(layer) == "QQQLinear(in_features=200, out_features=100, bias=False, group_size=128)"
    assert not layer(random_input(2, 200)).any(), "a fresh layer is all zeros"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sizes", [(256, 128), (200, 100)])
def test_compiles_whole_without_recompiling(device, group_size, sizes):
    torch._dynamo.reset()
    layer = QQQLinear.from_linear(random_linear(*sizes), group_size).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (5, 2, 17, 64):
        x = random_input(num_tokens, 3, sizes[0]).to(device)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_an_unbacked_number_of_tokens_compiles_once_for_zero_and_one_too():
    """Without mark_unbacked torch compiles anew for these two sizes, of any model: what the README says."""
    torch._dynamo.reset()
    layer = QQQLinear.from_linear(random_linear(200, 100), 128)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (3, 5, 1, 0):
        x = random_input(num_tokens, 200)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graph_replays_with_changed_inputs():
    layer = QQQLinear.from_linear(random_linear(200, 100), 128).cuda()
    x = random_input(5, 200, dtype=torch.float16).cuda()
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        x.copy_(random_input(5, 200, dtype=torch.float16, seed=seed))
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused():
    layer = QQQLinear.from_linear(random_linear(128, 64))
    with pytest.raises(RuntimeError, match=re.escape("b_q_weight must be on the device of x")):
        layer(random_input(2, 128).cuda())
