"""Packing: the specification's points, and that packed tensors may be cut and joined without unpacking."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import marlin_qqq
from marlin_qqq import QQQWeight, packing

GROUP_SIZES = [128, -1]


def random_codes(in_features: int, out_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (in_features, out_features), generator=generator, dtype=torch.int8)


def random_weight(in_features: int, out_features: int, group_size: int, seed: int = 0) -> QQQWeight:
    problem = reference.random_problem(1, out_features, in_features, group_size, seed)
    return QQQWeight(problem.b_q_weight, problem.s_ch, problem.s_group)


def assert_equal(got: QQQWeight, expected: QQQWeight) -> None:
    for key, one, other in zip(QQQWeight._fields, got, expected, strict=True):
        assert torch.equal(one, other), key


sizes = {"in_tiles": st.integers(1, 5), "out_tiles": st.integers(1, 4), "group_size": st.sampled_from(GROUP_SIZES)}


@settings(max_examples=25, deadline=None)
@given(**sizes, seed=st.integers(0, 2**31))
def test_pack_equals_reference_and_unpack_inverts(in_tiles, out_tiles, group_size, seed):
    codes = random_codes(in_tiles * (128 if group_size == 128 else 16), out_tiles * 64, seed)
    packed = marlin_qqq.pack_weight(codes, group_size)
    assert torch.equal(packed, reference.pack(codes, group_size))
    assert torch.equal(marlin_qqq.unpack_weight(packed, group_size), codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_pack_takes_any_strides(group_size):
    codes = random_codes(256, 256)
    assert torch.equal(
        marlin_qqq.pack_weight(codes.t(), group_size), marlin_qqq.pack_weight(codes.t().contiguous(), group_size)
    )
    assert torch.equal(
        marlin_qqq.pack_weight(codes[::2], group_size), marlin_qqq.pack_weight(codes[::2].clone(), group_size)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_scale_permutations_equal_reference_and_invert(dtype, rows):
    natural = torch.arange(rows * 192).reshape(rows, 192).to(dtype)
    stored = marlin_qqq.permute_group_scale(natural)
    assert torch.equal(stored, reference.store(natural, reference.stored_group_column(192)))
    assert torch.equal(marlin_qqq.unpermute_group_scale(stored), natural)
    stored = marlin_qqq.permute_channel_scale(natural)
    assert torch.equal(stored, reference.store(natural, reference.stored_channel_column(192)))
    assert torch.equal(marlin_qqq.unpermute_channel_scale(stored), natural)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), group_size=st.sampled_from(GROUP_SIZES))
def test_slicing_commutes_with_packing(data, group_size):
    weight = random_weight(512, 320, group_size)
    first, last = sorted(data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True)))
    part = packing.slice_out_features(weight, 64 * first, 64 * last)
    codes = marlin_qqq.unpack_weight(weight.B, group_size)[:, 64 * first : 64 * last]
    channel_scale = marlin_qqq.unpermute_channel_scale(weight.s_channel)[:, 64 * first : 64 * last]
    assert torch.equal(part.B, marlin_qqq.pack_weight(codes, group_size))
    assert torch.equal(marlin_qqq.unpermute_channel_scale(part.s_channel), channel_scale)
    if group_size == 128:
        group_scale = marlin_qqq.unpermute_group_scale(weight.s_group)[:, 64 * first : 64 * last]
        assert torch.equal(marlin_qqq.unpermute_group_scale(part.s_group), group_scale)
    else:
        assert part.s_group.numel() == 0

    multiple = 128 if group_size == 128 else 16
    ends = st.lists(st.integers(0, 512 // multiple), min_size=2, max_size=2, unique=True)
    first, last = (multiple * end for end in sorted(data.draw(ends)))
    part = packing.slice_in_features(weight, first, last)
    codes = marlin_qqq.unpack_weight(weight.B, group_size)[first:last]
    assert torch.equal(part.B, marlin_qqq.pack_weight(codes, group_size))
    assert torch.equal(part.s_channel, weight.s_channel)
    assert (part.in_features, part.out_features, part.group_size) == (last - first, 320, group_size)


@settings(max_examples=15, deadline=None)
@given(group_size=st.sampled_from(GROUP_SIZES), seed=st.integers(0, 2**31))
def test_concatenation_inverts_slicing(group_size, seed):
    weight = random_weight(384, 192, group_size, seed)
    columns = [packing.slice_out_features(weight, *ends) for ends in ((0, 64), (64, 192))]
    assert_equal(packing.concat_out_features(columns), weight)
    rows = [packing.slice_in_features(weight, *ends) for ends in ((0, 256), (256, 384))]
    assert_equal(packing.concat_in_features(rows), weight)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fused_product_is_the_products_side_by_side(group_size):
    parts = [random_weight(256, 64, group_size, 1), random_weight(256, 128, group_size, 2)]
    a, s_tok = marlin_qqq.quantize_per_token(torch.randn(5, 256, generator=torch.Generator().manual_seed(3)))

    def product(weight: QQQWeight) -> torch.Tensor:
        n = weight.out_features
        workspace = marlin_qqq.make_workspace(n, "cpu")
        return marlin_qqq.marlin_qqq_gemm(a, weight.B, s_tok, weight.s_channel, weight.s_group, workspace, 5, n, 256)

    assert torch.equal(product(packing.concat_out_features(parts)), torch.cat([product(part) for part in parts], 1))


@pytest.mark.parametrize("group_size", [0, 1, 64, 127, 256, None, "128"])
def test_other_group_sizes_are_refused(group_size):
    for call in (marlin_qqq.pack_weight, marlin_qqq.unpack_weight):
        with pytest.raises(ValueError, match=r"group_size is .*; allowed: 128, or -1"):
            call(random_codes(128, 64), group_size)


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(128, 64, dtype=torch.int32), "int8"),
        (torch.zeros(128, dtype=torch.int8), "dimension"),
        (torch.zeros(120, 64, dtype=torch.int8), "multiple of"),
        (torch.zeros(128, 60, dtype=torch.int8), "multiple of 64"),
        (torch.full((128, 64), 8, dtype=torch.int8), r"8"),
        (torch.full((128, 64), -9, dtype=torch.int8), r"-9|-8"),
    ],
)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bad_codes_are_refused(codes, message, group_size):
    with pytest.raises(RuntimeError, match=message):
        marlin_qqq.pack_weight(codes, group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_meta_tensors_give_meta_tensors(group_size):
    packed = marlin_qqq.pack_weight(torch.empty(256, 128, dtype=torch.int8, device="meta"), group_size)
    assert packed.is_meta and packed.shape == (16, 256) and packed.dtype == torch.int32
    codes = marlin_qqq.unpack_weight(packed, group_size)
    assert codes.is_meta and codes.shape == (256, 128) and codes.dtype == torch.int8
    assert marlin_qqq.permute_group_scale(torch.empty(2, 128, device="meta")).is_meta


def test_cuts_through_tiles_are_refused():
    grouped, per_channel = random_weight(256, 128, 128), random_weight(256, 128, -1)
    with pytest.raises(ValueError, match=r"out_features \[0, 32\) cuts a tile; both ends must be multiples of 64"):
        packing.slice_out_features(grouped, 0, 32)
    with pytest.raises(ValueError, match=r"in_features \[0, 16\) cuts a tile; both ends must be multiples of 128"):
        packing.slice_in_features(grouped, 0, 16)
    with pytest.raises(ValueError, match=r"in_features \[8, 16\) cuts a tile; both ends must be multiples of 16"):
        packing.slice_in_features(per_channel, 8, 16)
    for first, last in ((64, 64), (128, 64), (-64, 64), (0, 192)):
        with pytest.raises(ValueError, match=r"is empty or leaves the weight's \[0, 128\)"):
            packing.slice_out_features(grouped, first, last)


def test_weights_that_do_not_fit_are_not_joined():
    weight = random_weight(256, 64, 128)
    with pytest.raises(ValueError, match="weights is empty"):
        packing.concat_out_features([])
    with pytest.raises(ValueError, match=r"in_features of the weights are \[256, 128\]; they must agree"):
        packing.concat_out_features([weight, random_weight(128, 64, 128)])
    with pytest.raises(ValueError, match=r"group_size of the weights are \[128, -1\]"):
        packing.concat_out_features([weight, random_weight(256, 64, -1)])
    with pytest.raises(ValueError, match=r"out_features of the weights are \[64, 128\]"):
        packing.concat_in_features([weight, random_weight(256, 128, 128)])
    with pytest.raises(ValueError, match=r"s_channel of weights\[1\] differs"):
        packing.concat_in_features([weight, random_weight(256, 64, 128, seed=1)])


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_gpu_tensors_are_packed_by_way_of_the_cpu(group_size):
    codes = random_codes(256, 128)
    packed = marlin_qqq.pack_weight(codes.cuda(), group_size)
    assert packed.is_cuda
    assert torch.equal(packed.cpu(), marlin_qqq.pack_weight(codes, group_size))
    assert torch.equal(marlin_qqq.unpack_weight(packed, group_size).cpu(), codes)
