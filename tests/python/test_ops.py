"""Both ops to the bit: the int64 reference on every device, the specification's points, what must not matter."""

from __future__ import annotations

import hashlib

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import marlin_qqq
from marlin_qqq import marlin_qqq_gemm, quantize_per_token

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUP_SIZES = [128, -1]
DTYPES = [torch.float16, torch.bfloat16]
ops = torch.ops.marlin_qqq


def run(problem: reference.Problem, device: str = "cpu", **kwargs) -> torch.Tensor:
    kwargs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    return marlin_qqq_gemm(*problem.to(device).arguments, **kwargs).cpu()


# marlin_qqq_gemm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize(
    "out_features, in_features", [(64, 128), (64, 256), (128, 128), (192, 384), (256, 512), (448, 640)]
)
def test_gemm_equals_reference(device, group_size, num_tokens, out_features, in_features):
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=num_tokens)
    assert reference.same_bits(run(problem, device), reference.gemm(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_output_type_and_bias(device, group_size, out_dtype, with_bias):
    problem = reference.random_problem(21, 192, 256, group_size, seed=1)
    bias = torch.randn(192, generator=torch.Generator().manual_seed(2)).to(out_dtype) if with_bias else None
    got = run(problem, device, bias=bias, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert reference.same_bits(got, reference.gemm(problem, bias, out_dtype))
    assert not with_bias or not reference.same_bits(got, reference.gemm(problem, None, out_dtype))


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    out_tiles=st.integers(1, 4),
    in_tiles=st.integers(1, 4),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**31),
)
def test_gemm_equals_reference_anywhere(num_tokens, out_tiles, in_tiles, group_size, seed):
    problem = reference.random_problem(num_tokens, 64 * out_tiles, 128 * in_tiles, group_size, seed=seed)
    assert reference.same_bits(run(problem), reference.gemm(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_largest_sums(device, group_size):
    """Every |activation| and |weight| at its maximum: int8 saturation or a 16-bit intermediate sum would show."""
    problem = reference.random_problem(5, 64, 4096, group_size, seed=3, extreme=True)
    assert reference.same_bits(run(problem, device), reference.gemm(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("activation, in_features, expected", [(-128, 130944, 46.0), (-127, 132096, 47.875)])
def test_gemm_longest_exact_sums(device, group_size, activation, in_features, expected):
    """Every weight -128: the longest sums that fit int32, with -128 and with what quantize_per_token gives."""
    assert activation * -128 * in_features / 2**20 - 2000 == expected
    assert activation * -128 * in_features < 2**31 <= -128 * -128 * (in_features + 128)
    problem = reference.Problem(
        a=torch.full((2, in_features), activation, dtype=torch.int8),
        s_tok=torch.ones(2, 1),
        codes=torch.full((in_features, 64), -8, dtype=torch.int8),
        channel_scale=torch.full((64,), 2.0**-20),
        group_scale=None,
        b_q_weight=marlin_qqq.pack_weight(torch.full((in_features, 64), -8, dtype=torch.int8), group_size),
        s_ch=torch.full((1, 64), 2.0**-20),
        s_group=torch.full((in_features // 128, 64), 16.0).half() if group_size == 128 else torch.empty(0).half(),
        workspace=marlin_qqq.make_workspace(64, "cpu"),
    )
    assert (run(problem, device, bias=torch.full((64,), -2000.0).half()) == expected).all()


@pytest.mark.parametrize("device", DEVICES)
def test_gemm_overflow_is_infinity(device):
    problem = reference.random_problem(4, 64, 256, 128, seed=4, extreme=True)
    problem = problem._replace(s_tok=torch.full_like(problem.s_tok, 1e6))
    got = run(problem, device)
    assert torch.isinf(got).any()
    assert reference.same_bits(got, reference.gemm(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_nan_token_scale_marks_its_row_only(device, group_size):
    problem = reference.random_problem(6, 128, 256, group_size, seed=5)
    problem.s_tok[2] = float("nan")
    got = run(problem, device)
    assert torch.isnan(got[2]).all()
    rows = [0, 1, 3, 4, 5]
    assert reference.same_bits(got[rows], reference.gemm(problem)[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_gemm_product_out_of_range_wraps(device):
    """Products of 127.5 < |code * s_group| <= 512 give the rounded product modulo 256, on every device."""
    problem = reference.random_problem(9, 64, 128, 128, seed=6)
    scale = (torch.rand(1, 64, generator=torch.Generator().manual_seed(7)) * 64).half()
    problem = problem._replace(group_scale=scale, s_group=reference.store(scale, reference.stored_group_column(64)))
    product = problem.codes.float() * scale.float()
    assert (product.abs() > 128).any()
    assert reference.same_bits(run(problem, device), reference.gemm(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_without_tokens(device, group_size):
    problem = reference.random_problem(0, 128, 256, group_size)
    got = run(problem, device)
    assert got.shape == (0, 128)
    assert got.dtype == torch.float16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_row_does_not_depend_on_its_batch(device, group_size):
    problem = reference.random_problem(200, 192, 512, group_size, seed=8).to(device)
    whole = marlin_qqq_gemm(*problem.arguments)
    for start, stop in [(0, 1), (17, 18), (199, 200), (3, 19), (0, 64), (70, 199)]:
        part = problem._replace(a=problem.a[start:stop], s_tok=problem.s_tok[start:stop])
        assert reference.same_bits(marlin_qqq_gemm(*part.arguments), whole[start:stop])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gemm_of_sliced_weights_is_the_slice(device, group_size):
    """Output features cut at multiples of 64, as tensor parallelism does on packed tensors."""
    problem = reference.random_problem(7, 320, 256, group_size, seed=9)
    whole = reference.gemm(problem)
    for start, stop in [(0, 64), (64, 192), (128, 320)]:
        part = problem._replace(
            codes=problem.codes[:, start:stop],
            b_q_weight=problem.b_q_weight[:, 2 * start : 2 * stop].contiguous(),
            s_ch=problem.s_ch[:, start:stop].contiguous(),
            s_group=problem.s_group[:, start:stop].contiguous() if group_size == 128 else problem.s_group,
        )
        assert reference.same_bits(run(part, device), whole[:, start:stop])


@pytest.mark.parametrize("device", DEVICES)
def test_gemm_leaves_its_arguments(device):
    problem = reference.random_problem(9, 128, 256, 128, seed=10).to(device)
    before = [value.clone() for value in problem]
    marlin_qqq_gemm(*problem.arguments)
    assert all(torch.equal(value, old) for value, old in zip(problem, before, strict=True))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5)])
def test_gemm_token_scale_of_any_shape(shape):
    problem = reference.random_problem(5, 64, 128, -1)
    got = marlin_qqq_gemm(*problem._replace(s_tok=problem.s_tok.reshape(shape)).arguments)
    assert reference.same_bits(got, reference.gemm(problem))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gemm_does_not_depend_on_threads(threads):
    problem = reference.random_problem(33, 448, 384, 128, seed=11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert reference.same_bits(run(problem), reference.gemm(problem))
    finally:
        torch.set_num_threads(before)


# quantize_per_token


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 128), (5, 1000), (2, 3, 64), (40,), (3, 4097)])
def test_quantize_equals_reference(device, dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(12)) * 3).to(dtype)
    quantized, scale = quantize_per_token(x.to(device))
    expected_quantized, expected_scale = reference.quantize_per_token(x)
    assert quantized.shape == x.shape
    assert scale.shape == (*x.shape[:-1], 1)
    assert torch.equal(quantized.cpu(), expected_quantized)
    assert reference.same_bits(scale.cpu(), expected_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_special_rows(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    rows = [
        [0.0, 0.0, -0.0],
        [tiny, -tiny / 2, 0.0],
        [1.0, float("nan"), 2.0],
        [float("inf"), 1.0, 2.0],
        [1.0, -float("inf"), 2.0],
        [torch.finfo(dtype).max, 1.0, -torch.finfo(dtype).max],
        [2.5 / 127, 127 / 127, 0.5 / 127],
    ]
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    quantized, scale = (value.cpu() for value in quantize_per_token(x.to(device)))
    expected_quantized, expected_scale = reference.quantize_per_token(x)
    assert torch.equal(quantized, expected_quantized)
    assert torch.equal(torch.isnan(scale), torch.isnan(expected_scale))
    assert torch.equal(torch.nan_to_num(scale), torch.nan_to_num(expected_scale))
    assert torch.isnan(scale[2:5]).all() and not quantized[2:5].any()
    assert scale[0] == 0 and not quantized[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_quantize_every_fp16_value(device):
    """All finite fp16 values, each as a row's second element beside several maxima."""
    every = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    every = every[torch.isfinite(every)]
    for maximum in [1.0, 0.3332, 65504.0]:
        x = torch.stack([torch.full_like(every, maximum), every], dim=1)
        quantized, scale = quantize_per_token(x.to(device))
        expected_quantized, expected_scale = reference.quantize_per_token(x)
        assert torch.equal(quantized.cpu(), expected_quantized)
        assert reference.same_bits(scale.cpu(), expected_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_strided_views(device, dtype):
    base = torch.randn(6, 5, 48, generator=torch.Generator().manual_seed(13)).to(dtype).to(device)
    views = {
        "column slice": base[:, :, 3:40],
        "row slice": base[1:4],
        "every second row": base[:, ::2],
        "transposed": base.transpose(0, 1),
        "last dimension strided": base[..., ::2],
        "expanded": base[:1].expand(4, 5, 48),
        "one column": base[..., :1],
        "no columns": base[..., :0],
        "no rows": base[:0],
        "permuted": base.permute(2, 0, 1),
    }
    for name, view in views.items():
        quantized, scale = quantize_per_token(view)
        expected_quantized, expected_scale = reference.quantize_per_token(view.cpu())
        assert quantized.is_contiguous(), name
        assert torch.equal(quantized.cpu(), expected_quantized), name
        assert reference.same_bits(scale.cpu(), expected_scale), name


# Packing


@pytest.mark.parametrize(
    "group_size, digest",
    [
        (-1, "3a55170e851bd5a15241714a8810485977b240bf0c16ce92cdd2d8dff0c1b93a"),
        (128, "a71aa3d2b7ec2ecc92597544a4107af414872f137c2cc5d68fde2c15198ea8c4"),
    ],
)
def test_packed_bytes_are_the_specifications(group_size, digest):
    nibbles = (7 * torch.arange(128)[:, None] + 3 * torch.arange(256)[None, :]) % 16
    codes = ((nibbles ^ 8) - 8 if group_size == -1 else nibbles - 8).to(torch.int8)
    packed = ops.pack_weight(codes, group_size)
    assert hashlib.sha256(packed.numpy().astype("<i4").tobytes()).hexdigest() == digest
    assert torch.equal(ops.unpack_weight(packed, group_size), codes)
    assert torch.equal(packed, reference.pack_nibbles(nibbles, group_size))


@pytest.mark.parametrize(
    "k, n, row, word, per_channel, per_group",
    [
        (0, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, 3, 4),
        (0, 1, 0, 16, 1, 0),
        (0, 8, 0, 0, 0, 2),
        (0, 16, 0, 1, 1, 0),
        (0, 64, 0, 128, 1, 0),
        (4, 0, 0, 4, 1, 0),
        (15, 63, 0, 127, 6, 7),
        (17, 75, 1, 176, 2, 6),
    ],
)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_packed_position_of_the_specifications_points(k, n, row, word, per_channel, per_group, group_size):
    packed = torch.zeros(8, 256, dtype=torch.int32)
    empty = ops.unpack_weight(packed, group_size)
    packed[row, word] = 1 << (4 * (per_channel if group_size == -1 else per_group))
    changed = (ops.unpack_weight(packed, group_size) != empty).nonzero()
    assert changed.tolist() == [[k, n]]


@settings(max_examples=20, deadline=None)
@given(out_tiles=st.integers(1, 5), in_tiles=st.integers(1, 5), group_size=st.sampled_from(GROUP_SIZES), data=st.data())
def test_packing_commutes_with_slicing_and_concatenation(out_tiles, in_tiles, group_size, data):
    step = 16 if group_size == -1 else 128
    codes = torch.randint(-8, 8, (step * in_tiles, 64 * out_tiles), dtype=torch.int8)
    packed = ops.pack_weight(codes, group_size)
    assert torch.equal(packed, reference.pack(codes, group_size))
    n0, n1 = sorted([data.draw(st.integers(0, out_tiles)), data.draw(st.integers(0, out_tiles))])
    k0, k1 = sorted([data.draw(st.integers(0, in_tiles)), data.draw(st.integers(0, in_tiles))])
    if n0 < n1 and k0 < k1:
        part = ops.pack_weight(codes[step * k0 : step * k1, 64 * n0 : 64 * n1], group_size)
        assert torch.equal(part, packed[step * k0 // 16 : step * k1 // 16, 128 * n0 : 128 * n1])
    assert torch.equal(ops.pack_weight(torch.cat([codes, codes], 0), group_size), torch.cat([packed, packed], 0))
    assert torch.equal(ops.pack_weight(torch.cat([codes, codes], 1), group_size), torch.cat([packed, packed], 1))


@pytest.mark.parametrize("kind, column", [("group", "stored_group_column"), ("channel", "stored_channel_column")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64,), (1, 128), (3, 192), (0, 64)])
def test_scale_permutation(kind, column, dtype, shape):
    scale = torch.randn(shape).to(dtype)
    stored = getattr(ops, f"permute_{kind}_scale")(scale)
    assert torch.equal(stored, reference.store(scale, getattr(reference, column)(shape[-1])))
    assert torch.equal(getattr(ops, f"unpermute_{kind}_scale")(stored), scale)


def test_workspace():
    workspace = marlin_qqq.make_workspace(320, "cpu")
    assert workspace.dtype == torch.int32
    assert workspace.shape == (80,)
    assert not workspace.any()
    with pytest.raises(ValueError, match="out_features must be a positive multiple of 64, got 100"):
        marlin_qqq.make_workspace(100, "cpu")
