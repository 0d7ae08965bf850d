"""The reference that the benchmark compares with before it times: it accepts the op's bits and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import marlin_qqq
from marlin_qqq.bench import check
from marlin_qqq.bench.implementations.base import Context
from marlin_qqq.bench.inputs import make_activations, make_generator, make_packed_weights
from marlin_qqq.bench.problem import GemmProblem


def make(tokens: int, n: int, k: int, group_size: int, dtype: torch.dtype = torch.float16):
    problem = GemmProblem(tokens, n, k, group_size)
    generator = make_generator("cpu", seed=tokens + n + k)
    activations = make_activations(tokens, k, dtype, "cpu", generator)
    return problem, activations, make_packed_weights(problem, 2, "cpu", generator)


def run_op(problem, activations, weights, dtype=torch.float16, bias=None):
    return marlin_qqq.marlin_qqq_gemm(
        activations.quantized[0],
        weights.packed[0],
        activations.token_scale[0],
        weights.channel_scale[0],
        weights.group_scale[0],
        marlin_qqq.make_workspace(problem.out_features, "cpu"),
        problem.num_tokens,
        problem.out_features,
        problem.in_features,
        bias=bias,
        out_dtype=dtype,
    )


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([-1, 128]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_the_ops_result_is_exact(tokens, n, k, group_size, dtype, with_bias):
    problem, activations, weights = make(tokens, 64 * n, 128 * k, group_size)
    bias = torch.randn(problem.out_features).to(dtype) if with_bias else None
    reference = check.gemm_reference(problem, activations, weights, dtype, bias, "cpu")
    assert (
        reference.compare(run_op(problem, activations, weights, dtype, bias)) == "exact (float64 formula, every value)"
    )


@pytest.mark.parametrize("group_size", [-1, 128])
def test_sampled_bands_accept_the_op_and_say_what_they_are(group_size, monkeypatch):
    problem, activations, weights = make(300, 512, 256, group_size)
    monkeypatch.setitem(check.WHOLE_REFERENCE_OPERATIONS, "float64 formula", 300 * 512 * 256 - 1)
    reference = check.gemm_reference(problem, activations, weights, torch.float16, None, "cpu")
    output = run_op(problem, activations, weights)
    assert reference.compare(output) == (
        "exact (float64 formula, 32 of 300 rows with all columns, 128 of 512 columns with all rows)"
    )
    rows = reference.bands[0].rows.tolist()
    assert rows[0] == 0 and rows[-1] == 299
    assert max(b - a for a, b in itertools.pairwise(rows)) < 2 * 300 / 32 + 1


@pytest.mark.parametrize("band", ["rows", "first columns", "last columns"])
def test_one_wrong_bit_in_any_band_is_wrong(band, monkeypatch):
    """Each band alone finds a value that no other band holds."""
    problem, activations, weights = make(300, 512, 256, 128)
    monkeypatch.setitem(check.WHOLE_REFERENCE_OPERATIONS, "float64 formula", 300 * 512 * 256 - 1)
    reference = check.gemm_reference(problem, activations, weights, torch.float16, None, "cpu")
    rows, first, last = reference.bands
    of_rows = set(rows.rows.tolist())
    of_columns = {*range(512)[first.columns], *range(512)[last.columns]}
    row = min(of_rows if band == "rows" else set(range(300)) - of_rows)
    column = {
        "rows": min(set(range(512)) - of_columns),
        "first columns": first.columns.start + 5,
        "last columns": last.columns.stop - 1,
    }[band]
    output = run_op(problem, activations, weights)
    output.view(torch.int16)[row, column] ^= 1
    assert reference.compare(output).startswith("WRONG: 1 of ")


@pytest.mark.parametrize("group_size", [-1, 128])
def test_the_gpu_runs_reference_is_the_cpu_op(group_size):
    problem, activations, weights = make(5, 192, 256, group_size)
    reference = check.gemm_reference(problem, activations, weights, torch.bfloat16, None, "cuda:0")
    assert reference.compare(run_op(problem, activations, weights, torch.bfloat16)) == "exact (cpu op, every value)"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 8), st.integers(0, 127))
def test_one_wrong_bit_anywhere_is_wrong(row, column):
    problem, activations, weights = make(9, 128, 128, 128)
    reference = check.gemm_reference(problem, activations, weights, torch.float16, None, "cpu")
    output = run_op(problem, activations, weights)
    output.view(torch.int16)[row, column] ^= 1
    verdict = reference.compare(output)
    assert verdict.startswith("WRONG: 1 of 1152 values differ from the float64 formula")


@pytest.mark.parametrize(
    "spoil", [lambda out: out[:-1], lambda out: out.to(torch.bfloat16), lambda out: out * float("nan")]
)
def test_wrong_shapes_types_and_nan_are_wrong(spoil):
    problem, activations, weights = make(3, 64, 128, -1)
    reference = check.gemm_reference(problem, activations, weights, torch.float16, None, "cpu")
    assert reference.compare(spoil(run_op(problem, activations, weights))).startswith("WRONG")


def test_close_check_has_a_bound():
    expected = torch.randn(4, 64)
    assert check.close_check(lambda: expected, expected * 1.001, 0.01).startswith("close")
    assert check.close_check(lambda: expected, expected * 1.1, 0.01).startswith("WRONG")
    assert check.close_check(lambda: expected, expected * float("nan"), 0.01).startswith("WRONG")


def test_the_weights_copies_differ_and_stay_in_range():
    _, _, weights = make(1, 128, 256, 128)
    assert not torch.equal(weights.packed[0], weights.packed[1])
    codes = marlin_qqq.unpack_weight(weights.packed[0], 128)
    scales = marlin_qqq.unpermute_group_scale(weights.group_scale[0]).float().repeat_interleave(128, dim=0)
    assert (codes.float() * scales).abs().max() <= 127.0
    # A kernel that reads another group's or column's scale must give another result.
    stored = weights.group_scale[0]
    assert stored.shape == (2, 128)
    assert (stored[0] != stored[1]).float().mean() > 0.9
    assert all(len(row.unique()) > 100 for row in stored)
    assert not torch.equal(stored, weights.group_scale[1])
    assert len(weights.channel_scale[0].unique()) > 100


def test_activations_are_quantised_as_the_op_quantises_them():
    activations = make_activations(33, 384, torch.float16, "cpu", make_generator("cpu", 1))
    for x, quantized, scale in zip(activations.x, activations.quantized, activations.token_scale, strict=True):
        expected, expected_scale = marlin_qqq.quantize_per_token(x)
        assert torch.equal(quantized, expected)
        assert torch.equal(scale, expected_scale)


def test_references_are_shared_between_variants_and_dropped_with_the_batch():
    context = Context("cpu", torch.float16, l2_bytes=0)
    problem, activations, _ = make(2, 64, 128, 128)
    first = context.reference(problem, activations)
    assert context.reference(problem, activations) is first
    assert context.reference(problem, activations, torch.bfloat16) is not first
    context.forget_batch()
    assert context.reference(problem, activations) is not first
