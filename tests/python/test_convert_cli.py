"""`marlin-qqq convert`, `verify` and `perplexity`, through the same path as the console script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import rewrite_config, rewrite_tensors, save_float_folder
from typer.testing import CliRunner, Result

from marlin_qqq.checkpoint import Checkpoint
from marlin_qqq.cli.app import app
from marlin_qqq.cli.convert import format_bytes, parse_size
from marlin_qqq.convert import convert
from marlin_qqq.quantization import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def converted(source: Path) -> Path:
    assert run("convert", source, source.with_name("q"), "--no-clip").exit_code == 0
    return source.with_name("q")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_dry_run_writes_nothing(source: Path) -> None:
    before = sorted(source.parent.rglob("*"))
    result = run("convert", source, source.with_name("q"), "--dry-run", "--max-shard-size", "100KB")
    assert result.exit_code == 0
    assert "14 linear layers quantised" in result.stdout
    assert "lm_head (output embeddings)" in result.stdout
    assert "model-00003-of-0000" in result.stdout and "working memory about" in result.stdout
    assert sorted(source.parent.rglob("*")) == before


def test_dry_run_finds_what_the_run_would_refuse(source: Path, tmp_path: Path) -> None:
    result = run(
        "convert", source, tmp_path / "q", "--dry-run", "--method", "gptq", "--calibration", tmp_path / "no.txt"
    )
    assert result.exit_code == 1 and "no.txt is not readable" in result.stderr


def test_devices_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    for arguments in (("convert", missing, tmp_path / "q"), ("perplexity", missing, "--text", missing)):
        result = run(*arguments, "--device", "foo")
        assert result.exit_code == 1 and "device is 'foo'; allowed: auto, cpu, cuda, cuda:INDEX" in result.stderr


def test_experts_are_named_as_kept(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", "mixtral")
    result = run("convert", tmp_path / "float", tmp_path / "q", "--dry-run")
    assert "kept as it is: model.layers.1.mlp.experts.gate_up_proj ([2, 512, 128]: several matrices" in result.stdout


@pytest.mark.parametrize("command", [("convert", "{}", "q"), ("verify", "{}"), ("perplexity", "{}", "--text", "t.txt")])
def test_a_folder_that_is_missing_is_called_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Not looked for on the hub."""
    missing = tmp_path / "nope"
    result = run(*(word.format(missing) for word in command))
    assert result.exit_code == 1
    assert f"{missing} is not a folder" in result.stderr


def test_a_configuration_that_is_missing_is_called_so(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    result = run("convert", source, tmp_path / "q")
    assert f"convert: {source}/config.json is missing or not a regular file" in result.stderr


def test_convert_shows_peak_memory_and_progress(source: Path) -> None:
    result = run("convert", source, source.with_name("q"), "--group-size", "-1", "--skip", "o_proj")
    assert result.exit_code == 0
    assert "12 layers in" in result.stdout and "peak memory" in result.stdout
    assert "peak" in result.stderr and "100%" in result.stderr
    checkpoint = Checkpoint(source.with_name("q"))
    assert checkpoint.settings.group_size == -1
    assert checkpoint.settings.modules_to_not_convert == ("lm_head", "o_proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--group-size", "64"), "group_size is 64"),
        (("--method", "gptq"), "needs calibration"),
        (("--dtype", "int8"), "dtype is 'int8'"),
    ],
)
def test_convert_refusals_are_one_sentence(source: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("convert", source, source.with_name("q"), *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_bad_size(source: Path) -> None:
    result = run("convert", source, source.with_name("q"), "--max-shard-size", "5 apples")
    assert result.exit_code != 0 and not source.with_name("q").exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500mb", "3 KB", "77")] == [5 * 10**9, 500 * 10**6, 3000, 77]
    assert [format_bytes(count) for count in (0, 999, 1234, 5 * 10**9, 7 * 10**12)] == [
        "0 B", "999 B", "1.2 KB", "5.0 GB", "7000.0 GB",
    ]  # fmt: skip


def test_verify_shows_the_worst_layers_first(source: Path, converted: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    bad = quantize_weight(torch.randn(128, 256), 128)
    rewrite_tensors(converted, {f"{name}.{key}": value for key, value in bad._asdict().items()})
    report = tmp_path / "report.json"
    result = run("verify", converted, "--against", source, "--json", report, "--worst", "3")
    assert result.exit_code == 0 and "14 quantised layers, 0 in need of repair" in result.stdout
    assert name in result.stdout.splitlines()[1] and result.stdout.count("model.layers.") == 3
    layers = json.loads(report.read_text())["layers"]
    assert layers[0]["layer"] == name and layers[0]["relative_error"] > 0.9
    errors = [layer["relative_error"] for layer in layers]
    assert errors == sorted(errors, reverse=True) and 0.05 < errors[1] < 0.2
    assert run("verify", converted, "--against", source, "--max-error", "0.5").exit_code == 1
    assert run("verify", converted, "--max-error", "0.5").exit_code != 0


def test_verify_does_not_let_nan_pass(source: Path, converted: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weight = torch.ones(128, 256).half()
    weight[3, 5:7] = float("nan")
    rewrite_tensors(source, {name: weight})
    report = tmp_path / "report.json"
    result = run("verify", converted, "--against", source, "--max-error", "1e9", "--json", report)
    assert result.exit_code == 1 and f"{name} of {source} holds 2 NaN or infinite values" in result.stderr
    json.loads(report.read_text(), parse_constant=pytest.fail)


def test_verify_fails_where_an_error_is_not_at_most_the_limit(source: Path, converted: Path) -> None:
    assert run("verify", converted, "--against", source, "--max-error", "nan").exit_code == 1


def test_verify_compares_large_weights(source: Path, converted: Path) -> None:
    """Their squares overflow fp32."""
    rewrite_tensors(source, {"model.layers.1.mlp.down_proj.weight": torch.full((128, 256), 1e30)})
    result = run("verify", converted, "--against", source, "--max-error", "1.5")
    assert result.exit_code == 0 and "1.0000" in result.stdout


def test_verify_reports_columns_to_repair(converted: Path) -> None:
    weight = quantize_weight(torch.randn(256, 128), 128)
    change = {f"{LAYER}.{key}": value for key, value in weight._asdict().items()}
    rewrite_tensors(converted, change | {f"{LAYER}.s_group": weight.s_group * 1.5})
    result = run("verify", converted)
    assert result.exit_code == 0
    assert "1 in need of repair" in result.stdout
    assert LAYER in result.stdout and "256" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.s_channel": torch.full((1, 256), float("inf"))}, f"{LAYER}: s_channel holds 256"),
        ({"model.norm.weight": torch.full((128,), float("nan")).half()}, "model.norm.weight has 128 values"),
        ({f"{LAYER}.{key}": None for key in ("B", "s_channel", "s_group")}, f"{LAYER} is missing"),
        ({"lm_head.weight": None}, "lm_head is missing"),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
        ({"model.embed_tokens.weight": torch.zeros(100, 128).half()},
         "model.embed_tokens.weight has shape [100, 128], the model's has [256, 128]"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.norm.weight": torch.ones(64).half()}, "model.norm.weight has shape [64], the model's has [128]"),
        ({"model.norm.weight": torch.ones(128, dtype=torch.int8)}, "has dtype int8; a floating-point type is needed"),
        ({"extra.B": torch.zeros(8, 128, dtype=torch.int32), "extra.s_channel": torch.ones(1, 64),
          "extra.s_group": torch.ones(1, 64).half()}, "the model has no such layer"),
    ],
)  # fmt: skip
def test_verify_finds_problems(converted: Path, change: dict, message: str) -> None:
    rewrite_tensors(converted, change)
    result = run("verify", converted)
    assert result.exit_code == 1
    assert message in result.stderr and "1 problems" in result.stdout


def test_verify_lists_everything_at_once(converted: Path) -> None:
    """Headers, values and the model's other tensors: a folder is not to be repaired one sentence at a time."""
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(2)]
    change = {
        f"{names[0]}.s_channel": torch.ones(1, 256).half(),
        f"{names[0]}.s_group": torch.ones(1, 256),
        f"{names[1]}.B": torch.zeros(8, 512, dtype=torch.int64),
        "model.layers.0.mlp.down_proj.s_channel": torch.full((1, 128), float("nan")),
        "model.norm.weight": None,
    }
    rewrite_tensors(converted, change)
    result = run("verify", converted)
    assert result.exit_code == 1 and "5 problems" in result.stdout
    for message in (
        f"{names[0]}.s_channel has dtype float16; float32",
        f"{names[0]}.s_group has dtype float32; float16",
        f"{names[1]}.B has dtype int64; int32",
        "model.layers.0.mlp.down_proj: s_channel holds 128",
        "model.norm.weight is missing",
    ):
        assert message in result.stderr


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_verify_compares_the_vocabulary(converted: Path) -> None:
    rewrite_config(converted, vocab_size=0)
    result = run("verify", converted)
    assert result.exit_code == 1 and "the model's has [0, 128]" in result.stderr


def test_verify_does_not_build_a_million_layers(converted: Path) -> None:
    rewrite_config(converted, num_hidden_layers=10**6)
    result = run("verify", converted)
    assert result.exit_code == 1 and "num_hidden_layers is 1000000" in result.stderr


def test_verify_misses_biases(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", "qwen2")
    convert(tmp_path / "float", tmp_path / "q", clip=False)
    assert run("verify", tmp_path / "q").exit_code == 0
    name = "model.layers.1.self_attn.q_proj.bias"
    rewrite_tensors(tmp_path / "q", {name: None})
    assert f"{name} is missing" in run("verify", tmp_path / "q").stderr


def test_verify_knows_tied_weights(tmp_path: Path) -> None:
    save_float_folder(tmp_path / "float", tie_word_embeddings=True)
    convert(tmp_path / "float", tmp_path / "q", clip=False)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "q").folder
    assert run("verify", tmp_path / "q").exit_code == 0
    rewrite_tensors(tmp_path / "q", {"model.embed_tokens.weight": None})
    result = run("verify", tmp_path / "q")
    assert result.exit_code == 1 and "1 problems" in result.stdout and "is missing" in result.stderr


def test_verify_knows_tensors_that_loaders_join(tmp_path: Path) -> None:
    """A mixture's files hold every expert on its own under another name; loaders join them to one tensor."""
    save_float_folder(tmp_path / "float", "mixtral")
    convert(tmp_path / "float", tmp_path / "q", clip=False)
    assert run("verify", tmp_path / "q").exit_code == 0
    rewrite_tensors(tmp_path / "q", {"model.layers.0.block_sparse_moe.experts.1.w2.weight": None})
    result = run("verify", tmp_path / "q")
    assert result.exit_code == 1 and "model.layers.0.mlp.experts.down_proj is joined from 1 tensors" in result.stderr


def test_names_are_not_taken_for_markup(source: Path) -> None:
    rewrite_tensors(source, {"[/red]extra": torch.ones(1).half()})
    assert run("convert", source, source.with_name("q"), "--no-clip").exit_code == 0
    name = "[/bold]x"
    weight = quantize_weight(torch.randn(64, 128), 128)
    change = {f"{name}.{key}": value for key, value in weight._asdict().items()}
    rewrite_tensors(source.with_name("q"), change | {f"{name}.s_group": weight.s_group * 1.5})
    result = run("verify", source.with_name("q"))
    assert name in result.stdout and f"{name} is quantised, but the model has no such layer" in result.stderr


def test_interruption_says_how_to_go_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("marlin_qqq.convert.run_conversion", interrupt)
    result = run("convert", source, source.with_name("q"))
    assert result.exit_code == 130 and "q.partial" in result.stderr


def test_verify_finds_another_architecture(converted: Path) -> None:
    rewrite_config(converted, intermediate_size=512)
    result = run("verify", converted)
    assert result.exit_code == 1 and "the model's layer has [512, 128]" in result.stderr


def test_verify_tries_its_output_first(tmp_path: Path) -> None:
    result = run("verify", tmp_path / "nowhere", "--json", tmp_path)
    assert result.exit_code == 1 and f"is a folder, not a file: '{tmp_path}'" in result.stderr


def test_verify_writes_into_a_link(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert run("verify", converted, "--json", tmp_path / "link.json").exit_code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["problems"] == []


def test_verify_of_no_checkpoint(source: Path) -> None:
    result = run("verify", source)
    assert result.exit_code == 1 and "not a QQQ checkpoint" in result.stderr


def test_perplexity_of_both_folders(source: Path, converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    values = {}
    for folder in (source, converted):
        result = run("perplexity", folder, "--text", text, "--window", "64", "--max-tokens", "300", "--json")
        assert result.exit_code == 0, result.stderr
        fields = json.loads(result.stdout)
        assert fields["window"] == 64
        values[folder] = fields["perplexity"]
    assert values[source] != values[converted]
    assert abs(values[source] / values[converted] - 1) < 0.2
    plain = run("perplexity", converted, "--text", text, "--window", "64", "--max-tokens", "300")
    assert f"perplexity {values[converted]:.4f} over" in plain.stdout


def test_perplexity_that_is_no_number_is_null_in_json(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    rewrite_tensors(source, {"model.norm.weight": torch.full((128,), float("nan")).half()})
    result = run("perplexity", source, "--text", tmp_path / "text.txt", "--json")
    fields = json.loads(result.stdout, parse_constant=pytest.fail)
    assert result.exit_code == 0 and fields["perplexity"] is None and fields["loss"] is None


@pytest.mark.parametrize(("option", "value"), [("--window", "0"), ("--batch-size", "0"), ("--max-tokens", "1")])
def test_perplexity_numbers_that_are_too_small(tmp_path: Path, option: str, value: str) -> None:
    result = run("perplexity", tmp_path, "--text", tmp_path / "text.txt", option, value)
    assert result.exit_code == 2 and option in result.output


def test_verify_shows_no_negative_number_of_layers(tmp_path: Path) -> None:
    result = run("verify", tmp_path, "--worst", "-3")
    assert result.exit_code == 2 and "--worst" in result.output


def test_perplexity_refusals(converted: Path, tmp_path: Path) -> None:
    missing = run("perplexity", converted, "--text", tmp_path / "nowhere.txt")
    assert missing.exit_code == 1 and "nowhere.txt is not readable" in missing.stderr
    (tmp_path / "text.txt").write_text("some text")
    wrong = run("perplexity", converted, "--text", tmp_path / "text.txt", "--dtype", "int4")
    assert wrong.exit_code == 1 and "dtype is 'int4'" in wrong.stderr
    (converted / "tokenizer.json").unlink()
    (converted / "tokenizer_config.json").unlink()
    lost = run("perplexity", converted, "--text", tmp_path / "text.txt")
    assert lost.exit_code == 1 and "no tokenizer" in lost.stderr
