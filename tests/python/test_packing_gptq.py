"""repack_gptq: GPTQ's codes are kept exactly, and what QQQ cannot hold is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import marlin_qqq

STORED_ZERO = {"gptq": 7, "gptq_v2": 8}


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Unsigned 4-bit int64 [8 R, C] -> int32 [R, C], row 8 i + j in bits 4 j."""
    rows, columns = values.shape
    words = (values.reshape(rows // 8, 8, columns) << (4 * torch.arange(8))[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq_layer(in_features, out_features, group_size, checkpoint_format="gptq", seed=0, dtype=torch.float16):
    """Codes 0..15 int64 [K, N] and the four tensors of a symmetric GPTQ layer."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size if group_size > 0 else 1
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 1e-3).to(dtype)
    zeros = torch.full((out_features, groups), STORED_ZERO[checkpoint_format])
    g_idx = torch.arange(in_features, dtype=torch.int32) // (in_features // groups)
    return codes, pack_rows(codes), pack_rows(zeros).t().contiguous(), scales, g_idx


@settings(max_examples=20, deadline=None)
@given(
    in_tiles=st.integers(1, 4),
    out_tiles=st.integers(1, 3),
    group_size=st.sampled_from([128, -1]),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_kept_and_values_are_as_near_as_the_format_allows(
    in_tiles, out_tiles, group_size, checkpoint_format, dtype, seed
):
    codes, qweight, qzeros, scales, g_idx = gptq_layer(
        128 * in_tiles, 64 * out_tiles, group_size, checkpoint_format, seed, dtype
    )
    weight = marlin_qqq.repack_gptq(
        qweight, qzeros, scales, g_idx, group_size=group_size, checkpoint_format=checkpoint_format
    )
    assert weight.group_size == group_size
    assert torch.equal(marlin_qqq.unpack_weight(weight.B, group_size), (codes - 8).to(torch.int8))
    exact = ((codes - 8).double() * scales.double().repeat_interleave(128 * in_tiles // len(scales), 0)).t()
    got = marlin_qqq.dequantize_weight(weight).double()
    channel_scale = marlin_qqq.unpermute_channel_scale(weight.s_channel).double().t()
    if group_size == -1:
        # fp32 holds code * fp16 scale; an fp32 scale leaves one rounding of the product.
        assert torch.equal(channel_scale.t(), scales.double() / 16)
        assert torch.equal(got, exact.float().double())
        return
    # int8 rounding moves a value by half a channel scale at most, the fp16 group scale by 2^-11 of it.
    assert ((got - exact).abs() <= 0.5 * channel_scale + exact.abs() * 2**-10).all()
    assert marlin_qqq.check_and_repair(weight)[1] == []


def test_group_index_may_be_absent_or_empty():
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128)
    expected = marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=128)
    for absent in (None, torch.empty(0, dtype=torch.int32), g_idx.long()):
        got = marlin_qqq.repack_gptq(qweight, qzeros, scales, absent, group_size=128)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_group_of_zero_codes_with_a_huge_scale_stays_finite():
    codes, _, qzeros, scales, g_idx = gptq_layer(256, 64, 128)
    codes[:128, 3] = 8
    scales[0, 3] = 60000.0
    weight = marlin_qqq.repack_gptq(pack_rows(codes), qzeros, scales, g_idx, group_size=128)
    assert marlin_qqq.unpermute_group_scale(weight.s_group)[0, 3] == 0
    assert torch.equal(marlin_qqq.dequantize_weight(weight)[3, :128], torch.zeros(128))


def test_act_order_is_refused_with_the_reason():
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128)
    shuffled = g_idx[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(ValueError, match=r"act-order \(desc_act\) without static groups.*no group index at run time"):
        marlin_qqq.repack_gptq(qweight, qzeros, scales, shuffled, group_size=128)
    # Per-channel there is one group, so the order does not matter.
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, -1)
    marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=-1)


@pytest.mark.parametrize("group_size", [32, 64, 256, 0])
def test_other_group_sizes_are_refused(group_size):
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128)
    with pytest.raises(ValueError, match=rf"group_size is {group_size}; QQQ has groups of 128, or -1"):
        marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=group_size)


def test_zeros_say_which_format_they_are_symmetric_in():
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128, "gptq_v2")
    with pytest.raises(ValueError, match="pass checkpoint_format='gptq_v2'"):
        marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=128)
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128, "gptq")
    with pytest.raises(ValueError, match="pass checkpoint_format='gptq'"):
        marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=128, checkpoint_format="gptq_v2")
    qzeros[1, 2] += 1 << 4  # one zero of one group
    with pytest.raises(ValueError, match=r"qzeros holds 8 where symmetric quantisation has 7.*asymmetric"):
        marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx, group_size=128)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"bits": 8}, ValueError, "bits is 8; QQQ weights have 4 bits"),
        ({"checkpoint_format": "marlin"}, ValueError, "checkpoint_format is 'marlin'; allowed: 'gptq', 'gptq_v2'"),
        ({"qweight": torch.zeros(32, 64)}, TypeError, "qweight is torch.float32; it must be torch.int32"),
        ({"qweight": torch.zeros(32, dtype=torch.int32)}, ValueError, r"qweight has shape \[32\]"),
        ({"qweight": torch.zeros(24, 64, dtype=torch.int32)}, ValueError, "K = 192 and N = 64; K must be"),
        ({"qweight": torch.zeros(32, 80, dtype=torch.int32)}, ValueError, "N = 80"),
        ({"qzeros": torch.zeros(2, 9, dtype=torch.int32)}, ValueError, r"qzeros has shape \[2, 9\].*needs \[2, 8\]"),
        ({"qzeros": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "qzeros is torch.int64"),
        ({"scales": torch.ones(3, 64)}, ValueError, r"scales has shape \[3, 64\].*needs \[2, 64\]"),
        ({"scales": torch.ones(2, 64, dtype=torch.int32)}, TypeError, "scales is torch.int32"),
        ({"scales": torch.full((2, 64), torch.nan)}, ValueError, "scale holds 128 NaN or infinite values"),
        ({"g_idx": torch.zeros(255, dtype=torch.int32)}, ValueError, r"g_idx has shape \[255\]"),
    ],
)
def test_bad_tensors_are_refused(change, error, message):
    _, qweight, qzeros, scales, g_idx = gptq_layer(256, 64, 128)
    arguments = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx, "group_size": 128} | change
    with pytest.raises(error, match=message):
        marlin_qqq.repack_gptq(**arguments)


def test_more_inputs_than_a_product_takes_are_refused():
    words = torch.zeros(1, 1, dtype=torch.int32)
    arguments = words.expand(132224 // 8, 64), words.expand(1033, 8), torch.zeros(1033, 64)
    with pytest.raises(ValueError, match=r"so K = 132224; in_features must be below 132104, where the int32 sum could"):
        marlin_qqq.repack_gptq(*arguments)
