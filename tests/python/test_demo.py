"""`marlin-qqq demo` and the demo model."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from folders import rewrite_config, save_float_folder
from repository import ROOT, load_script
from rich.console import Console
from typer.testing import CliRunner

from marlin_qqq import QQQLinear, quantize_model
from marlin_qqq.checkpoint import load_quantized_model, read_quantization_config
from marlin_qqq.cli import demo, demo_view
from marlin_qqq.cli.app import app
from marlin_qqq.evaluation import Continuation, measure_perplexity

MODEL = ROOT / "demo" / "model"
runner = CliRunner()
needs_model = pytest.mark.skipif(
    not (MODEL / "model.safetensors").is_file(), reason="demo/model is not in this checkout"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_float_folder(folder)
    (folder / "heldout.txt").write_text("def quantise(weight, group_size):\n    return weight\n" * 20, encoding="utf-8")
    return folder


def invoke(*arguments: object):
    return runner.invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "120"})


def test_tiny_model_from_end_to_end(tiny: Path, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    result = invoke("--model", tiny, "--device", "cpu", "--new-tokens", 5, "--max-tokens", 300, "--keep", keep)
    assert result.exit_code == 0, result.output + result.stderr
    for words in ("original, float16", "QQQ per-channel", "QQQ group 128", "300 tokens, the first of", str(keep)):
        assert words in result.output
    # What was run is what was written: the folders hold the weights that quantising the original gives.
    for name, group_size in (("qqq-per-channel", -1), ("qqq-group-128", 128)):
        assert read_quantization_config(keep / name).group_size == group_size
        loaded = load_quantized_model(keep / name)
        source = demo.read_source(tiny, None, torch.device("cpu"), None)
        expected = quantize_model(source.model, group_size)
        layers = {path: layer for path, layer in loaded.named_modules() if isinstance(layer, QQQLinear)}
        assert len(layers) == 14
        for path, layer in layers.items():
            for ours, theirs in zip(
                layer.quantized_weight(), expected.get_submodule(path).quantized_weight(), strict=True
            ):
                assert torch.equal(ours, theirs)


def test_nothing_is_left_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = invoke("--model", tiny, "--device", "cpu", "--new-tokens", 1, "--max-tokens", 50)
    assert result.exit_code == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_and_agreement_shown(tiny: Path) -> None:
    source = demo.read_source(tiny, None, torch.device("cpu"), 200)
    with demo_view.progress_bar(Console(file=io.StringIO())) as progress:
        rows = list(demo.compare(source, "def ", 6, "rtn", None, progress, progress.add_task("", total=None)))
    original, per_channel, grouped = rows
    weights = sum(
        module.weight.numel()
        for name, module in source.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert original.linear_bytes == 2 * weights
    assert weights // 2 < per_channel.linear_bytes < grouped.linear_bytes < 0.6 * weights
    # No start token, so the first token of each window (at most 255 long) is not predicted.
    assert source.tokenizer.bos_token_id is None
    assert [row.perplexity.num_tokens for row in rows] == [199] * 3

    def shown(row: demo.Row) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(demo_view.continuation_panel(row, original, "def ", highlight=True))
        return console.file.getvalue()

    assert "same as" not in shown(original)
    same = demo.Row("copy", 0, original.perplexity, original.continuation)
    assert "same as the original ─" in shown(same)
    ids = original.continuation.token_ids
    other = Continuation((*ids[:2], ids[2] + 1, *ids[3:]), "x", 1.0)
    assert f"same as the original for the first 2 of {len(ids)} tokens" in shown(
        demo.Row("o", 0, original.perplexity, other)
    )


# Bad input


def refusal(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_missing_folder_and_file(tiny: Path, tmp_path: Path) -> None:
    assert f"--model is {tmp_path / 'nowhere'}, which is not there" in refusal("--model", tmp_path / "nowhere")
    assert "which is a file" in refusal("--model", tiny / "config.json")
    assert "nowhere.txt" in refusal("--model", tiny, "--text", tmp_path / "nowhere.txt")


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in refusal("--model", tmp_path)


def test_pickled_weights_are_refused_and_not_opened(tmp_path: Path) -> None:
    save_float_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert "pickle" in refusal("--model", tmp_path)


def test_damaged_and_quantised_and_tokenizerless_folders(tmp_path: Path) -> None:
    save_float_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert "tokenizer" in refusal("--model", tmp_path)
    rewrite_config(tmp_path, quantization_config={"quant_method": "qqq", "wbits": 4, "group_size": 128})
    assert "is quantised already" in refusal("--model", tmp_path)
    rewrite_config(tmp_path, quantization_config=None, model_type="no-such-model")
    assert "no-such-model" in refusal("--model", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "safetensors" in refusal("--model", tmp_path)


def test_bad_options(tiny: Path, tmp_path: Path) -> None:
    assert "--method is 'magic'; allowed: rtn, mse" in refusal("--model", tiny, "--method", "magic")
    assert "--device is 'tpu'" in refusal("--model", tiny, "--device", "tpu")
    (tmp_path / "file").write_text("x")
    assert "nothing is overwritten" in refusal("--model", tiny, "--keep", tmp_path)
    (tmp_path / "short.txt").write_text("x")
    assert "at least 2" in refusal("--model", tiny, "--text", tmp_path / "short.txt")
    if not torch.cuda.is_available():
        assert "use --device cpu" in refusal("--model", tiny, "--device", "cuda")


# The model in the repository


@needs_model
def test_demo_model_is_what_the_card_says() -> None:
    from safetensors import safe_open

    files = sorted(path.name for path in MODEL.iterdir())
    assert sum((MODEL / name).stat().st_size for name in files) <= 16e6
    assert not [name for name in files if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    total = 0
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a mapping
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all()
            total += tensor.numel()
            if "proj" in name:
                assert (tensor.shape[1] % 128, tensor.shape[0] % 64) == (0, 0)
    assert total == facts["parameters"]
    assert 6_000_000 <= total <= 8_000_000
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert f"{total:,} parameters" in card
    assert facts["command"] in card


@needs_model
def test_demo_model_keeps_its_perplexity() -> None:
    """Four windows: near the training run's figure, and not far above it once quantised."""
    source = demo.read_source(MODEL, None, torch.device("cpu"), 4 * 512)

    def perplexity(model: torch.nn.Module) -> float:
        return measure_perplexity(model, source.token_ids, 512, start_token=source.tokenizer.bos_token_id).value

    original = perplexity(copy.deepcopy(source.model).float())
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert 0.8 < original / facts["held_out_perplexity"] < 1.25
    for group_size in (-1, 128):
        quantized = quantize_model(copy.deepcopy(source.model).float(), group_size)
        assert 1.0 < perplexity(quantized) / original < 1.08


@needs_model
@pytest.mark.gpu
def test_demo_model_on_a_gpu() -> None:
    device = torch.device("cuda")
    source = demo.read_source(MODEL, None, device, 16 * 512)
    with demo_view.progress_bar(Console(file=io.StringIO())) as progress:
        task = progress.add_task("", total=None)
        rows = list(demo.compare(source, demo.DEFAULT_PROMPT, 32, "rtn", None, progress, task))
    original, *quantized = (row.perplexity.value for row in rows)
    facts = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert 0.8 < original / facts["held_out_perplexity"] < 1.25
    for value in quantized:
        assert 1.0 < value / original < 1.08


def test_without_transformers_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("--device", "cpu")
    assert result.exit_code == 1
    assert "in a clone: pip install '.[transformers]', elsewhere: pip install" in result.stderr


# The text that it was trained on


@pytest.fixture
def corpus_module() -> ModuleType:
    return load_script("demo/corpus.py")


def test_held_out_modules_and_their_tests_are_not_trained_on(corpus_module, tmp_path: Path) -> None:
    def write(name: str, marker: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f'"""The module that is called {marker}."""\n\n\ndef function_of_{marker}():\n    return None\n' * 3
        )

    write("textwrap.py", "held_out")
    write("http/cookies.py", "held_out_too")
    write("glob.py", "validation")
    write("argparse.py", "library")
    write("http/client.py", "library_too")
    write("test/test_argparse.py", "library_test")
    write("test/test_textwrap.py", "held_out_test")
    write("test/test_http_cookies.py", "held_out_test_too")
    write("test/test_glob.py", "validation_test")
    write("test/test_json/test_decode.py", "held_out_package_test")
    write("site-packages/other/code.py", "not_the_library")
    (tmp_path / "table.py").write_text("TABLE = (" + "0x12, " * 500 + ")\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xe8 not UTF-8\n" * 20)

    corpus = corpus_module.read_corpus(tmp_path)
    joined = {part: "".join(getattr(corpus, part)) for part in ("library", "tests", "validation", "held_out")}
    found = {part: {word for word in text.split() if word.startswith("function_of_")} for part, text in joined.items()}
    assert found == {
        "library": {"function_of_library():", "function_of_library_too():"},
        "tests": {"function_of_library_test():"},
        "validation": {"function_of_validation():"},
        "held_out": {"function_of_held_out():", "function_of_held_out_too():"},
    }
    assert corpus.held_out_names == ["http/cookies.py", "textwrap.py"]
    assert "TABLE" not in "".join(joined.values())


def test_a_folder_that_is_no_standard_library(corpus_module, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a Python standard library"):
        corpus_module.read_corpus(tmp_path)
