"""quantize_model: what is replaced, what is left, and calibration block by block."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import marlin_qqq
from marlin_qqq import QQQLinear
from marlin_qqq.quantization.calibration import stages


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(96, 160, bias=False)
        self.gate_proj = nn.Linear(96, 160)
        self.down = nn.Linear(160, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sigmoid(self.gate(x)) * self.gate_proj(x))


class Model(nn.Module):
    """A small transformer-like model with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 96)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.score = nn.Linear(96, 96)
        self.lm_head = nn.Linear(96, 128, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.score(x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_every_layer_becomes_what_from_linear_makes_of_it(model, group_size, method):
    original = copy.deepcopy(model)
    assert marlin_qqq.quantize_model(model, group_size, method) is model
    for name, linear in original.named_modules():
        layer = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and name != "lm_head":
            expected = QQQLinear.from_linear(linear, group_size, method).state_dict()
            assert isinstance(layer, QQQLinear) and not layer.training
            assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    with torch.no_grad():
        assert (model(tokens()) - original(tokens())).square().mean() < 0.05 * original(tokens()).square().mean()


def test_skip_matches_whole_components_anywhere_in_the_name(model):
    marlin_qqq.quantize_model(model, skip=("lm_head", "gate", "layers.1"))
    kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert kept == {"lm_head", "layers.0.gate", "layers.2.gate"} | {
        f"layers.1.{x}" for x in ("gate", "gate_proj", "down")
    }


def test_tied_embeddings_stay_tied(model):
    with pytest.warns(UserWarning, match="lm_head is left as it is: its weight is shared"):
        marlin_qqq.quantize_model(model, skip=())
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.score, QQQLinear)


def test_layers_that_share_a_weight_share_the_packed_weight(model):
    model.layers[2].gate.weight = model.layers[0].gate_proj.weight
    model.layers[1] = model.layers[0]
    with torch.no_grad():
        expected = QQQLinear.from_linear(model.layers[0].gate_proj).dequantize()
    marlin_qqq.quantize_model(model)
    first, second = model.layers[0].gate_proj, model.layers[2].gate
    assert first.B.data_ptr() == second.B.data_ptr()
    assert first.bias is not None and second.bias is None
    assert model.layers[1] is model.layers[0]
    assert torch.equal(second.dequantize(), expected)


def test_a_layer_with_several_parents_or_names_is_replaced_everywhere():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer, nn.ReLU(), layer)})
    marlin_qqq.quantize_model(model)
    assert isinstance(model["a"], QQQLinear)
    assert model["a"] is model["b"] is model["c"][0] is model["c"][2]


def test_subclasses_of_linear_are_left_to_their_owners():
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2), "out": nn.Linear(64, 64)})
    marlin_qqq.quantize_model(attention)
    assert isinstance(attention["out"], QQQLinear)
    x = torch.randn(3, 1, 64)
    attention["attention"](x, x, x)


def test_progress_is_reported_for_every_layer(model):
    calls: list[tuple[int, int, str]] = []
    marlin_qqq.quantize_model(model, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(1, 11))
    assert {total for _, total, _ in calls} == {10}
    assert calls[-1][2] == "score"


def test_progress_bar_is_drawn(model, capsys):
    marlin_qqq.quantize_model(model, progress=True)
    assert "10/10" in capsys.readouterr().out


@pytest.mark.parametrize("group_size", [128, -1])
def test_gptq_calibrates_block_by_block_and_beats_rounding(model, group_size):
    batches = [tokens(seed) for seed in range(8)]
    with torch.no_grad():
        expected = model(tokens(100))
        rounded = marlin_qqq.quantize_model(copy.deepcopy(model), group_size)(tokens(100))
        solved = marlin_qqq.quantize_model(copy.deepcopy(model), group_size, "gptq", calibration=iter(batches))(
            tokens(100)
        )
    assert (solved - expected).square().mean() < (rounded - expected).square().mean()


def test_calibration_takes_every_form_of_batch_and_sees_quantised_predecessors(model):
    solved = [
        marlin_qqq.quantize_model(copy.deepcopy(model), 128, "gptq", calibration=[batch]).state_dict()
        for batch in (tokens(), (tokens(),), {"tokens": tokens()})
    ]
    for other in solved[1:]:
        assert all(torch.equal(other[key], value) for key, value in solved[0].items())

    # By hand: the second block's Hessian comes from a model whose first block is quantised.
    partly = marlin_qqq.quantize_model(
        copy.deepcopy(model), 128, "gptq", ("lm_head", "layers.1", "layers.2", "score"), calibration=[tokens()]
    )
    seen = []
    partly.layers[1].gate.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        partly(tokens())
    accumulator = marlin_qqq.quantization.HessianAccumulator(96)
    accumulator.add(seen[0])
    layer = QQQLinear.from_linear(model.layers[1].gate, 128, "gptq", hessian=accumulator.hessian)
    assert torch.equal(layer.B, solved[0]["layers.1.gate.B"])


def test_calibration_runs_no_further_than_the_block_needs(model):
    calls = []
    model.layers[2].register_forward_pre_hook(lambda *_: calls.append(1))
    marlin_qqq.quantize_model(model, -1, "gptq", calibration=[tokens(), tokens(1)])
    assert len(calls) == 4, "two batches for its own calibration, two for that of the layer behind it"


def test_stages_are_the_blocks_of_the_outermost_lists(model):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [stage for stage, _ in stages(model, names)] == ["layers.0", "layers.1", "layers.2", "score", "lm_head"]
    nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})])})
    assert stages(nested, ["blocks.0.experts.0"]) == [("blocks.0", ["blocks.0.experts.0"])]


def test_calibration_leaves_no_hooks_behind(model):
    with pytest.raises(ValueError, match=r"the calibration data never reached layers\.0\.gate"):
        marlin_qqq.quantize_model(model, 128, "gptq", calibration=[])
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_bad_calls_are_refused_and_name_the_layer(model):
    with pytest.raises(TypeError, match=r"cannot be replaced in place; use QQQLinear\.from_linear"):
        marlin_qqq.quantize_model(nn.Linear(64, 128))
    with pytest.raises(ValueError, match="group_size is 32; allowed: 128, or -1"):
        marlin_qqq.quantize_model(model, 32)
    with pytest.raises(ValueError, match='"gptq" needs it'):
        marlin_qqq.quantize_model(model, method="gptq")
    with pytest.raises(ValueError, match="others do not"):
        marlin_qqq.quantize_model(model, calibration=[tokens()])
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear to quantise"):
        marlin_qqq.quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"layers\.0\.gate: method is 'awq'"):
        marlin_qqq.quantize_model(model, method="awq")
    model.layers[0].gate.weight.data = model.layers[0].gate.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"layers\.0\.gate: weight is torch.float8_e4m3fn; it must be float16"):
        marlin_qqq.quantize_model(model)
    model.layers[0].gate.weight.data = model.layers[0].gate.weight.data.float()
    with torch.no_grad():
        model.layers[1].down.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.down: weight holds 1 NaN or infinite values"):
        marlin_qqq.quantize_model(model)


def test_no_warning_in_the_ordinary_case(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marlin_qqq.quantize_model(model, 128)
