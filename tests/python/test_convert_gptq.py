"""GPTQ in the converter: calibration block by block, and GPTQ int4 folders as a source."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from folders import (
    FAMILIES,
    byte_tokenizer,
    rewrite_config,
    rewrite_tensors,
    save_float_folder,
    save_gptq_folder,
    tiny_model,
)
from transformers import AutoModelForCausalLM, MixtralConfig

from marlin_qqq.checkpoint import Checkpoint, CheckpointError, TensorFolder, load_quantized_model
from marlin_qqq.convert import convert
from marlin_qqq.convert.calibration import BlockwiseCalibration, calibration_tokens
from marlin_qqq.convert.source import open_source
from marlin_qqq.packing import permute_channel_scale, permute_group_scale, unpermute_channel_scale
from marlin_qqq.quantization import HessianAccumulator, dequantize_weight, quantize_weight
from marlin_qqq.verify import verify_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = Path(__file__).read_text()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def gptq_options(text: Path) -> dict:
    return {"method": "gptq", "calibration": text, "num_samples": 4, "sequence_length": 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_beats_rounding(tmp_path: Path, text: Path, family: str) -> None:
    model = save_float_folder(tmp_path / "float", family)
    tokens = torch.tensor(byte_tokenizer()(TEXT[-200:])["input_ids"])[None]
    errors = {}
    for method, options in (("rtn", {}), ("gptq", gptq_options(text) | {"num_samples": 64})):
        convert(tmp_path / "float", tmp_path / method, group_size=128, clip=False, **options)
        with torch.inference_mode():
            difference = load_quantized_model(tmp_path / method)(tokens).logits - model(tokens).logits
        errors[method] = float(difference.float().norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_gptq_blocks_see_what_the_blocks_before_them_have_become(source: Path, tmp_path: Path, text: Path) -> None:
    """The Hessians equal those of the whole model in memory with the earlier block quantised."""
    opened = open_source(source)
    tokens = calibration_tokens(source, text, 3, 32)
    assert [sequence.shape for sequence in tokens] == [(1, 32)] * 3
    calibration = BlockwiseCalibration(opened, tokens, "cpu", {})
    model = copy.deepcopy(tiny_model()).float()
    for name in [name for name in opened.layers if ".layers.0." in name]:
        changed = calibration.model.get_submodule(name).weight.shape
        calibration.hessian(name)
        weight = torch.randn(changed, generator=torch.Generator().manual_seed(1)) * 0.1
        calibration.replace_weight(name, weight)
        model.get_submodule(name).weight = torch.nn.Parameter(weight)
    last = "model.layers.1.mlp.down_proj"
    accumulator = HessianAccumulator(256)
    handle = model.get_submodule(last).register_forward_pre_hook(lambda module, inputs: accumulator.add(inputs[0]))
    with torch.no_grad():
        for sequence in tokens:
            model(sequence)
    handle.remove()
    assert torch.allclose(calibration.hessian(last), accumulator.hessian, rtol=1e-4, atol=1e-7)


def test_calibration_that_is_refused(source: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(CheckpointError, match="at least one sequence of 100000"):
        convert(source, tmp_path / "q", **gptq_options(text) | {"sequence_length": 100_000})
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not readable UTF-8"):
        convert(source, tmp_path / "r", **gptq_options(text))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    text.write_text(TEXT)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        convert(source, tmp_path / "s", **gptq_options(text))


def test_experts_are_rounded_around_and_refused_by_gptq(tmp_path: Path, text: Path) -> None:
    """Transformers holds a layer's experts in one tensor, which is no linear layer: it stays as it is."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, head_dim=32, vocab_size=256, num_local_experts=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    assert convert(tmp_path / "moe", tmp_path / "q").quantized_layers == 4
    assert verify_checkpoint(tmp_path / "q", against=tmp_path / "moe").problems == ()
    load_quantized_model(tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"mlp\..* is not in the files by that name"):
        convert(tmp_path / "moe", tmp_path / "r", **gptq_options(text))


@pytest.mark.parametrize("v2", [False, True])
def test_gptq_folder_with_one_scale_a_channel_keeps_its_weights_exactly(tmp_path: Path, v2: bool) -> None:
    weights = save_gptq_folder(tmp_path / "gptq", -1, v2=v2)
    result = convert(tmp_path / "gptq", tmp_path / "q")
    assert result.quantized_layers == len(weights) == 14
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.settings.group_size == -1
    for name, weight in weights.items():
        assert torch.equal(dequantize_weight(checkpoint.read(name).weight), weight)


def test_gptq_folder_with_groups_keeps_its_codes(tmp_path: Path) -> None:
    weights = save_gptq_folder(tmp_path / "gptq", 128)
    convert(tmp_path / "gptq", tmp_path / "q")
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.settings.group_size == 128
    for name, weight in weights.items():
        loaded = checkpoint.read(name).weight
        # The int8 weight is rounded once (half a step), its group scale to fp16 once (2^-11 of at most 127 steps).
        step = unpermute_channel_scale(loaded.s_channel).t()
        assert bool(((dequantize_weight(loaded) - weight).abs() <= (0.5 + 127 / 2048) * step).all())
    original, written = TensorFolder(tmp_path / "gptq"), TensorFolder(tmp_path / "q")
    assert torch.equal(written.read("lm_head.weight"), original.read("lm_head.weight"))
    assert not [name for name in written.tensors if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert "quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())
    load_quantized_model(tmp_path / "q")


def test_the_oldest_gptq_folders_name_no_method(tmp_path: Path) -> None:
    save_gptq_folder(tmp_path / "gptq", 128)
    convert(tmp_path / "gptq", tmp_path / "expected")
    rewrite_config(tmp_path / "gptq", quantization_config=None)
    fields = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(fields))
    convert(tmp_path / "gptq", tmp_path / "q")
    files = [tmp_path / name / "model.safetensors" for name in ("expected", "q")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"bits": 8}, "GPTQ with 8 bits"),
        ({"group_size": 64}, "group_size 64"),
        ({"sym": False}, "zero points"),
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"checkpoint_format": "gptq_v2"}, "qzeros holds 7"),
    ],
)
def test_gptq_folders_that_are_refused(tmp_path: Path, quantization: dict, message: str) -> None:
    save_gptq_folder(tmp_path / "gptq", 128)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    rewrite_config(tmp_path / "gptq", quantization_config=config | quantization)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "gptq", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_act_order_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_gptq_folder(tmp_path / "gptq", 128)
    order = torch.arange(256).flip(0) // 128
    rewrite_tensors(tmp_path / "gptq", {"model.layers.0.mlp.down_proj.g_idx": order.int()})
    with pytest.raises(CheckpointError, match=r"down_proj: g_idx puts input 0 in group 1 .*act-order"):
        convert(tmp_path / "gptq", tmp_path / "q")


def test_options_that_a_gptq_folder_cannot_follow(tmp_path: Path, text: Path) -> None:
    save_gptq_folder(tmp_path / "gptq", 128)
    with pytest.raises(CheckpointError, match="its codes keep their groups"):
        convert(tmp_path / "gptq", tmp_path / "q", group_size=-1)
    with pytest.raises(CheckpointError, match="repacked, not searched"):
        convert(tmp_path / "gptq", tmp_path / "q", **gptq_options(text))
    with pytest.raises(CheckpointError, match="clip is off, but the source is gptq already: no scales are searched"):
        convert(tmp_path / "gptq", tmp_path / "q", clip=False)
    rewrite_tensors(tmp_path / "gptq", {"model.layers.0.mlp.down_proj.scales": None})
    with pytest.raises(CheckpointError, match="scales or qzeros is missing"):
        convert(tmp_path / "gptq", tmp_path / "q")


def test_a_qqq_folder_is_repaired_and_rewritten(source: Path, tmp_path: Path) -> None:
    """GPTQModel's flavour, with scales that leave the int8 range, becomes HandH1998's, with scales that do not."""
    convert(source, tmp_path / "q", group_size=128, clip=False)
    name = "model.layers.1.mlp.gate_proj"
    weight = quantize_weight(torch.randn(256, 128), 128)
    factor = torch.ones(1, 256)
    factor[0, 9] = 1.3
    moved = weight._replace(
        s_channel=weight.s_channel / permute_channel_scale(factor),
        s_group=(weight.s_group.float() * permute_group_scale(factor)).half(),
    )
    rewrite_tensors(tmp_path / "q", {f"{name}.{key}": value for key, value in moved._asdict().items()})
    rewrite_config(tmp_path / "q", quantization_config={"quant_method": "qqq", "bits": 4, "group_size": 128})
    result = convert(tmp_path / "q", tmp_path / "clean")
    assert result.repaired == {name: (9,)}
    assert Checkpoint(tmp_path / "q").read(name).repaired_columns == (9,)
    assert Checkpoint(tmp_path / "clean").read(name).repaired_columns == ()
    assert Checkpoint(tmp_path / "clean").settings.flavour == "QQQ"
    before, after = TensorFolder(tmp_path / "q"), TensorFolder(tmp_path / "clean")
    assert before.tensors.keys() == after.tensors.keys()
    changed = [key for key in before.tensors if not torch.equal(before.read(key), after.read(key))]
    assert changed == [f"{name}.s_channel", f"{name}.s_group"]
