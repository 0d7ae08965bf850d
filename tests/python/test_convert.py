"""The converter on tiny float models: every family, streaming, resuming, refusals."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from folders import (
    FAMILIES,
    VOCABULARY,
    rewrite_config,
    rewrite_tensors,
    save_float_folder,
    save_gptq_folder,
    tiny_model,
)
from safetensors import SafetensorError

from marlin_qqq import quantize_model
from marlin_qqq._files import atomic_write
from marlin_qqq.checkpoint import Checkpoint, CheckpointError, TensorFolder, load_quantized_model, write_checkpoint
from marlin_qqq.checkpoint.writer import partial_directory
from marlin_qqq.convert import ConversionOptions, ConversionPlan, convert, plan_conversion, run_conversion
from marlin_qqq.convert.source import _reason_to_skip
from marlin_qqq.quantization import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(40)[None] * 5 % VOCABULARY
TEXT = Path(__file__).read_text()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("group_size", "clip"), [(128, True), (-1, False)])
def test_equals_quantising_in_memory(tmp_path: Path, family: str, group_size: int, clip: bool) -> None:
    model = save_float_folder(tmp_path / "float", family, tie_word_embeddings=family == "qwen3")
    result = convert(tmp_path / "float", tmp_path / "q", group_size=group_size, clip=clip)
    assert result.quantized_layers == 14
    reference = quantize_model(model, group_size, "mse" if clip else "rtn")
    assert torch.equal(logits(load_quantized_model(tmp_path / "q")), logits(reference))


def test_layout_is_handh1998s(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "q", group_size=-1)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "qqq",
        "wbits": 4,
        "group_size": -1,
        "modules_to_not_convert": ["lm_head"],
    }
    tensors = TensorFolder(tmp_path / "q").tensors
    layer = {name.rpartition(".")[2] for name in tensors if name.startswith("model.layers.0.mlp.up_proj.")}
    assert layer == {"B", "s_channel"}
    assert tensors["model.layers.0.mlp.up_proj.B"].shape == (128 // 16, 2 * 256)
    original = TensorFolder(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(TensorFolder(tmp_path / "q").read(name), original.read(name))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "q"]


def test_shards_in_and_out(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", max_shard_size="200KB")
    assert len(TensorFolder(tmp_path / "float").files) > 3
    convert(tmp_path / "float", tmp_path / "q", group_size=128, max_shard_bytes=100_000)
    convert(tmp_path / "float", tmp_path / "whole", group_size=128)
    split, whole = TensorFolder(tmp_path / "q"), TensorFolder(tmp_path / "whole")
    assert len(split.files) > 2 and len(whole.files) == 1
    assert all(file.stat().st_size < 110_000 for file in split.files)
    assert split.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(split.read(name), whole.read(name)) for name in split.tensors)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.float32, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: str, expected: torch.dtype) -> None:
    model = save_float_folder(tmp_path / "float", "qwen2", dtype=stored)
    convert(tmp_path / "float", tmp_path / "q", group_size=128, clip=False, dtype=wanted)
    written = TensorFolder(tmp_path / "q")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(written.read(name), model.state_dict()[name].to(expected))
    # Codes and scales come from the stored weight, not from a rounded one.
    weight = quantize_weight(model.get_submodule("model.layers.1.mlp.down_proj").weight, 128)
    assert torch.equal(written.read("model.layers.1.mlp.down_proj.B"), weight.B)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert [config["dtype"], config["torch_dtype"]] == 2 * [str(expected).removeprefix("torch.")]
    assert load_quantized_model(tmp_path / "q").dtype == expected


def test_rotary_frequencies_keep_their_dtype(tmp_path: Path) -> None:
    """Some folders store them; in 16 bits every position would be shifted."""
    save_float_folder(tmp_path / "float", dtype=torch.float32)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = 10000.0 ** (-torch.arange(0, 1, 1 / 16))
    assert not torch.equal(frequencies.half().float(), frequencies)
    positions = torch.arange(4)
    rewrite_tensors(tmp_path / "float", {name: frequencies, "model.position_ids": positions})
    convert(tmp_path / "float", tmp_path / "q", clip=False)
    written = TensorFolder(tmp_path / "q")
    assert written.read("model.norm.weight").dtype == torch.float16
    for tensor, expected in ((name, frequencies), ("model.position_ids", positions)):
        assert written.read(tensor).dtype == expected.dtype
        assert torch.equal(written.read(tensor), expected)


def test_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", dtype=torch.float32)
    rewrite_tensors(tmp_path / "float", {"model.norm.weight": torch.full((128,), 1e6)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*bfloat16"):
        convert(tmp_path / "float", tmp_path / "q")
    convert(tmp_path / "float", tmp_path / "q", dtype="bfloat16")


def test_skipped_modules(tmp_path: Path) -> None:
    model = save_float_folder(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "q", group_size=128, clip=False, skip=("layers.0", "down_proj"))
    checkpoint = Checkpoint(tmp_path / "q")
    assert list(checkpoint.modules) == [
        f"model.layers.1.{part}"
        for part in ("mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj")
    ] + ["model.layers.1.self_attn.v_proj"]
    assert checkpoint.settings.modules_to_not_convert == ("lm_head", "layers.0", "down_proj")
    reference = quantize_model(model, 128, skip=("lm_head", "layers.0", "down_proj"))
    assert torch.equal(logits(load_quantized_model(tmp_path / "q")), logits(reference))


def test_sizes_that_do_not_fit_stay_with_their_siblings(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", head_dim=24)  # q [96, 128], k and v [48, 128]; o [128, 96]
    plan = plan_conversion(tmp_path / "float", tmp_path / "q", ConversionOptions())
    assert plan.source.skipped["model.layers.0.self_attn.k_proj"] == (
        "[48, 128]: out_features must be a multiple of 64, in_features of 128"
    )
    run_conversion(plan)
    names = {name.rpartition(".")[2] for name in Checkpoint(tmp_path / "q").modules}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    logits(load_quantized_model(tmp_path / "q"))


def test_more_inputs_than_a_product_takes_are_skipped() -> None:
    reason = "[64, 132224]; in_features must be below 132104, where the int32 sum could overflow"
    assert _reason_to_skip("down_proj", 132224, 64, ()) == reason
    assert _reason_to_skip("down_proj", 132096, 64, ()) is None


def test_half_of_a_fused_pair_is_not_quantised(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", num_attention_heads=4, num_key_value_heads=1)  # k and v [32, 128], q fits
    plan = plan_conversion(tmp_path / "float", tmp_path / "q", ConversionOptions())
    assert "merged with k_proj" in plan.source.skipped["model.layers.1.self_attn.q_proj"]
    assert "model.layers.1.self_attn.o_proj" in plan.source.layers
    assert "model.layers.1.self_attn.q_proj" in plan.settings.modules_to_not_convert


def test_plan_says_what_is_written(source: Path, tmp_path: Path) -> None:
    plan = plan_conversion(source, tmp_path / "q", ConversionOptions(max_shard_bytes=150_000))
    assert not (tmp_path / "q").exists() and not partial_directory(tmp_path / "q").exists()
    run_conversion(plan)
    for shard in plan.written_shards():
        infos = TensorFolder(tmp_path / "q").tensors.values()
        stored = {info.name: info.num_bytes for info in infos if info.file.name == shard.file_name}
        assert tuple(sorted(stored)) == tuple(sorted(shard.tensors)) and sum(stored.values()) == shard.num_bytes


class Interrupted(Exception):
    pass


def interrupt_after(pieces: int):
    def progress(name: str, num_bytes: int) -> None:
        nonlocal pieces
        pieces -= 1
        if pieces == 0:
            raise Interrupted

    return progress


def gptq_options(text: Path) -> dict:
    return {"method": "gptq", "calibration": text, "num_samples": 4, "sequence_length": 64}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("pieces", [1, 15])
def test_resumes_to_equal_bytes(source: Path, tmp_path: Path, text: Path, method: str, pieces: int) -> None:
    options = {"group_size": 128, "max_shard_bytes": 60_000} | (gptq_options(text) if method == "gptq" else {})
    convert(source, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", progress=interrupt_after(pieces), **options)
    assert not (tmp_path / "q").exists()
    with pytest.raises(Interrupted), atomic_write(partial_directory(tmp_path / "q") / "model.safetensors") as half:
        half.write_bytes(b"half a file")
        leftover = half.with_name("2" + half.name)
        shutil.copy(half, leftover)  # as a process that is killed leaves it
        raise Interrupted
    assert leftover.exists() and not half.exists()
    result = convert(source, tmp_path / "q", **options)
    assert (result.resumed_shards > 0) == (pieces == 15)
    assert files_of(tmp_path / "q") == files_of(tmp_path / "whole")
    assert not partial_directory(tmp_path / "q").exists()


def test_unfinished_conversion_with_other_options(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", group_size=128, max_shard_bytes=60_000, progress=interrupt_after(5))
    with pytest.raises(CheckpointError, match="other options"):
        convert(source, tmp_path / "q", group_size=-1, max_shard_bytes=60_000)
    convert(source, tmp_path / "q", group_size=-1, max_shard_bytes=60_000, restart=True)
    assert Checkpoint(tmp_path / "q").settings.group_size == -1


def test_unfinished_conversion_of_another_source(source: Path, tmp_path: Path) -> None:
    """Half of the old weights and half of the new ones would be no model."""
    options = {"group_size": 128, "max_shard_bytes": 60_000}
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", progress=interrupt_after(5), **options)
    rewrite_tensors(source, {"model.layers.1.mlp.down_proj.weight": torch.ones(128, 256).half()})
    with pytest.raises(CheckpointError, match="another source"):
        convert(source, tmp_path / "q", **options)


@pytest.mark.parametrize("same_text", [True, False])
def test_unfinished_conversion_with_another_calibration_file(
    source: Path, tmp_path: Path, text: Path, same_text: bool
) -> None:
    """What the file holds counts, not where it is."""
    options = {"group_size": 128, "max_shard_bytes": 60_000} | gptq_options(text)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", progress=interrupt_after(15), **options)
    (tmp_path / "copy.txt").write_text(TEXT if same_text else TEXT.swapcase())
    fingerprints = [
        plan_conversion(source, tmp_path / "q", ConversionOptions(**options | {"calibration": file})).fingerprint()
        for file in (text, tmp_path / "copy.txt")
    ]
    assert (fingerprints[0] == fingerprints[1]) == same_text
    calibration = {"calibration": tmp_path / "copy.txt"}
    if same_text:
        convert(source, tmp_path / "q", **options | calibration)
        return
    with pytest.raises(CheckpointError, match="other options"):
        convert(source, tmp_path / "q", **options | calibration)


def test_two_processes_do_not_write_one_folder(source: Path, tmp_path: Path) -> None:
    partial = partial_directory(tmp_path / "q")
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process"):
        convert(source, tmp_path / "q")
    os.close(descriptor)
    convert(source, tmp_path / "q")


def test_restart_deletes_conversions_only(source: Path, tmp_path: Path) -> None:
    partial = partial_directory(tmp_path / "q")
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="no unfinished conversion"):
        convert(source, tmp_path / "q", restart=True)
    assert (partial / "thesis.txt").read_text() == "precious"


def test_restart_does_not_touch_what_another_process_writes(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", max_shard_bytes=60_000, progress=interrupt_after(5))
    partial = partial_directory(tmp_path / "q")
    before = files_of(partial)
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process"):
        convert(source, tmp_path / "q", restart=True)
    assert files_of(partial) == before
    os.close(descriptor)
    convert(source, tmp_path / "q", restart=True)


def test_a_damaged_shard_is_named_with_the_way_out(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", max_shard_bytes=60_000, progress=interrupt_after(15))
    shard = min(partial_directory(tmp_path / "q").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not a valid .*; pass restart"):
        convert(source, tmp_path / "q", max_shard_bytes=60_000)
    convert(source, tmp_path / "q", max_shard_bytes=60_000, restart=True)


def test_writing_a_model_leaves_a_conversion_alone(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "q", max_shard_bytes=60_000, progress=interrupt_after(15))
    before = files_of(partial_directory(tmp_path / "q"))
    write_checkpoint(quantize_model(tiny_model(), 128), tmp_path / "q")
    assert files_of(partial_directory(tmp_path / "q")) == before


def test_a_failed_write_is_a_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors says it: a full disk, a quota, a limit on a file's size."""

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr("marlin_qqq.checkpoint.writer.save_file", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be written: .*File too large"):
        convert(source, tmp_path / "q")
    with pytest.raises(CheckpointError, match="File too large"):
        write_checkpoint(quantize_model(tiny_model(), 128), tmp_path / "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_a_destination_that_appears_meanwhile_costs_no_work(source: Path, tmp_path: Path) -> None:
    def appear(name: str, num_bytes: int) -> None:
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / "mine.txt").write_text("precious")

    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, tmp_path / "q", progress=appear)
    shutil.rmtree(tmp_path / "q")
    assert convert(source, tmp_path / "q").resumed_shards == 1


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, tmp_path / "q")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="not a folder"):
        convert(source, tmp_path / "file")
    partial_directory(tmp_path / "r").mkdir()
    (partial_directory(tmp_path / "r") / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="no unfinished conversion"):
        convert(source, tmp_path / "r")
    with pytest.raises(CheckpointError, match="source and destination"):
        convert(source, source)
    before = files_of(source)
    convert(source, tmp_path / "ok")
    assert files_of(source) == before


def test_full_disk_is_refused_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1000 free"):
        convert(source, tmp_path / "q", progress=interrupt_after(1))
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": Path("nowhere.txt")}, r"nowhere\.txt is not readable"),
        ({"sequence_length": 10**6}, "at least one sequence of 1000000"),
        ({"device": "foo"}, r"device is 'foo'; allowed: auto, cpu, cuda"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
    ],
)
def test_what_cannot_work_is_refused_before_there_is_a_folder(
    source: Path, tmp_path: Path, text: Path, options: dict, message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "q", **gptq_options(text) | options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 64}, "group_size is 64"),
        ({"method": "awq"}, "method is 'awq'"),
        ({"method": "gptq"}, "needs calibration"),
        ({"calibration": Path("x")}, "only gptq uses it"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"skip": ("model",)}, "no linear layer to quantise"),
        ({"skip": ("",)}, r"skip is \('',\); names of modules"),
        ({"skip": "lm_head"}, "skip is 'lm_head'; names of modules"),
        ({"skip": ("down_proj", "nonexistent")}, "skip is 'nonexistent', which names no linear layer"),
    ],
)
def test_options_that_are_refused(source: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()


def plan(source: Path) -> ConversionPlan:
    return plan_conversion(source, source.with_name("q"), ConversionOptions())


def test_sources_that_are_refused(source: Path, tmp_path: Path) -> None:
    original = (source / "config.json").read_text()
    rewrite_config(source, model_type="no_such_family")
    with pytest.raises(CheckpointError, match="no_such_family"):
        plan(source)
    (source / "config.json").write_text(original)
    rewrite_config(source, model_type=None)
    with pytest.raises(CheckpointError, match="model_type None"):
        plan(source)
    (source / "config.json").write_text(original)
    rewrite_config(source, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised with 'awq'"):
        plan(source)
    (source / "config.json").write_text(original)
    rewrite_config(source, intermediate_size=512)
    with pytest.raises(CheckpointError, match=r"needs a floating-point \[128, 512\]"):
        plan(source)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        plan(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.q_proj.weight": None}, "model.layers.1.self_attn.q_proj.weight is missing"),
        (
            {"model.norm.weight": None, "model.embed_tokens.weight": None},
            r"embed_tokens.weight is missing \(and 1 more\)",
        ),
        ({"model.norm.weight": torch.ones(64)}, r"model.norm.weight has shape \[64\], the model's has \[128\]"),
    ],
)
def test_sources_that_lack_tensors_of_the_model(source: Path, change: dict, message: str) -> None:
    """Loaders would fill them with random numbers."""
    rewrite_tensors(source, change)
    with pytest.raises(CheckpointError, match=f"is not the model of its config.json: .*{message}"):
        plan(source)


def test_tied_output_embeddings_may_be_missing(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", tie_word_embeddings=True)
    assert "lm_head.weight" not in TensorFolder(tmp_path / "float")
    plan(tmp_path / "float")


def test_a_million_layers_are_not_built(source: Path) -> None:
    rewrite_config(source, num_hidden_layers=10**6)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000, but the files hold 21 tensors"):
        plan(source)


def test_without_transformers_the_sentence_says_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"in a clone: pip install '\.\[transformers\]', elsewhere: pip install"):
        plan(source)


def test_code_of_the_folder_is_not_run(source: Path, tmp_path: Path) -> None:
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    reference = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    rewrite_config(source, auto_map=reference)
    result = convert(source, tmp_path / "q", clip=False)
    assert not (tmp_path / "ran").exists()
    assert result.left_behind == ("evil.py",)
    assert not (tmp_path / "q" / "evil.py").exists()


def test_weight_that_is_not_finite(source: Path, tmp_path: Path) -> None:
    rewrite_tensors(source, {"model.layers.1.mlp.up_proj.weight": torch.full((256, 128), float("nan")).half()})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: weight holds 32768 NaN"):
        convert(source, tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_copied_tensor_that_is_not_finite(tmp_path: Path, name: str, value: float, dtype: str) -> None:
    """Whether it keeps its dtype or is converted."""
    model = save_float_folder(tmp_path / "float", "qwen2")
    broken = model.state_dict()[name].clone()
    broken.view(-1)[:3] = value
    rewrite_tensors(tmp_path / "float", {name: broken})
    with pytest.raises(CheckpointError, match=rf"{name} holds 3 NaN or infinite values"):
        convert(tmp_path / "float", tmp_path / "q", clip=False, dtype=dtype)


def test_padded_folder_with_biases(tmp_path: Path) -> None:
    """What save_pretrained of a padded model writes: weights of 128 outputs beside a bias of 96."""
    sizes = {"hidden_size": 192, "head_dim": 48, "attention_bias": True, "intermediate_size": 320}
    model = quantize_model(tiny_model(**sizes), 128)
    model.save_pretrained(tmp_path / "padded")
    expected = logits(load_quantized_model(tmp_path / "padded"))
    convert(tmp_path / "padded", tmp_path / "q")
    written = TensorFolder(tmp_path / "q").tensors
    assert written["model.layers.0.self_attn.k_proj.bias"].shape == (96,)
    assert written["model.layers.0.self_attn.k_proj.B"].shape == (256 // 16, 2 * 128)
    assert torch.equal(logits(load_quantized_model(tmp_path / "q")), expected)


@pytest.mark.parametrize(("shape", "dtype"), [((7,), torch.float16), ((1, 128), torch.float16), ((128,), torch.int64)])
def test_bias_of_another_shape_or_kind(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    save_float_folder(tmp_path / "float", "qwen2")
    save_gptq_folder(tmp_path / "gptq", 128)
    name = "model.layers.0.self_attn.q_proj.bias"
    for folder in ("float", "gptq"):
        rewrite_tensors(tmp_path / folder, {name: torch.zeros(shape, dtype=dtype)})
        with pytest.raises(CheckpointError, match=rf"{name} is {dtype} .*; a floating-point \[128\] is needed"):
            plan_conversion(tmp_path / folder, tmp_path / "q", ConversionOptions())


@pytest.mark.parametrize("side_file", ["quant_config.json", "quantize_config.json"])
@pytest.mark.parametrize("fields", [{"wbits": 4, "group_size": 128}, {"format": "QQQ", "bits": 4, "group_size": 128}])
def test_older_qqq_folders_are_rewritten(source: Path, tmp_path: Path, side_file: str, fields: dict) -> None:
    """What docs/transformers.md advises: the settings move from a side file into config.json, the tensors stay."""
    convert(source, tmp_path / "old", group_size=128)
    expected = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]
    rewrite_config(tmp_path / "old", quantization_config=None)
    (tmp_path / "old" / side_file).write_text(json.dumps(fields | {"modules_to_not_convert": ["lm_head"]}))
    convert(tmp_path / "old", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"] == expected
    assert not (tmp_path / "new" / side_file).exists()
    old, new = (tmp_path / name / "model.safetensors" for name in ("old", "new"))
    assert old.read_bytes() == new.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"), [({"skip": ("down_proj",)}, "skip is down_proj"), ({"clip": False}, "clip is off")]
)
def test_options_without_effect_on_a_qqq_folder(source: Path, tmp_path: Path, options: dict, message: str) -> None:
    convert(source, tmp_path / "q")
    with pytest.raises(CheckpointError, match=f"{message}, but the source is qqq already"):
        convert(tmp_path / "q", tmp_path / "r", **options)


def test_another_method_in_a_side_file_is_named(source: Path) -> None:
    (source / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}))
    with pytest.raises(CheckpointError, match=r"quant_config\.json: quantised with None; convertible: unquantised"):
        plan(source)
