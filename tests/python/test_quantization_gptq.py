"""GPTQ against the method it is a fast form of, and what it is for: less output error than rounding to nearest."""

from __future__ import annotations

import pytest
import torch

import marlin_qqq
from marlin_qqq.quantization import HessianAccumulator, gptq, rtn

GROUP_SIZES = [128, -1]


def correlated(num_tokens: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Tokens from a distribution that depends on nothing but K."""
    generator = torch.Generator().manual_seed(in_features)
    mix = torch.eye(in_features) + 0.15 * torch.randn(in_features, in_features, generator=generator)
    return torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(seed)) @ mix


def problem(in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [64, K], activations [1024, K], Hessian [K, K]."""
    weight = torch.randn(64, in_features, generator=torch.Generator().manual_seed(seed + 1))
    x = correlated(1024, in_features, seed)
    accumulator = HessianAccumulator(in_features)
    accumulator.add(x)
    return weight, x, accumulator.hessian


def optimal_brain_quantization(weight, hessian, scales, group_size, order, damping=0.01):
    """The greedy solver that GPTQ speeds up, in fp64: after each input the inverse Hessian of the rest is downdated
    (arXiv:2210.17323, equations 2 and 3), with neither blocks nor a Cholesky factor."""
    rest = weight.double().clone()
    hessian = hessian.double()
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double())
    low, high = (-8, 7) if group_size == 128 else (-7, 7)
    group = 128 if group_size == 128 else len(hessian)
    codes = torch.zeros_like(rest)
    for k in order:
        scale = scales[k // group].double()
        codes[:, k] = torch.round(rest[:, k] / scale).clamp(low, high)
        error = (rest[:, k] - codes[:, k] * scale) / inverse[k, k]
        rest -= error[:, None] * inverse[k]
        inverse = inverse - inverse[:, k, None] * inverse[k] / inverse[k, k]
        inverse[k, k] = 1.0  # done with; anything but 0
    return codes.t()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_equal_the_greedy_solver(group_size, act_order):
    weight, _, hessian = problem(256)
    codes, scales = gptq.quantize(weight, hessian, group_size, act_order=act_order)
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else range(256)
    expected = optimal_brain_quantization(weight, hessian, scales, group_size, order)
    # fp32 against fp64: a weight that lies on a rounding boundary may fall to either side, and its successors follow.
    assert (codes != expected).float().mean() < 1e-3


@pytest.mark.parametrize("damping", [0.001, 1.0])
def test_damping_is_a_fraction_of_the_diagonals_mean(damping):
    weight, _, hessian = problem(256)
    codes, scales = gptq.quantize(weight, hessian, 128, damping=damping)
    expected = optimal_brain_quantization(weight, hessian, scales, 128, range(256), damping)
    assert (codes != expected).float().mean() < 1e-3
    assert (codes != gptq.quantize(weight, hessian, 128)[0]).float().mean() > 1e-2, "a damping that changes something"


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("clip_search", [False, True])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size, clip_search):
    weight, _, _ = problem(256)
    diagonal = torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.1
    for got, expected in zip(
        gptq.quantize(weight, torch.diag(diagonal), group_size, clip_search=clip_search),
        rtn.quantize(weight, group_size, clip_search),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("options", [{}, {"clip_search": True}, {"act_order": True}])
def test_output_error_is_below_that_of_rounding_to_nearest(group_size, options):
    weight, _, hessian = problem(384)
    fresh = correlated(512, 384, seed=100)

    def error(quantized: marlin_qqq.QQQWeight) -> torch.Tensor:
        return (fresh @ (marlin_qqq.dequantize_weight(quantized) - weight).t()).square().mean()

    nearest = marlin_qqq.quantize_weight(weight, group_size, "mse" if "clip_search" in options else "rtn")
    solved = marlin_qqq.quantize_weight(weight, group_size, "gptq", hessian=hessian, **options)
    assert error(solved) < 0.7 * error(nearest)
    assert marlin_qqq.check_and_repair(solved)[1] == []


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_inputs_that_are_always_zero_get_zero_codes_and_leave_the_others_alone(group_size):
    weight, _, hessian = problem(256)
    weight, hessian = weight.clone(), hessian.clone()
    dead = [0, 77, 200, 255]
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] = 1000.0
    codes, scales = gptq.quantize(weight, hessian, group_size)
    assert not codes[dead].any()
    assert scales.max() < 10
    weight[:, dead] = 0
    assert torch.equal(gptq.quantize(weight, hessian, group_size)[0], codes)


def test_inputs_that_are_always_zero_do_not_change_the_damping():
    weight, _, hessian = problem(256)
    alive = [k for k in range(256) if k % 3]
    masked = torch.zeros_like(hessian)
    masked[torch.meshgrid(torch.tensor(alive), torch.tensor(alive), indexing="ij")] = hessian[alive][:, alive]
    codes, _ = gptq.quantize(weight, masked, -1)
    expected, _ = gptq.quantize(weight[:, alive], hessian[alive][:, alive], -1)
    assert (codes[alive] != expected).float().mean() < 1e-3  # the order of the sums differs


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_singular_hessian_is_damped(group_size):
    weight, x, _ = problem(256)
    few = HessianAccumulator(256)
    few.add(x[:3])
    codes, scales = gptq.quantize(weight, few.hessian, group_size, damping=0.0)
    assert torch.isfinite(scales).all() and codes.any()
    assert not gptq.quantize(weight, torch.zeros(256, 256), group_size)[0].any(), "no input was ever non-zero"


def test_hessian_is_the_mean_over_tokens_however_they_come():
    x = correlated(96, 128)
    expected = (x.double().t() @ x.double()) / 96
    pieces = (x[:0], x[:1], x[1:33].reshape(4, 8, 128), x[33:].half())
    accumulator = HessianAccumulator(128)
    for piece in pieces:
        accumulator.add(piece)
    assert accumulator.num_tokens == 96
    torch.testing.assert_close(accumulator.hessian.double(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"activations have shape \[2, 64\]; the last dimension must be 128"):
        accumulator.add(torch.zeros(2, 64))


@pytest.mark.parametrize(
    "hessian, error, message",
    [
        (torch.eye(128), ValueError, r"hessian has shape \[128, 128\]; the weight needs \[256, 256\]"),
        (torch.eye(256, dtype=torch.int32), TypeError, "hessian is torch.int32"),
        (torch.full((256, 256), torch.nan), ValueError, "hessian holds NaN or infinite values"),
        (-torch.eye(256) - 1, ValueError, "hessian is not positive definite"),
    ],
)
def test_bad_hessians_are_refused(hessian, error, message):
    with pytest.raises(error, match=message):
        marlin_qqq.quantize_weight(torch.ones(64, 256), 128, "gptq", hessian=hessian)


def test_arguments_are_left_as_they_are():
    weight, _, hessian = problem(256)
    copies = weight.clone(), hessian.clone()
    gptq.quantize(weight, hessian, 128, act_order=True)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])
