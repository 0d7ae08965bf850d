"""Every CUDA kernel variant gives the CPU op's bits: each candidate of the planner is forced in turn."""

from __future__ import annotations

import pytest
import reference
import torch

import marlin_qqq
from marlin_qqq import marlin_qqq_gemm

pytest.importorskip("marlin_qqq._introspection")
pytestmark = pytest.mark.gpu


def device_name() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 128, 257])
@pytest.mark.parametrize("out_features, in_features", [(64, 128), (320, 384), (1024, 2048)])
def test_every_candidate(monkeypatch, group_size, out_dtype, num_tokens, out_features, in_features):
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=num_tokens)
    bias = torch.randn(out_features).to(out_dtype)
    expected = marlin_qqq_gemm(*problem.arguments, bias=bias, out_dtype=out_dtype)
    on_gpu = problem.to("cuda")
    plans = marlin_qqq.candidates(num_tokens, out_features, in_features, group_size, device_name())
    assert plans
    for plan in plans:
        monkeypatch.setenv("MARLIN_QQQ_FAMILY", plan.family)
        monkeypatch.setenv("MARLIN_QQQ_TILE", plan.tile_name)
        monkeypatch.setenv("MARLIN_QQQ_SPLIT", str(plan.split))
        got = marlin_qqq_gemm(*on_gpu.arguments, bias=bias.cuda(), out_dtype=out_dtype)
        assert torch.equal(got.cpu(), expected), str(plan)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("MARLIN_QQQ_FAMILY", "sm42", "MARLIN_QQQ_FAMILY must be sm80 or sm90, got sm42"),
        ("MARLIN_QQQ_SPLIT", "two", "MARLIN_QQQ_SPLIT must be an integer from 1 up, got two"),
        ("MARLIN_QQQ_TILE", "no_such_tile", "no_such_tile"),
    ],
)
def test_bad_override_is_named(monkeypatch, variable, value, message):
    problem = reference.random_problem(3, 64, 128, 128).to("cuda")
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=message):
        marlin_qqq_gemm(*problem.arguments)
    monkeypatch.delenv(variable)
    assert torch.isfinite(marlin_qqq_gemm(*problem.arguments)).any()
