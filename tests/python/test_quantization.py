"""Weights to codes and scales: the specification's formulas in numpy, the clip search, the range check and repair."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import marlin_qqq
from marlin_qqq import QQQWeight
from marlin_qqq.quantization import assemble, int8_weight, rtn

GROUP_SIZES = [128, -1]
TINY = float(np.finfo(np.float32).tiny)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Normal weights whose rows differ in size; a row and a group of zeros; an outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.logspace(-7, 2, out_features)[torch.randperm(out_features, generator=generator), None]
    weight[1] = 0
    weight[2, :128] = 0
    weight[3, 5] *= 100
    return weight


def natural(weight: QQQWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [K, N], channel scales [N], group scales [K/128, N] (empty per-channel) in natural order."""
    codes = marlin_qqq.unpack_weight(weight.B, weight.group_size).numpy()
    group_scale = weight.s_group
    if weight.group_size == 128:
        group_scale = marlin_qqq.unpermute_group_scale(group_scale)
    return codes, marlin_qqq.unpermute_channel_scale(weight.s_channel).numpy()[0], group_scale.numpy()


@settings(max_examples=15, deadline=None)
@given(
    out_tiles=st.integers(1, 3),
    in_tiles=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_per_channel_follows_the_specification(out_tiles, in_tiles, dtype, seed):
    weight = random_weight(64 * out_tiles, 128 * in_tiles, seed).to(dtype)
    codes, channel_scale, group_scale = natural(marlin_qqq.quantize_weight(weight))
    rows = weight.float().numpy()
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(7)
    with np.errstate(invalid="ignore"):
        expected = np.where(scale > 0, np.rint(rows / scale).clip(-7, 7), 0)
    assert np.array_equal(codes, expected.T)
    assert np.array_equal(channel_scale, scale[:, 0] / np.float32(16))
    assert group_scale.shape == (0,)


@settings(max_examples=15, deadline=None)
@given(
    out_tiles=st.integers(1, 3),
    in_tiles=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_per_group_follows_the_specification(out_tiles, in_tiles, dtype, seed):
    weight = random_weight(64 * out_tiles, 128 * in_tiles, seed).to(dtype)
    quantized = marlin_qqq.quantize_weight(weight, group_size=128)
    codes, channel_scale, group_scale = natural(quantized)
    groups = weight.float().numpy().reshape(64 * out_tiles, in_tiles, 128)
    scale = np.float32(2) * np.abs(groups).max(2, keepdims=True) / np.float32(15)
    with np.errstate(invalid="ignore"):
        expected = np.where(scale > 0, np.rint(groups / scale).clip(-8, 7), 0).astype(np.float32)
        expected_channel = np.abs(expected * scale).max((1, 2)) / np.float32(127)
        quotient = scale[:, :, 0] / expected_channel[:, None]
        expected_group = np.where(scale[:, :, 0] > 0, quotient, 0).astype(np.float16)
    assert np.array_equal(codes, expected.reshape(64 * out_tiles, -1).T)
    assert np.array_equal(channel_scale, expected_channel)
    assert np.array_equal(group_scale, expected_group.T)
    assert marlin_qqq.check_and_repair(quantized)[1] == []


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-39, TINY, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite_and_in_range(group_size, method, magnitude):
    generator = torch.Generator().manual_seed(0)
    weight = (2 * torch.rand(64, 256, generator=generator) - 1) * magnitude
    quantized = marlin_qqq.quantize_weight(weight, group_size, method)
    assert marlin_qqq.check_and_repair(quantized)[1] == []
    error = (marlin_qqq.dequantize_weight(quantized).double() - weight.double()).abs().max()
    assert error <= (0.5 * magnitude if magnitude >= 1e-30 else TINY * 256)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_zero_weights_give_zero_scales(group_size):
    codes, channel_scale, group_scale = natural(marlin_qqq.quantize_weight(torch.zeros(64, 256), group_size))
    assert not codes.any() and not channel_scale.any() and not group_scale.any()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_clip_search_takes_the_best_of_forty_scales(group_size):
    """Of 40 ratios between 1 and 0.4 the one with the least squared error, every one tried here in fp64."""
    in_features = 128 if group_size == 128 else 256
    weight = torch.randn(64, in_features, generator=torch.Generator().manual_seed(11))
    weight *= torch.rand(64, in_features, generator=torch.Generator().manual_seed(12)) ** 2  # some rows clip far
    (low, high), levels = ((-8, 7), 7.5) if group_size == 128 else ((-7, 7), 7.0)
    ratios = torch.linspace(1, 0.4, 40, dtype=torch.float64)
    rows = weight.double()[:, None]
    scales = rows.abs().amax(-1, keepdim=True) / levels * ratios[:, None]  # [row, ratio, 1]
    errors = ((rows / scales).round().clamp(low, high) * scales - rows).square().sum(-1)
    found = rtn.find_scales(weight, group_size, clip_search=True).t().double()  # [row, 1]
    index = ((scales[..., 0] / found) - 1).abs().argmin(1)
    assert (scales[range(64), index] / found - 1).abs().max() < 1e-6
    assert (errors[range(64), index] <= errors.amin(1) * (1 + 1e-5)).all()
    assert len(index.unique()) > 10


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_clip_search_never_loses_to_the_full_range(group_size):
    weight = random_weight(128, 512)
    group = 128 if group_size == 128 else 512

    def error(clip_search: bool) -> torch.Tensor:
        codes, scale = rtn.quantize(weight, group_size, clip_search)
        difference = codes.double() * scale.double().repeat_interleave(group, 0) - weight.t().double()
        return difference.square().reshape(-1, group, 128).sum(1)

    full, clipped = error(False), error(True)
    assert (clipped <= full * (1 + 1e-6)).all()  # the search sums in fp32
    assert clipped.sum() < 0.9 * full.sum()
    assert not torch.equal(clipped, full)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_large_weights_are_quantised_in_chunks_alike(group_size, monkeypatch):
    weight = random_weight(192, 256)
    whole = marlin_qqq.quantize_weight(weight, group_size, "mse")
    monkeypatch.setattr(rtn, "_CHUNK_WEIGHTS", 7 * 256)
    for one, other in zip(marlin_qqq.quantize_weight(weight, group_size, "mse"), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_quantisation_treats_outputs_independently(group_size, method):
    weight = random_weight(128, 256)
    whole = marlin_qqq.quantize_weight(weight, group_size, method)
    parts = [marlin_qqq.quantize_weight(weight[rows], group_size, method) for rows in (slice(0, 64), slice(64, 128))]
    for one, other in zip(marlin_qqq.packing.concat_out_features(parts), whole, strict=True):
        assert torch.equal(one, other)


# dequantize_weight


@settings(max_examples=20, deadline=None)
@given(group_size=st.sampled_from(GROUP_SIZES), seed=st.integers(0, 2**31), wrap=st.booleans())
def test_dequantised_weight_is_what_the_op_multiplies_with(group_size, seed, wrap):
    problem = reference.random_problem(3, 128, 256, group_size, seed)
    group_scale = problem.group_scale
    if wrap and group_scale is not None:
        group_scale = (group_scale.float() * 2).half()  # products up to 254 in magnitude
    s_group = problem.s_group
    if group_scale is not None:
        s_group = reference.store(group_scale, reference.stored_group_column(128))
    weight = QQQWeight(problem.b_q_weight, problem.s_ch, s_group)
    expected = reference.int8_weight(problem.codes, group_scale)
    assert torch.equal(int8_weight(weight).long(), expected)
    assert torch.equal(marlin_qqq.dequantize_weight(weight), (expected.float() * problem.channel_scale).t())
    a = torch.eye(256, dtype=torch.int8)
    one = torch.ones(256, 1)
    workspace = marlin_qqq.make_workspace(128, "cpu")
    product = marlin_qqq.marlin_qqq_gemm(a, weight.B, one, weight.s_channel, weight.s_group, workspace, 256, 128, 256)
    assert torch.equal(product, marlin_qqq.dequantize_weight(weight).t().half())


# check_and_repair


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1.02, 4.0), columns=st.sets(st.integers(0, 127), max_size=6))
def test_columns_out_of_range_are_repaired(seed, factor, columns):
    generator = torch.Generator().manual_seed(seed)
    good = marlin_qqq.quantize_weight(torch.randn(128, 256, generator=generator), group_size=128)
    group_scale = marlin_qqq.unpermute_group_scale(good.s_group).clone()
    channel_scale = marlin_qqq.unpermute_channel_scale(good.s_channel).clone()
    for column in columns:
        group_scale[:, column] = (group_scale[:, column].float() * factor).half()
        channel_scale[:, column] /= factor
    bad = QQQWeight(
        good.B, marlin_qqq.permute_channel_scale(channel_scale), marlin_qqq.permute_group_scale(group_scale)
    )
    before = [tensor.clone() for tensor in bad]
    repaired, reported = marlin_qqq.check_and_repair(bad)
    assert all(torch.equal(one, other) for one, other in zip(bad, before, strict=True)), "the input was modified"
    assert reported == sorted(columns)
    if not columns:
        assert all(one is other for one, other in zip(repaired, bad, strict=True))

    codes = marlin_qqq.unpack_weight(bad.B, 128).float()
    product = codes * marlin_qqq.unpermute_group_scale(repaired.s_group).float().repeat_interleave(128, 0)
    assert (product >= -128.25).all() and (product < 127.5).all()
    assert marlin_qqq.check_and_repair(repaired)[1] == []

    # The specification's formulas, and columns in range untouched.
    largest = (codes * group_scale.float().repeat_interleave(128, 0)).abs().amax(0)
    excess = torch.where(torch.tensor([n in columns for n in range(128)]), largest / 127, 1.0)
    assert torch.equal(marlin_qqq.unpermute_channel_scale(repaired.s_channel), channel_scale * excess)
    assert torch.equal(
        marlin_qqq.unpermute_group_scale(repaired.s_group), (group_scale.float() / excess).to(torch.float16)
    )
    # The repaired weight stands for the values that were meant.
    meant = codes * group_scale.float().repeat_interleave(128, 0) * channel_scale
    error = (marlin_qqq.dequantize_weight(repaired).t() - meant).abs()
    step = marlin_qqq.unpermute_channel_scale(repaired.s_channel)
    assert (error <= 0.5 * step + meant.abs() * 2**-9).all()


@pytest.mark.parametrize(
    "code, scale, repaired",
    [
        (7, 127.4 / 7, False),  # rounds to 127
        (7, 18.234375, True),  # 127.64 would wrap to -128
        (-8, 16.03125, False),  # -128.25 rounds to -128
        (-8, 16.046875, True),  # -128.375: upstream's fp16 arithmetic leaves its range
        (1, 127.0, False),
        (1, 127.5, True),
        (0, 60000.0, False),
        (7, -18.28125, False),  # -127.97: a negative scale is as good as any
        (-8, -16.0, True),  # 128
    ],
)
def test_the_range_has_the_ends_that_the_rounding_has(code, scale, repaired):
    codes = torch.zeros(128, 64, dtype=torch.int8)
    codes[17, 9] = code
    s_group = torch.zeros(1, 64, dtype=torch.float16)
    s_group[0, 9] = scale
    weight = QQQWeight(marlin_qqq.pack_weight(codes, 128), torch.ones(1, 64), marlin_qqq.permute_group_scale(s_group))
    assert marlin_qqq.check_and_repair(weight)[1] == ([9] if repaired else [])


def test_per_channel_weights_are_always_in_range():
    problem = reference.random_problem(1, 64, 128, -1, extreme=True)
    weight = QQQWeight(problem.b_q_weight, problem.s_ch, problem.s_group)
    got, repaired = marlin_qqq.check_and_repair(weight)
    assert all(one is other for one, other in zip(got, weight, strict=True)) and repaired == []


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite_are_refused(group_size, value):
    weight = marlin_qqq.quantize_weight(random_weight(64, 128), group_size)
    for key in ("s_channel", "s_group") if group_size == 128 else ("s_channel",):
        scale = getattr(weight, key).clone()
        scale[0, 7] = value
        with pytest.raises(ValueError, match=rf"model\.layer: {key} holds 1 NaN or infinite values"):
            marlin_qqq.check_and_repair(weight._replace(**{key: scale}), "model.layer")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"B": torch.zeros(8, 128)}, TypeError, "B is torch.float32; it must be torch.int32"),
        ({"s_channel": torch.zeros(1, 64).half()}, TypeError, "s_channel is torch.float16; it must be torch.float32"),
        ({"s_group": torch.zeros(1, 64)}, TypeError, "s_group is torch.float32; it must be torch.float16"),
        ({"B": torch.zeros(8, 100, dtype=torch.int32)}, ValueError, r"B has shape \[8, 100\]"),
        ({"B": torch.zeros(0, 128, dtype=torch.int32)}, ValueError, r"B has shape \[0, 128\]"),
        ({"s_channel": torch.zeros(1, 128)}, ValueError, r"s_channel has shape \[1, 128\]; B needs \[1, 64\]"),
        ({"s_channel": torch.zeros(64)}, ValueError, r"s_channel has shape \[64\]"),
        ({"s_group": torch.zeros(2, 64).half()}, ValueError, r"s_group has shape \[2, 64\]"),
        ({"s_channel": torch.zeros(1, 64, device="meta")}, ValueError, "s_channel is on meta, B on cpu"),
    ],
)
def test_tensors_that_form_no_weight_are_refused(change, error, message):
    weight = marlin_qqq.quantize_weight(random_weight(64, 128), 128)._replace(**change)
    for call in (marlin_qqq.check_and_repair, marlin_qqq.dequantize_weight):
        with pytest.raises(error, match=message):
            call(weight)


# Bad arguments


@pytest.mark.parametrize(
    "weight, arguments, error, message",
    [
        (torch.zeros(64, 128, dtype=torch.int32), {}, TypeError, "weight is torch.int32; it must be float16"),
        (torch.zeros(64), {}, ValueError, r"weight has shape \[64\]"),
        (torch.zeros(60, 128), {}, ValueError, "out_features must be a positive multiple of 64"),
        (torch.zeros(64, 100), {}, ValueError, "in_features must be a positive multiple of 128"),
        (torch.zeros(0, 128), {}, ValueError, "out_features must be a positive multiple of 64"),
        (torch.zeros(64, 128), {"group_size": 64}, ValueError, "group_size is 64; allowed: 128, or -1"),
        (torch.zeros(64, 128), {"method": "awq"}, ValueError, "method is 'awq'; allowed: 'rtn', 'mse', 'gptq'"),
        (torch.zeros(64, 128), {"method": "gptq"}, ValueError, "hessian is None"),
        (torch.zeros(64, 128), {"hessian": torch.eye(128)}, ValueError, 'only "gptq" uses one'),
        (torch.zeros(64, 128), {"damping": 0.1}, TypeError, "method 'rtn' has no option 'damping'"),
        (torch.full((64, 128), torch.nan), {}, ValueError, "weight holds 8192 NaN or infinite values"),
        (torch.full((64, 128), torch.inf), {}, ValueError, "weight holds 8192 NaN or infinite values"),
        (torch.full((64, 128), 1e200, dtype=torch.float64), {}, ValueError, "NaN or infinite"),
    ],
)
def test_bad_arguments_are_refused(weight, arguments, error, message):
    with pytest.raises(error, match=message):
        marlin_qqq.quantize_weight(weight, **arguments)


def test_more_inputs_than_a_product_takes_are_refused():
    message = r"weight has shape \[64, 132224\]; in_features must be below 132104, where the int32 sum could overflow"
    with pytest.raises(ValueError, match=message):
        marlin_qqq.quantize_weight(torch.zeros(1, 1).expand(64, 132224))


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"scale has shape \[1, 64\]; codes \[256, 64\] need \[2, 64\]"):
        assemble(torch.zeros(256, 64, dtype=torch.int8), torch.ones(1, 64), 128)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_gpu_weights_give_a_weight_in_range_on_the_gpu(group_size, method):
    weight = random_weight(128, 256).cuda()
    quantized = marlin_qqq.quantize_weight(weight, group_size, method)
    assert all(tensor.is_cuda for tensor in quantized)
    assert marlin_qqq.check_and_repair(quantized)[1] == []
    error = (marlin_qqq.dequantize_weight(quantized) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) * 0.6).all()
