"""Bad input: one message a mistake, naming the argument, its value and what is allowed, and the next call works."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import reference
import torch

from marlin_qqq import make_workspace, marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ops = torch.ops.marlin_qqq
NAMES = ("a", "b_q_weight", "s_tok", "s_ch", "s_group", "workspace", "size_m", "size_n", "size_k")

# What to change in a good call of num_tokens 5, out_features 128, in_features 256, group_size 128 -> the message.
Change = Callable[[dict], object]
MISTAKES: dict[str, tuple[str, Change, str]] = {
    "a dtype": ("a", lambda c: c["a"].float(), "a must be int8, got float32"),
    "b dtype": ("b_q_weight", lambda c: c["b_q_weight"].long(), "b_q_weight must be int32, got int64"),
    "s_tok dtype": ("s_tok", lambda c: c["s_tok"].half(), "s_tok must be float32, got float16"),
    "s_ch dtype": ("s_ch", lambda c: c["s_ch"].double(), "s_ch must be float32, got float64"),
    "s_group dtype": ("s_group", lambda c: c["s_group"].bfloat16(), "s_group must be float16, got bfloat16"),
    "workspace dtype": ("workspace", lambda c: c["workspace"].float(), "workspace must be int32, got float32"),
    "a rank": (
        "a",
        lambda c: c["a"][None],
        "a must have 2 dimensions, [num_tokens, in_features], got shape [1, 5, 256]",
    ),
    "b rank": ("b_q_weight", lambda c: c["b_q_weight"].flatten(), "b_q_weight must have 2 dimensions"),
    "a columns": ("a", lambda c: c["a"][:, :100].contiguous(), "must be a positive multiple of 128, got 100"),
    "a no columns": ("a", lambda c: c["a"][:, :0], "must be a positive multiple of 128, got 0"),
    "b rows": ("b_q_weight", lambda c: c["b_q_weight"][:8].contiguous(), "in_features / 16 = 16, got 8"),
    "b columns": (
        "b_q_weight",
        lambda c: c["b_q_weight"][:, :200].contiguous(),
        "2 * out_features with out_features a positive multiple of 64, got 200",
    ),
    "size_m": ("size_m", lambda c: 6, "size_m must equal a.size(0) = 5, got 6"),
    "size_n": ("size_n", lambda c: 64, "size_n must equal b_q_weight.size(1) / 2 = 128, got 64"),
    "size_k": ("size_k", lambda c: -1, "size_k must equal a.size(1) = 256, got -1"),
    "s_tok count": ("s_tok", lambda c: c["s_tok"][:4], "s_tok must hold num_tokens = 5 values, got shape [4, 1]"),
    "s_ch count": ("s_ch", lambda c: c["s_ch"][:, :64], "s_ch must hold out_features = 128 values, got shape [1, 64]"),
    "s_group shape": (
        "s_group",
        lambda c: c["s_group"][:1],
        "s_group must have shape [in_features / 128, out_features] = [2, 128] (group_size 128), "
        "or no values (per-channel), got [1, 128]",
    ),
    "s_group of another group size": (
        "s_group",
        lambda c: c["s_group"].repeat_interleave(2, dim=0),
        "s_group must have shape [in_features / 128, out_features] = [2, 128]",
    ),
    "workspace size": (
        "workspace",
        lambda c: c["workspace"][:31],
        "workspace must hold at least out_features / 64 * 16 = 32 int32 zeros, got 31",
    ),
    "a strides": ("a", lambda c: c["a"].t().contiguous().t(), "a must be contiguous (row-major), got strides [1, 5]"),
    "b strides": (
        "b_q_weight",
        lambda c: c["b_q_weight"].repeat(1, 2)[:, :256],
        "b_q_weight must be contiguous (row-major), got strides [512, 1] for shape [16, 256]",
    ),
    "s_tok strides": ("s_tok", lambda c: c["s_tok"].repeat(1, 2)[:, :1], "s_tok must be contiguous"),
    "s_ch strides": ("s_ch", lambda c: c["s_ch"].repeat(1, 2)[:, ::2], "s_ch must be contiguous"),
    "s_group strides": ("s_group", lambda c: c["s_group"].t().contiguous().t(), "s_group must be contiguous"),
    "bias dtype": ("bias", lambda c: c["s_ch"][0], "bias must have the output's dtype, float16, got float32"),
    "bias count": (
        "bias",
        lambda c: c["s_ch"][0, :64].half(),
        "bias must hold out_features = 128 values, got shape [64]",
    ),
    "bias strides": ("bias", lambda c: c["s_ch"][0].half().repeat(2)[::2], "bias must be contiguous"),
    "out_dtype": ("out_dtype", lambda c: torch.float32, "out_dtype must be float16 or bfloat16, got float32"),
    "a missing": ("a", lambda c: None, "a must be a tensor, got None"),
    "b missing": ("b_q_weight", lambda c: None, "b_q_weight must be a tensor, got None"),
    "s_tok missing": ("s_tok", lambda c: None, "s_tok must be a tensor, got None"),
    "s_ch missing": ("s_ch", lambda c: None, "s_ch must be a tensor, got None"),
    "s_group missing": (
        "s_group",
        lambda c: None,
        "s_group must be a tensor, got None; for per-channel weights pass a tensor without values",
    ),
    "workspace missing": ("workspace", lambda c: None, "workspace must be a tensor, got None"),
}
# What a fake refuses too: all but strides, which torch.compile may still change.
FAKE_MISTAKES = [mistake for mistake in MISTAKES if "strides" not in mistake]


def good_call(device: str) -> dict:
    problem = reference.random_problem(5, 128, 256, 128, seed=1).to(device)
    return dict(zip(NAMES, problem.arguments, strict=True), bias=None, out_dtype=None)


def expected(device: str) -> torch.Tensor:
    return reference.gemm(reference.random_problem(5, 128, 256, 128, seed=1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_gemm_refuses(mistake, device):
    name, change, message = MISTAKES[mistake]
    call = good_call(device)
    call[name] = change(call)
    with pytest.raises(RuntimeError, match="marlin_qqq_gemm: .*" + re.escape(message)):
        marlin_qqq_gemm(**call)
    assert reference.same_bits(marlin_qqq_gemm(**good_call(device)).cpu(), expected(device))


@pytest.mark.parametrize("mistake", FAKE_MISTAKES)
def test_gemm_refuses_without_memory(mistake):
    """The fake has the op's own sentences."""
    name, change, message = MISTAKES[mistake]
    call = good_call("meta")
    call[name] = change(call)
    with pytest.raises(RuntimeError, match="marlin_qqq_gemm: .*" + re.escape(message)):
        marlin_qqq_gemm(**call)
    assert marlin_qqq_gemm(**good_call("meta")).shape == (5, 128)


@pytest.mark.parametrize("name", ["a", "b_q_weight", "s_tok", "s_ch", "s_group", "workspace", "bias"])
def test_gemm_refuses_a_meta_tensor_among_real_ones(name):
    """It would reach the fake, whose output nothing fills."""
    call = good_call("cpu") | {"bias": torch.zeros(128).half()}
    call[name] = call[name].to("meta")
    with pytest.raises(
        RuntimeError, match=r"marlin_qqq_gemm: .* must be on the device of a, (cpu, got meta|meta, got cpu)"
    ):
        marlin_qqq_gemm(**call)
    assert torch.equal(marlin_qqq_gemm(**good_call("cpu")), expected("cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gemm_refuses_in_features_that_could_overflow(device):
    in_features = 132224  # the first multiple of 128 from 132104 up
    call = good_call(device)
    call |= {"a": torch.zeros(1, in_features, dtype=torch.int8, device=device), "size_m": 1, "size_k": in_features}
    with pytest.raises(RuntimeError, match=r"in_features .* must be below 132104, where the int32 sum .* got 132224"):
        marlin_qqq_gemm(**call)


def test_gemm_accepts_the_largest_in_features():
    problem = reference.random_problem(1, 64, 132096, -1, seed=2)
    assert reference.same_bits(marlin_qqq_gemm(*problem.arguments), reference.gemm(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("device, other", [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("name", ["a", "b_q_weight", "s_tok", "s_ch", "s_group", "workspace", "bias"])
def test_gemm_refuses_mixed_devices(name, device, other):
    call = good_call(device)
    call[name] = torch.zeros(128, device=other).half() if name == "bias" else call[name].to(other)
    of_a, got = (other, device) if name == "a" else (device, other)
    with pytest.raises(RuntimeError, match=rf"marlin_qqq_gemm: .* must be on the device of a, {of_a}.*, got {got}"):
        marlin_qqq_gemm(**call)
    assert reference.same_bits(marlin_qqq_gemm(**good_call("cuda")).cpu(), expected("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a", "b_q_weight", "s_ch", "s_group", "bias"])
def test_gemm_refuses_misaligned_pointers(name):
    call = good_call("cuda")
    call["bias"] = torch.zeros(128, dtype=torch.float16, device="cuda")
    value = call[name]
    storage = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")
    call[name] = storage[1:].view(value.shape).copy_(value)
    with pytest.raises(RuntimeError, match=rf"{name} must start at a multiple of 16 bytes.*storage_offset 1\)"):
        marlin_qqq_gemm(**call)
    assert reference.same_bits(marlin_qqq_gemm(**good_call("cuda")).cpu(), expected("cuda"))


@pytest.mark.parametrize("name", ["a", "b_q_weight", "s_ch", "s_group"])
def test_gemm_on_cpu_takes_any_storage_offset(name):
    call = good_call("cpu")
    value = call[name]
    call[name] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    assert reference.same_bits(marlin_qqq_gemm(**call), expected("cpu"))


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool, torch.complex64])
def test_quantize_refuses_dtype(dtype, device):
    with pytest.raises(RuntimeError, match="quantize_per_token: x must be float16, bfloat16 or float32, got"):
        quantize_per_token(torch.zeros(2, 128, device=device).to(dtype))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantize_refuses_scalar(device):
    with pytest.raises(RuntimeError, match="x must have at least 1 dimension"):
        quantize_per_token(torch.tensor(1.0, device=device))


def test_quantize_refuses_none():
    with pytest.raises(RuntimeError, match="quantize_per_token: x must be a tensor, got None"):
        quantize_per_token(None)


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.complex32, "complex32"),
        (torch.complex64, "complex64"),
        (torch.complex128, "complex128"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.float8_e4m3fnuz, "float8_e4m3fnuz"),
        (torch.float8_e5m2, "float8_e5m2"),
        (torch.float8_e5m2fnuz, "float8_e5m2fnuz"),
        (torch.uint16, "uint16"),
        (torch.uint32, "uint32"),
        (torch.uint64, "uint64"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtypes_have_torchs_names(dtype, name, device):
    with pytest.raises(RuntimeError, match=rf"x must be float16, bfloat16 or float32, got {name}$"):
        quantize_per_token(torch.zeros(2, 128, device=device).to(dtype))


CODES = torch.zeros(128, 64, dtype=torch.int8)
PACKED = torch.zeros(8, 128, dtype=torch.int32)
PACKING_MISTAKES = {
    "codes dtype": (lambda to: ops.pack_weight(to(CODES).int(), 128), "pack_weight: codes must be int8, got int32"),
    "codes rank": (lambda to: ops.pack_weight(to(CODES)[0], 128), "pack_weight: codes must have 2 dimensions"),
    "codes range": (lambda to: ops.pack_weight(to(CODES) + 8, -1), r"codes must be in \[-8, 7\], got 8 at \[0, 0\]"),
    "group size": (lambda to: ops.pack_weight(to(CODES), 64), r"group_size must be 128 or -1 \(per-channel\), got 64"),
    "in_features": (
        lambda to: ops.pack_weight(to(CODES)[:120], -1),
        "in_features must be a positive multiple of 16, got 120",
    ),
    "in_features grouped": (
        lambda to: ops.pack_weight(to(CODES)[:112], 128),
        r"in_features must be a positive multiple of 128 \(group_size 128\), got 112",
    ),
    "out_features": (
        lambda to: ops.pack_weight(to(CODES)[:, :32], -1),
        "out_features must be a positive multiple of 64, got 32",
    ),
    "packed dtype": (
        lambda to: ops.unpack_weight(to(PACKED).long(), -1),
        "unpack_weight: packed must be int32, got int64",
    ),
    "packed rank": (lambda to: ops.unpack_weight(to(PACKED)[0], -1), "unpack_weight: packed must have 2 dimensions"),
    "packed odd": (lambda to: ops.unpack_weight(to(PACKED)[:, :127], -1), r"must be 2 \* out_features, got 127"),
    "packed width": (
        lambda to: ops.unpack_weight(to(PACKED)[:, :64], -1),
        "out_features must be a positive multiple of 64, got 32",
    ),
    "unpack group size": (lambda to: ops.unpack_weight(to(PACKED), 0), "unpack_weight: group_size must be 128 or -1"),
    "group scale width": (lambda to: ops.permute_group_scale(to(torch.zeros(96))), "must be a multiple of 64, got 96"),
    "channel scale width": (
        lambda to: ops.permute_channel_scale(to(torch.zeros(40))),
        "must be a multiple of 32, got 40",
    ),
    "scale dtype": (
        lambda to: ops.permute_group_scale(to(torch.zeros(64).double())),
        "elements of 2 or 4 bytes .* got float64",
    ),
    "scale rank": (lambda to: ops.unpermute_group_scale(to(torch.tensor(1.0))), "scale must have at least 1 dimension"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mistake", PACKING_MISTAKES)
def test_packing_refuses(mistake, device):
    if mistake == "codes range" and device == "meta":
        pytest.skip("a meta tensor has no values")
    call, message = PACKING_MISTAKES[mistake]
    with pytest.raises(RuntimeError, match=message):
        call(lambda tensor: tensor.to(device))


def test_packing_names_the_bad_code():
    codes = CODES.clone()
    codes[77, 13] = -9
    with pytest.raises(RuntimeError, match=r"got -9 at \[77, 13\]"):
        ops.pack_weight(codes, -1)


@pytest.mark.parametrize(
    "out_features, error, message",
    [
        (0, ValueError, "make_workspace: out_features must be a positive multiple of 64, got 0"),
        (65, ValueError, "make_workspace: out_features must be a positive multiple of 64, got 65"),
        (64.0, TypeError, "out_features is 64.0; it must be an integer"),
        ("64", TypeError, "out_features is '64'; it must be an integer"),
    ],
)
def test_make_workspace_refuses(out_features, error, message):
    with pytest.raises(error, match=message):
        make_workspace(out_features, "cpu")


# More bytes than an address space has, so that no setting of the system lets them through.
TOO_MANY_TOKENS = 2**42


@pytest.mark.parametrize(
    "x, message",
    [
        (
            torch.zeros(1, 128).expand(TOO_MANY_TOKENS, 128),
            "out of memory: cannot allocate 562949953421312 bytes on cpu for shape [4398046511104, 128] of int8",
        ),
        (
            torch.zeros(1, 1).expand(TOO_MANY_TOKENS, 128),  # no rows that lie apart: wants a copy
            "out of memory: cannot allocate 2251799813685248 bytes on cpu for shape [4398046511104, 128] of float32",
        ),
        (
            torch.zeros(1, 1).expand(2**55, 128),
            "cannot allocate 2^63 or more bytes on cpu for shape [36028797018963968, 128] of float32",
        ),
    ],
)
def test_quantize_names_what_it_cannot_allocate(x, message):
    with pytest.raises(RuntimeError) as raised:
        quantize_per_token(x)
    assert str(raised.value) == "quantize_per_token: " + message


def test_linear_names_what_it_cannot_allocate():
    out_features = 2**16
    weights = torch.zeros(8, 2 * out_features, dtype=torch.int32), torch.zeros(out_features), torch.empty(0).half()
    with pytest.raises(RuntimeError, match=r"marlin_qqq_linear: out of memory: cannot allocate 281474976579584 bytes"):
        marlin_qqq_linear(torch.zeros(1, 128).expand(2**31 - 1, 128), *weights)
