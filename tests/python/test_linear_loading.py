"""QQQLinear's state dict: what is stored, what is refused with a sentence, what is repaired with a warning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import marlin_qqq
from marlin_qqq import QQQLinear

GROUP_SIZES = [128, -1]


def make_layer(group_size: int, in_features: int = 256, out_features: int = 128, bias: bool = True) -> QQQLinear:
    torch.manual_seed(0)
    return QQQLinear.from_linear(nn.Linear(in_features, out_features, bias), group_size)


def empty_like(layer: QQQLinear, device: str = "cpu") -> QQQLinear:
    return QQQLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.group_size, device)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(256, 128), (200, 100)])
@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
def test_round_trip(group_size, bias, sizes, assign, device, tmp_path):
    layer = make_layer(group_size, *sizes, bias)
    k, n = 256, 128
    state = layer.state_dict()
    shapes = {"B": (k // 16, 2 * n), "s_channel": (1, n), "s_group": (k // 128, n) if group_size == 128 else (0,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes | ({"bias": (sizes[1],)} if bias else {})
    save_file(state, tmp_path / "layer.safetensors")
    loaded = empty_like(layer, device)
    result = loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(3, sizes[0])
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("stored", [None, torch.empty(0), torch.empty(0, 128), torch.empty(1, 0)])
def test_per_channel_state_may_lack_group_scales_or_hold_an_empty_tensor(stored):
    layer = make_layer(-1)
    state = layer.state_dict()
    del state["s_group"]
    if stored is not None:
        state["s_group"] = stored.half()
    for device in ("cpu", "meta"):
        loaded = empty_like(layer, device)
        loaded.load_state_dict(dict(state), assign=device == "meta")
        assert loaded.s_group.shape == (0,)
        x = torch.randn(3, 256)
        assert torch.equal(loaded(x), layer(x))


def test_bias_of_another_dtype_is_converted():
    layer = make_layer(128)
    state = layer.state_dict() | {"bias": layer.bias.half()}
    loaded = empty_like(layer)
    loaded.load_state_dict(state)
    assert loaded.bias.dtype == torch.float32
    assert torch.equal(loaded.bias, layer.bias.half().float())


BAD = [
    (128, {"B": lambda t: t[:8]}, r"up\.proj: B has shape \[8, 256\]; .*needs \[16, 256\]"),
    (128, {"B": lambda t: t.long()}, r"up\.proj: B is torch.int64; it must be torch.int32"),
    (128, {"B": lambda t: t.float()}, r"up\.proj: B is torch.float32; it must be torch.int32"),
    (128, {"s_channel": lambda t: t[0]}, r"up\.proj: s_channel has shape \[128\]; .*needs \[1, 128\]"),
    (128, {"s_channel": lambda t: t.half()}, r"up\.proj: s_channel is torch.float16; it must be torch.float32"),
    (128, {"s_group": lambda t: t.float()}, r"up\.proj: s_group is torch.float32; it must be torch.float16"),
    (128, {"s_group": lambda t: t[:1]}, r"up\.proj: s_group has shape \[1, 128\]; .*needs \[2, 128\]"),
    (128, {"s_group": lambda t: t[:0]}, r"up\.proj: s_group has shape \[0, 128\]; .*needs \[2, 128\]"),
    (-1, {"s_group": lambda t: torch.ones(2, 128).half()}, r"s_group has shape \[2, 128\]; .*needs \[0\]"),
    (-1, {"s_channel": lambda t: t / 0}, r"up\.proj: s_channel holds 128 NaN or infinite values"),
    (128, {"s_channel": lambda t: t * torch.nan}, r"up\.proj: s_channel holds 128 NaN or infinite values"),
    (128, {"s_group": lambda t: t * torch.inf}, r"up\.proj: s_group holds 256 NaN or infinite values"),
    (128, {"bias": lambda t: t[:64]}, r"up\.proj: bias has shape \[64\]; .*needs \[128\]"),
    (128, {"bias": lambda t: t.int()}, r"up\.proj: bias is torch.int32; it must be floating point"),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("group_size, changes, message", BAD)
def test_bad_tensors_are_refused_and_change_nothing(group_size, changes, message, assign):
    model = nn.ModuleDict({"up": nn.ModuleDict({"proj": make_layer(group_size)})})
    layer = model["up"]["proj"]
    expected = copy.deepcopy(layer).state_dict()
    state = model.state_dict()
    for key, change in changes.items():
        state[f"up.proj.{key}"] = change(state[f"up.proj.{key}"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("key", ["B", "s_channel", "s_group", "bias"])
def test_missing_and_unexpected_keys_are_reported(key):
    layer = make_layer(128)
    state = layer.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == [key]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(layer.state_dict() | {"weight": torch.zeros(128, 256)})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        make_layer(128, bias=False).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_columns_that_would_wrap_are_repaired_with_a_warning_that_names_the_layer(assign):
    model = nn.ModuleDict({"up": nn.ModuleDict({"proj": make_layer(128)})})
    good = copy.deepcopy(model)
    state = model.state_dict()
    natural = marlin_qqq.unpermute_group_scale(state["up.proj.s_group"])
    natural[:, [5, 77]] *= 1.5
    state["up.proj.s_group"] = stored = marlin_qqq.permute_group_scale(natural)
    before = stored.clone()
    with pytest.warns(UserWarning, match=r"up\.proj: repaired 2 of 128 columns .*the first is 5"):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(stored, before), "the caller's tensors were changed"
    layer = model["up"]["proj"]
    assert marlin_qqq.check_and_repair(layer.quantized_weight())[1] == []
    meant = good["up"]["proj"].dequantize()
    meant[[5, 77]] *= 1.5
    step = marlin_qqq.unpermute_channel_scale(layer.s_channel).t()
    assert ((layer.dequantize() - meant).abs() <= 0.51 * step + meant.abs() * 2**-8).all()


def test_good_weights_load_without_a_warning():
    layer = make_layer(128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty_like(layer).load_state_dict(layer.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_loading_across_devices(group_size):
    layer = make_layer(group_size)
    loaded = empty_like(layer).cuda()
    loaded.load_state_dict(layer.state_dict())
    assert loaded.B.is_cuda
    assigned = empty_like(layer)
    assigned.load_state_dict(loaded.state_dict(), assign=True)
    assert assigned.B.is_cuda
    x = torch.randn(3, 256)
    assert torch.equal(assigned(x.cuda()).cpu(), layer(x))
