"""Which launches of a captured graph are planned to stand alone (csrc/cuda/stream_order.h), on the GPU.

The op answers MARLIN_QQQ_TILE=list with the candidates of the launch that it would make, best first, and launches
nothing: also while a graph is captured.
"""

from __future__ import annotations

import pytest
import reference
import torch

from marlin_qqq import make_workspace, marlin_qqq_gemm, marlin_qqq_linear, quantize_per_token

pytestmark = pytest.mark.gpu

SHAPE = (4096, 4096)


class Calls:
    """The ops on one problem, and what they would launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_tokens: int = 16) -> None:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("only the Hopper planner asks what comes before a launch")
        self.monkeypatch = monkeypatch
        self.x = torch.randn(num_tokens, SHAPE[1], device="cuda").half()
        problem = reference.random_problem(num_tokens, *SHAPE, 128, seed=1).to("cuda")
        self.weights = (problem.b_q_weight, problem.s_ch, problem.s_group)
        self.quantized = quantize_per_token(self.x)
        self.workspace = make_workspace(SHAPE[0], "cuda")
        self.elsewhere = torch.zeros(4, device="cuda")
        self.elsewhere.add_(1)

    def linear(self) -> torch.Tensor:
        return marlin_qqq_linear(self.x, *self.weights, constant_weights=True)

    def product(self) -> torch.Tensor:
        a, s_tok = self.quantized
        sizes = (self.x.shape[0], *SHAPE)
        weight, s_ch, s_group = self.weights
        return marlin_qqq_gemm(a, weight, s_tok, s_ch, s_group, self.workspace, *sizes, constant_weights=True)

    def candidates(self, standalone: str | None = None) -> str:
        """Of a product that comes next, by what the stream says or by what the environment does."""
        with self.monkeypatch.context() as patch:
            patch.setenv("MARLIN_QQQ_TILE", "list")
            if standalone is not None:
                patch.setenv("MARLIN_QQQ_STANDALONE", standalone)
            with pytest.raises(ValueError) as answer:
                self.product()
        return str(answer.value)


def test_what_comes_before_a_launch_decides(monkeypatch):
    calls = Calls(monkeypatch)
    calls.linear()
    overlapping, standing_alone = calls.candidates("0"), calls.candidates("1")
    assert overlapping != standing_alone
    assert calls.candidates() == overlapping, "outside of a capture nothing is known"

    seen = {}
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        seen["nothing"] = calls.candidates()
        calls.product()
        seen["a product"] = calls.candidates()
        calls.elsewhere.add_(1)
        seen["another kernel"] = calls.candidates()
        quantize_per_token(calls.x)
        seen["a quantisation behind another kernel"] = calls.candidates()
        calls.product()
        seen["its product"] = calls.candidates()
        quantize_per_token(calls.x)
        seen["a quantisation behind a product"] = calls.candidates()
        calls.elsewhere.add_(1)
        calls.linear()
        seen["a layer"] = calls.candidates()
    alone = {name for name, candidates in seen.items() if candidates == standing_alone}
    assert alone == {"nothing", "another kernel", "a quantisation behind another kernel"}
    assert all(candidates in (overlapping, standing_alone) for candidates in seen.values())


def test_a_launch_on_another_stream_or_graph_is_none_of_its_own(monkeypatch):
    calls = Calls(monkeypatch)
    calls.linear()
    standing_alone = calls.candidates("1")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        calls.product()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        calls.product()  # the side stream's last launch is the one before
        with torch.cuda.stream(side):
            assert calls.candidates() == standing_alone
        torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert calls.candidates() == standing_alone, "the first launch of a new graph"


@pytest.mark.parametrize("value", ["2", "yes", "-1"])
def test_what_the_environment_may_say(monkeypatch, value):
    calls = Calls(monkeypatch)
    monkeypatch.setenv("MARLIN_QQQ_STANDALONE", value)
    with pytest.raises(
        (RuntimeError, ValueError), match=f"MARLIN_QQQ_STANDALONE must be an integer from 0 to 1, got {value}"
    ):
        calls.product()


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 48, 200])
def test_layers_between_other_kernels_have_the_same_bits(monkeypatch, num_tokens):
    """What a served model captures, replayed with new activations."""
    calls = Calls(monkeypatch, num_tokens)
    incoming = torch.randn_like(calls.x)
    graph, outputs = torch.cuda.CUDAGraph(), []
    calls.linear()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for scale in (1.0, 2.0, 0.5, -1.0):
            torch.mul(incoming, scale, out=calls.x)
            outputs.append(calls.linear())
            outputs.append(calls.linear())
    for seed in range(20):
        incoming.copy_(torch.randn(incoming.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for index, scale in enumerate((1.0, 2.0, 0.5, -1.0)):
            torch.mul(incoming, scale, out=calls.x)
            expected = calls.linear()
            assert torch.equal(outputs[2 * index], expected), (seed, scale)
            assert torch.equal(outputs[2 * index + 1], expected), (seed, scale, "behind a layer")
