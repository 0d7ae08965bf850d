"""The plug-in's layers in this process: what they load, and that their outputs are the ops' to the bit."""

from __future__ import annotations

import importlib.metadata
import itertools

import pytest
import torch
import vllm.model_executor.layers.linear as linear_layers
import vllm.model_executor.parameter as parameters
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

import marlin_qqq
import marlin_qqq.integrations.vllm as plugin
from marlin_qqq import QQQLinear, QQQWeight
from marlin_qqq.packing import slice_in_features, slice_out_features

GROUP_SIZES = [128, -1]


@pytest.fixture(autouse=True)
def as_in_the_engine():
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        yield


@pytest.fixture
def as_rank(monkeypatch):
    """Makes vLLM's layers believe that they are rank `rank` of `size`."""

    def set_rank(rank: int, size: int) -> None:
        for module in (linear_layers, parameters):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    set_rank(0, 1)
    return set_rank


def config(group_size: int, **fields) -> plugin.QQQConfig:
    return plugin.QQQConfig.from_config({"quant_method": "qqq", "wbits": 4, "group_size": group_size, **fields})


def module(in_features: int, out_features: int, group_size: int, seed: int = 0, bias: bool = False) -> QQQLinear:
    """A quantised module as a file holds it."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.nn.Linear(in_features, out_features, bias=bias, dtype=torch.float16)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return QQQLinear.from_linear(plain, group_size)


def shard(source: QQQLinear, start: int, stop: int) -> QQQLinear:
    """Outputs start to stop of a module."""
    weight = QQQWeight(*(part.contiguous() for part in slice_out_features(source.quantized_weight(), start, stop)))
    bias = None if source.bias is None else source.bias[start:stop]
    return QQQLinear.from_quantized(weight, bias, source.in_features, stop - start)


def load(layer: LinearBase, source: QQQLinear, shard_id: str | int | None = None) -> None:
    """Loads what a file holds of a module; per-channel files hold no group scales."""
    arguments = () if shard_id is None else (shard_id,)
    for name in ("B", "s_channel", "s_group", "bias"):
        tensor = getattr(source, name)
        if tensor is not None and tensor.numel():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *arguments)


def finish(layer: LinearBase) -> LinearBase:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def output(layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
    result = layer(x)
    return result[0] if isinstance(result, tuple) else result


def activations(num_tokens: int, in_features: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(9)).to(dtype)


# Registration and configuration


def test_entry_point_registers_and_may_be_called_again():
    (entry_point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="marlin_qqq")
    for _ in range(2):
        entry_point.load()()
    assert get_quantization_config("qqq") is plugin.QQQConfig
    assert QUANTIZATION_METHODS.count("qqq") == 1
    assert WEIGHT_LOADER_V2_SUPPORTED.count("QQQLinearMethod") == 1


def test_a_method_that_vllm_has_built_in_is_left_alone(monkeypatch):
    replaced = []
    monkeypatch.setattr(plugin, "QUANTIZATION_METHODS", ["awq", "qqq"])
    monkeypatch.setattr(plugin, "register_quantization_config", lambda name: replaced.append)
    plugin.register()
    assert replaced == []
    monkeypatch.setattr(plugin, "QUANTIZATION_METHODS", ["awq"])
    plugin.register()
    assert replaced == [plugin.QQQConfig]


def test_config_facts():
    # The engine on a CPU asks neither for the capability nor for the list of methods, so they are asked here.
    assert plugin.QQQConfig.get_min_capability() == 80
    assert config(128).get_supported_act_dtypes() == [torch.float16, torch.bfloat16]
    assert config(128).get_name() == "qqq"
    assert plugin.QQQConfig.get_config_filenames() == ["quant_config.json", "quantize_config.json"]
    assert config(-1).settings.group_size == -1
    assert (
        plugin.QQQConfig.from_config({"quant_method": "qqq", "bits": 4, "group_size": 128}).settings.group_size == 128
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"wbits": 8, "group_size": -1}, "4-bit"),
        ({"wbits": 4, "group_size": 64}, "group_size is 64"),
        ({"wbits": 4, "group_size": 128, "desc_act": True}, "desc_act"),
        ({"wbits": 4, "group_size": 128, "lm_head": True}, "lm_head"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        plugin.QQQConfig.from_config({"quant_method": "qqq", **fields})


def test_methods_of_layers(as_rank):
    quantization = config(128, modules_to_not_convert=["lm_head", "layers.0.mlp.down_proj", "layers.1.self_attn"])
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def method(kind, prefix):
        layer = kind.__new__(kind)
        return type(quantization.get_quant_method(layer, prefix))

    assert method(ReplicatedLinear, "model.layers.0.mlp.gate") is plugin.QQQLinearMethod
    assert method(RowParallelLinear, "model.layers.0.mlp.down_proj") is UnquantizedLinearMethod
    assert method(RowParallelLinear, "model.layers.10.mlp.down_proj") is plugin.QQQLinearMethod
    assert method(QKVParallelLinear, "model.layers.0.self_attn.qkv_proj") is plugin.QQQLinearMethod
    assert method(QKVParallelLinear, "model.layers.1.self_attn.qkv_proj") is UnquantizedLinearMethod
    for kind in (VocabParallelEmbedding, ParallelLMHead):
        assert method(kind, "model.embed_tokens") is type(None)


def test_fused_layer_must_be_quantised_as_a_whole():
    quantization = config(128, modules_to_not_convert=["k_proj"])
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj.*k_proj.*only some"):
        quantization.get_quant_method(layer, "layers.0.self_attn.qkv_proj")
    quantization = config(128, modules_to_not_convert=["q_proj", "k_proj", "v_proj"])
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert isinstance(quantization.get_quant_method(layer, "layers.0.self_attn.qkv_proj"), UnquantizedLinearMethod)


def test_experts_are_refused():
    experts = type("RoutedExperts", (torch.nn.Module,), {})()
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.experts"):
        config(128).get_quant_method(experts, "layers.0.mlp.experts")
    assert config(128, modules_to_not_convert=["experts"]).get_quant_method(experts, "layers.0.mlp.experts") is None


# Loading and applying


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_whole_layer(as_rank, kind, group_size, dtype):
    source = module(256, 192, group_size, bias=True)
    layer = kind(256, 192, bias=True, params_dtype=dtype, quant_config=config(group_size), prefix="layers.0.proj")
    load(layer, source)
    x = activations(5, 256, dtype)
    assert torch.equal(output(finish(layer), x), source.to(dtype)(x))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("in_features", [256, 160])  # 160: padded
def test_fused_qkv_with_shared_key_heads(as_rank, group_size, ranks, in_features):
    heads, key_heads, size = 8, 2, 64
    parts = {name: module(in_features, n * size, group_size, seed=i, bias=True)
             for i, (name, n) in enumerate({"q": heads, "k": key_heads, "v": key_heads}.items())}  # fmt: skip
    x = activations(3, in_features)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = QKVParallelLinear(
            in_features,
            size,
            heads,
            key_heads,
            params_dtype=torch.float16,
            quant_config=config(group_size),
            prefix="qkv_proj",
        )
        assert layer.B.weight_loader.__name__ == "weight_loader_v2"
        assert layer.s_channel.weight_loader.__name__ == "weight_loader_v2"
        for name, source in parts.items():
            load(layer, source, name)
        expected = []
        for name, source in parts.items():
            count = (heads if name == "q" else key_heads) * size // ranks
            count = max(count, size)
            start = rank * count % source.out_features if name == "q" else rank * key_heads // ranks * count
            expected.append(shard(source, start, start + count)(x))
        assert torch.equal(output(finish(layer), x), torch.cat(expected, dim=1)), f"rank {rank}"


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_gate_and_up(as_rank, group_size, ranks):
    parts = [module(256, 384, group_size, seed=i) for i in range(2)]
    x = activations(3, 256)
    for rank in range(ranks):
        as_rank(rank, ranks)
        layer = MergedColumnParallelLinear(
            256, [384, 384], bias=False, params_dtype=torch.float16, quant_config=config(group_size), prefix="gate_up"
        )
        assert layer.B.weight_loader.__name__ == "weight_loader_v2"
        for i, source in enumerate(parts):
            load(layer, source, i)
        size = 384 // ranks
        expected = torch.cat([shard(source, rank * size, (rank + 1) * size)(x) for source in parts], dim=1)
        assert torch.equal(output(finish(layer), x), expected), f"rank {rank}"


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", [MergedColumnParallelLinear, QKVParallelLinear])
def test_layers_that_the_file_holds_fused(as_rank, group_size, kind):
    source = module(256, 384, group_size)
    x = activations(3, 256)
    fused = []
    for rank in range(2):
        as_rank(rank, 2)
        arguments = (256, [256, 128]) if kind is MergedColumnParallelLinear else (256, 64, 4, 1)
        if kind is QKVParallelLinear:
            as_rank(0, 1)
        layer = kind(
            *arguments, bias=False, params_dtype=torch.float16, quant_config=config(group_size), prefix="fused"
        )
        load(layer, source)
        fused.append(output(finish(layer), x))
    if kind is QKVParallelLinear:
        assert torch.equal(fused[0], source(x))
    else:
        whole = torch.cat([fused[0][:, :128], fused[1][:, :128], fused[0][:, 128:], fused[1][:, 128:]], dim=1)
        assert torch.equal(whole, source(x))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_row_parallel_shards(as_rank, group_size):
    source = module(512, 128, group_size, bias=True)
    x = activations(4, 512)
    for rank in range(2):
        as_rank(rank, 2)
        layer = RowParallelLinear(
            512, 128, params_dtype=torch.float16, reduce_results=False, skip_bias_add=True,
            quant_config=config(group_size), prefix="down_proj",
        )  # fmt: skip
        load(layer, source)
        weight = slice_in_features(source.quantized_weight(), 256 * rank, 256 * (rank + 1))
        expected = QQQLinear.from_quantized(QQQWeight(*(part.contiguous() for part in weight)))
        mine = x[:, 256 * rank : 256 * (rank + 1)]  # not contiguous, as a caller may have it
        assert torch.equal(output(finish(layer), mine), expected(mine))


# Sizes that do not fill whole tiles


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_padded_qkv(as_rank, group_size, bias):
    parts = {"q": module(160, 160, group_size, 0, bias), "k": module(160, 32, group_size, 1, bias),
             "v": module(160, 32, group_size, 2, bias)}  # fmt: skip
    layer = QKVParallelLinear(
        160, 32, 5, 1, bias=bias, params_dtype=torch.float16, quant_config=config(group_size), prefix="qkv_proj"
    )
    assert layer.B.weight_loader.__name__ == "weight_loader_v2"
    for name, source in parts.items():
        load(layer, source, name)
    x = activations(3, 160)
    assert torch.equal(output(finish(layer), x), torch.cat([source(x) for source in parts.values()], dim=1))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_padded_whole_layer(as_rank, group_size, kind):
    source = module(200, 72, group_size, bias=True)
    layer = kind(200, 72, bias=True, params_dtype=torch.float16, quant_config=config(group_size), prefix="proj")
    load(layer, source)
    x = activations(3, 200)
    assert torch.equal(output(finish(layer), x), source(x))


def test_padded_inputs_with_column_shards(as_rank):
    parts = [module(160, 128, 128, seed=i) for i in range(2)]
    x = activations(3, 160)
    for rank in range(2):
        as_rank(rank, 2)
        layer = MergedColumnParallelLinear(
            160, [128, 128], bias=False, params_dtype=torch.float16, quant_config=config(128), prefix="gate_up_proj"
        )
        for i, source in enumerate(parts):
            load(layer, source, i)
        whole = torch.cat([source(x)[:, 64 * rank : 64 * (rank + 1)] for source in parts], dim=1)
        assert torch.equal(output(finish(layer), x), whole)


def test_per_channel_row_shards_of_part_of_a_tile_row(as_rank):
    # 1408 inputs on 8 ranks: 176 each, which packed rows of 16 allow and the op's multiple of 128 does not.
    codes = torch.randint(-8, 8, (1408, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = marlin_qqq.permute_channel_scale(torch.rand(1, 64, generator=torch.Generator().manual_seed(1)))
    x = activations(3, 1408)
    for rank in range(8):
        as_rank(rank, 8)
        layer = RowParallelLinear(
            1408,
            64,
            bias=False,
            params_dtype=torch.float16,
            reduce_results=False,
            quant_config=config(-1),
            prefix="down",
        )
        layer.B.weight_loader(layer.B, marlin_qqq.pack_weight(codes))
        layer.s_channel.weight_loader(layer.s_channel, scale)
        rows = slice(176 * rank, 176 * (rank + 1))
        padded = torch.nn.functional.pad(codes[rows], (0, 0, 0, 256 - 176))
        empty = torch.empty(0, dtype=torch.float16)
        expected = QQQLinear.from_quantized(QQQWeight(marlin_qqq.pack_weight(padded), scale, empty), None, 176, 64)
        assert torch.equal(output(finish(layer), x[:, rows]), expected(x[:, rows]))


def test_rows_that_no_layer_can_have_are_refused(as_rank):
    layer = RowParallelLinear(200, 72, bias=False, quant_config=config(-1), params_dtype=torch.float16, prefix="proj")
    with pytest.raises(ValueError, match="rows"):
        load(layer, module(512, 72, -1))


# Shards that would cut a tile or a group


@pytest.mark.parametrize(
    "group_size, kind, arguments, message",
    [
        (128, RowParallelLinear, (384, 128), r"layers\.3\.proj.*tensor_parallel_size 2.*in_features 384.*192.*128"),
        (-1, RowParallelLinear, (272, 128), r"layers\.3\.proj.*tensor_parallel_size 2.*in_features 272.*136.*16"),
        (-1, ColumnParallelLinear, (256, 192), r"layers\.3\.proj.*tensor_parallel_size 2.*out_features 192.*96.*64"),
        (128, MergedColumnParallelLinear, (256, [256, 64]), r"tensor_parallel_size 2.*out_features 64.*32.*64"),
        (128, QKVParallelLinear, (256, 32, 8, 2), r"tensor_parallel_size 2.*out_features 64.*32.*64"),
    ],
)
def test_shards_that_cut_are_refused(as_rank, group_size, kind, arguments, message):
    as_rank(1, 2)
    with pytest.raises(ValueError, match=message):
        kind(
            *arguments, bias=False, params_dtype=torch.float16, quant_config=config(group_size), prefix="layers.3.proj"
        )


# After loading


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_memory_stays_and_parameters_become_plain(as_rank, group_size):
    layer = ColumnParallelLinear(256, 128, bias=False, quant_config=config(group_size), params_dtype=torch.float16)
    load(layer, module(256, 128, group_size))
    addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    finish(layer)
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses
    assert {type(parameter) for parameter in layer.parameters()} == {torch.nn.Parameter}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    # Nothing else of the weight's size hangs on the layer.
    assert not list(layer.buffers())
    finish(layer)  # vLLM may process a layer again
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses


def test_columns_out_of_range_are_repaired_in_place(as_rank, caplog):
    source = module(256, 128, 128)
    broken = source.quantized_weight()
    broken = QQQWeight(broken.B, broken.s_channel / 1.5, (broken.s_group.float() * 1.5).half())
    layer = ColumnParallelLinear(
        256, 128, bias=False, quant_config=config(128), params_dtype=torch.float16, prefix="layers.7.up_proj"
    )
    for name, tensor in broken._asdict().items():
        getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    finish(layer)
    repaired, columns = marlin_qqq.check_and_repair(broken)
    assert len(columns) == 128
    x = activations(3, 256)
    assert torch.equal(output(layer, x), QQQLinear.from_quantized(repaired)(x))
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses
    assert "layers.7.up_proj" in caplog.text and "128 columns" in caplog.text


@pytest.mark.parametrize("missing", ["s_channel", "s_group"])
def test_scales_that_no_file_brought_are_noticed(as_rank, missing):
    layer = ColumnParallelLinear(
        256, 128, bias=False, quant_config=config(128), params_dtype=torch.float16, prefix="layers.7.up_proj"
    )
    for name, tensor in module(256, 128, 128).quantized_weight()._asdict().items():
        if name != missing:
            getattr(layer, name).weight_loader(getattr(layer, name), tensor)
    with pytest.raises(ValueError, match=rf"layers\.7\.up_proj.*{missing}"):
        finish(layer)


def test_single_group_without_group_scales_is_per_channel(as_rank):
    source = module(128, 64, -1)
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(128), params_dtype=torch.float16)
    load(layer, source)
    x = activations(3, 128)
    assert torch.equal(output(finish(layer), x), source(x))


@pytest.mark.parametrize("shape", [(0,), (0, 64)])
def test_per_channel_files_may_bring_empty_group_scales(as_rank, shape):
    source = module(128, 64, -1)
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(-1), params_dtype=torch.float16)
    load(layer, source)
    layer.s_group.weight_loader(layer.s_group, torch.empty(shape, dtype=torch.float16))
    x = activations(3, 128)
    assert torch.equal(output(finish(layer), x), source(x))


def test_group_scales_against_the_configuration_are_refused(as_rank):
    layer = ColumnParallelLinear(
        128, 64, bias=False, quant_config=config(-1), params_dtype=torch.float16, prefix="layers.7.up_proj"
    )
    with pytest.raises(ValueError, match=r"layers\.7\.up_proj.*group_size -1.*\[1, 64\]"):
        load(layer, module(128, 64, 128))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("odd", [False, True])
def test_shapes_of_tokens_and_compile(as_rank, group_size, odd):
    sizes = (200, 72) if odd else (256, 128)
    source = module(*sizes, group_size, bias=True)
    layer = ColumnParallelLinear(*sizes, quant_config=config(group_size), params_dtype=torch.float16)
    load(layer, source)
    finish(layer)
    x = activations(6, sizes[0])
    assert torch.equal(output(layer, x.view(2, 3, -1)), source(x).view(2, 3, -1))
    assert output(layer, x[:0]).shape == (0, sizes[1])

    method = layer.quant_method
    compiled = torch.compile(
        lambda x: method.apply(layer, x, layer.bias), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for count in (1, 2, 6):
        assert torch.equal(compiled(x[:count]), source(x[:count]))


def test_the_layer_uses_every_tensor(as_rank):
    """Changing a value of any loaded tensor changes the output: nothing is ignored."""
    source = module(256, 64, 128, bias=True)
    x = activations(2, 256)
    outputs = []
    for changed in (None, "B", "s_channel", "s_group", "bias"):
        layer = ColumnParallelLinear(256, 64, quant_config=config(128), params_dtype=torch.float16)
        load(layer, source)
        if changed == "B":
            layer.B.data[0, 0] ^= 0x11111111
        elif changed:
            getattr(layer, changed).data.view(-1)[0] += 0.25
        outputs.append(output(finish(layer), x))
    for first, second in itertools.combinations(outputs, 2):
        assert not torch.equal(first, second)
