"""The Transformers plug-in: from_pretrained, save_pretrained, generate, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from folders import FAMILIES, VOCABULARY, rewrite_config, rewrite_tensors, save_float_folder, tiny_model
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from marlin_qqq import QQQLinear, enable_transformers, quantize_model
from marlin_qqq.checkpoint import CheckpointError, TensorFolder, load_quantized_model, write_checkpoint
from marlin_qqq.checkpoint.reader import QuantizedModule
from marlin_qqq.convert import convert
from marlin_qqq.integrations.transformers import QQQConfig, QQQQuantizer, replace_linear_layers
from marlin_qqq.quantization import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(24)[None] * 7 % VOCABULARY
# Token 0 is in TOKENS; without a mask generate would take it for padding.
GREEDY = {
    "max_new_tokens": 32,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_mask": torch.ones_like(TOKENS),
}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def enabled() -> None:
    enable_transformers()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(quantize_model(tiny_model(), 128), tmp_path / "q")
    return tmp_path / "q"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS.to(next(model.parameters()).device)).logits


def assert_equal_tensors(first: Path, second: Path) -> None:
    one, other = TensorFolder(first), TensorFolder(second)
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert one.tensors[name].dtype == other.tensors[name].dtype
        assert torch.equal(one.read(name), other.read(name)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group_size", [128, -1])
def test_load_and_save_round_trip(tmp_path: Path, family: str, group_size: int) -> None:
    reference = quantize_model(tiny_model(family), group_size)
    write_checkpoint(reference, tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(model), logits(reference))
    model.save_pretrained(tmp_path / "again")
    assert_equal_tensors(tmp_path / "q", tmp_path / "again")
    first = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == first
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(reference))


@pytest.mark.parametrize("group_size", [128, -1])
def test_quantize_model_saves_to_the_same_layout(tmp_path: Path, group_size: int) -> None:
    model = save_float_folder(tmp_path / "float", "qwen2", tie_word_embeddings=True)
    convert(tmp_path / "float", tmp_path / "converted", group_size=group_size, clip=False)
    quantize_model(model, group_size).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(TensorFolder(tmp_path / "saved").files) > 1
    assert_equal_tensors(tmp_path / "converted", tmp_path / "saved")
    for name in ("converted", "saved"):
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["wbits"], config["group_size"]) == ("qqq", 4, group_size)


def test_quantising_while_loading(tmp_path: Path) -> None:
    model = save_float_folder(tmp_path / "float")
    config = QQQConfig(group_size=128, modules_to_not_convert=["lm_head", "o_proj"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert type(loaded.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert torch.equal(logits(loaded), logits(quantize_model(model, 128, skip=("lm_head", "o_proj"))))
    loaded.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(load_quantized_model(tmp_path / "q")), logits(loaded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_changes_activations_and_not_the_format(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QQQLinear)
    assert (layer.B.dtype, layer.s_channel.dtype, layer.s_group.dtype) == (torch.int32, torch.float32, torch.float16)
    assert model.lm_head.weight.dtype == dtype
    assert logits(model).dtype == dtype and bool(torch.isfinite(logits(model)).all())


def test_greedy_generation_follows_the_logits(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generated = model.generate(TOKENS, **GREEDY | {"max_new_tokens": 12})
    with torch.inference_mode():
        # One pass over all tokens gives every step's logits again: a row's result does not depend on the batch.
        predicted = model(generated).logits[0, TOKENS.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(generated[0, TOKENS.shape[1] :], predicted)


def test_base_model_without_its_head(folder: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.layers[1].self_attn.q_proj, QQQLinear)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_sizes_with_padding(tmp_path: Path) -> None:
    model = quantize_model(tiny_model("qwen2", head_dim=24), 128)  # q [96, 128], k [48, 128], o [128, 96]
    assert model.model.layers[0].self_attn.k_proj.padded_out_features == 64
    model.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(load_quantized_model(tmp_path / "q")), logits(model))


def test_original_flavour_with_empty_group_scales(tmp_path: Path) -> None:
    reference = quantize_model(tiny_model(), -1)
    write_checkpoint(reference, tmp_path / "q")
    rewrite_tensors(tmp_path / "q", {f"{LAYER}.s_group": torch.empty(0, dtype=torch.float16)})
    rewrite_config(
        tmp_path / "q", quantization_config={"quant_method": "qqq", "bits": 4, "group_size": -1, "sym": True}
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q")), logits(reference))


def test_side_file_of_older_folders(folder: Path) -> None:
    expected = logits(load_quantized_model(folder))
    rewrite_config(folder, quantization_config=None)
    (folder / "quant_config.json").write_text(json.dumps({"wbits": 4, "group_size": 128}))
    assert torch.equal(logits(load_quantized_model(folder)), expected)


def test_range_is_repaired_on_loading(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = quantize_weight(torch.randn(256, 128), 128)
    change = {f"{LAYER}.{key}": value for key, value in weight._asdict().items()}
    rewrite_tensors(folder, change | {f"{LAYER}.s_group": weight.s_group * 1.5})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert f"{LAYER}: 256 columns" in caplog.text
    layer = model.get_submodule(LAYER)
    assert bool((layer.s_channel > weight.s_channel).all())
    x = torch.randn(3, 128)
    real = x @ (1.5 * layer.dequantize()).t() / 1.5
    assert float((layer(x) - real).norm() / real.norm()) < 0.02  # int8 activations; a wrapped column is off by 100 %


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.B": torch.zeros(8, 256, dtype=torch.int32)}, "s_channel has shape"),
        ({f"{LAYER}.s_channel": torch.full((1, 256), float("nan"))}, f"{LAYER}: s_channel holds 256 NaN"),
        ({f"{LAYER}.s_channel": None}, "no s_channel"),
        ({"model.norm.weight": torch.ones(64).half()}, r"model\.norm\.weight .* shape \[64\]; \[128\] is needed"),
        ({"model.embed_tokens.weight": torch.ones(9, 128).half()}, r"shape \[9, 128\]"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, change: dict, message: str) -> None:
    rewrite_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_sizes_of_another_model_are_refused(folder: Path) -> None:
    rewrite_config(folder, intermediate_size=512)
    with pytest.raises(CheckpointError, match=r"holds \[128, 256\] weights; the model's layer has \[128, 512\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_tensors_are_refused(folder: Path) -> None:
    rewrite_tensors(folder, {"model.layers.1.input_layernorm.weight": None})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of the model, such as model\.layers\.1\.input_layernorm"
    ):
        load_quantized_model(folder)
    change = {f"{LAYER}.{key}": None for key in ("B", "s_channel", "s_group")}
    rewrite_tensors(folder, change | {"model.layers.1.input_layernorm.weight": torch.ones(128).half()})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* such as model\.layers\.0\.mlp\.up_proj"):
        load_quantized_model(folder)


def test_layers_on_disk_are_refused() -> None:
    quantizer = QQQQuantizer(QQQConfig(128), pre_quantized=True)
    quantizer.validate_environment(device_map={"model": "cpu", "lm_head": 0})
    with pytest.raises(ValueError, match="device_map sends layers to disk; QQQ layers stay in memory"):
        quantizer.validate_environment(device_map={"model": "cpu", "lm_head": "disk"})


def test_a_checkpoint_of_another_model_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without one layer in common nothing would be loaded; a part that is not there is ignored, with a word."""
    model = tiny_model()
    other = QuantizedModule("encoder.0.proj", 128, 256, 128, False)
    with pytest.raises(
        CheckpointError, match=r"none of the 1 quantised modules \(such as encoder\.0\.proj\) is in the"
    ):
        replace_linear_layers(model, [other])
    assert not any(isinstance(module, QQQLinear) for module in model.modules())
    assert replace_linear_layers(model, [other, QuantizedModule(LAYER, 128, 256, 128, False)]) == 1
    assert isinstance(model.get_submodule(LAYER), QQQLinear)
    assert "1 quantised modules are not in the model and ignored, such as encoder.0.proj" in caplog.text


def test_the_weights_cannot_be_trained(folder: Path) -> None:
    """The Trainer asks this."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.hf_quantizer.is_trainable is False
    assert not any(parameter.requires_grad for parameter in model.get_submodule(LAYER).parameters())


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(128)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="never opened"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="never opened"):
        load_quantized_model(folder)


def test_registering_twice_does_nothing() -> None:
    before = AUTO_QUANTIZER_MAPPING["qqq"], AUTO_QUANTIZATION_CONFIG_MAPPING["qqq"]
    enable_transformers()
    enable_transformers()
    assert (AUTO_QUANTIZER_MAPPING["qqq"], AUTO_QUANTIZATION_CONFIG_MAPPING["qqq"]) == before


def test_what_a_user_sees_who_forgets_the_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """docs/transformers.md quotes this: a warning, and a model whose weights are random."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "qqq")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "qqq")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # the demo turns them down for the whole process
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.get_submodule(LAYER)) is torch.nn.Linear
    assert "Unknown quantization type, got qqq" in caplog.text and "MISSING" in caplog.text
    enable_transformers()
    assert type(AutoModelForCausalLM.from_pretrained(folder).get_submodule(LAYER)) is QQQLinear


def test_compiled_decoding_without_graph_breaks(folder: Path) -> None:
    """With a static cache generate compiles its decoding step; aot_eager traces as inductor does, in less time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    eager = model.generate(TOKENS, cache_implementation="static", **GREEDY)
    configuration = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    configuration._compile_all_devices = True
    counters.clear()
    compiled = model.generate(TOKENS, cache_implementation="static", compile_config=configuration, **GREEDY)
    assert torch.equal(compiled, eager)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [128, -1])
def test_gpu_generation_equals_the_cpu(tmp_path: Path, group_size: int) -> None:
    """Every layer's output equals the CPU op's to the bit. A compiled static cache with CUDA graphs gives the same
    tokens every time, and only tokens that the eager model finds best or next to it: the compiler keeps norms in fp32
    where eager rounds to fp16, which may turn a near tie."""
    write_checkpoint(quantize_model(tiny_model(), group_size), tmp_path / "q")
    cpu = load_quantized_model(tmp_path / "q")
    gpu = load_quantized_model(tmp_path / "q", device="cuda")
    for name, module in cpu.named_modules():
        if isinstance(module, QQQLinear):
            x = torch.randn(5, module.in_features, dtype=torch.float16)
            assert torch.equal(gpu.get_submodule(name)(x.cuda()).cpu(), module(x)), name
    options = GREEDY | {"attention_mask": torch.ones_like(TOKENS).cuda(), "cache_implementation": "static"}
    compiled = gpu.generate(TOKENS.cuda(), compile_config=CompileConfig(fullgraph=True), **options)
    logits = gpu(compiled).logits[:, TOKENS.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, compiled[:, TOKENS.shape[1] :, None])[..., 0]
    assert ((logits.amax(-1) - chosen) / logits.std()).max() < 0.1
    assert torch.equal(gpu.generate(TOKENS.cuda(), compile_config=CompileConfig(fullgraph=True), **options), compiled)
