"""quantization_config: both flavours are understood, everything else is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlin_qqq.checkpoint import (
    CheckpointError,
    QuantizationSettings,
    parse_quantization_config,
    read_json_object,
    read_quantization_config,
)
from marlin_qqq.checkpoint.config import FoundConfig

HAND = {"quant_method": "qqq", "wbits": 4, "group_size": 128}
GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "qqq",
    "desc_act": False,
    "format": "qqq",
    "group_size": -1,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:4.0.0"], "static_groups": False},
    "pack_dtype": "int32",
    "quant_method": "qqq",
    "sym": True,
}


def test_both_flavours() -> None:
    assert parse_quantization_config(HAND) == QuantizationSettings(128, (), "QQQ")
    assert parse_quantization_config(GPTQMODEL) == QuantizationSettings(-1, (), "GPTQModel")
    # GPTQModel's newest name of the method, and vLLM's and AWQ's name of the width.
    assert parse_quantization_config({"method": "qqq", "w_bit": 4, "group_size": -1}).group_size == -1


def test_what_is_written_is_read_back() -> None:
    written = QuantizationSettings(128, ("lm_head", "model.layers.0.mlp"))
    assert parse_quantization_config(written.to_dict()) == written
    assert QuantizationSettings(-1).to_dict() == {"quant_method": "qqq", "wbits": 4, "group_size": -1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": 7}, "quant_method is 7"),
        ({"format": "marlin"}, "format is 'marlin'"),
        ({"wbits": 8}, "8 bits"),
        ({"wbits": True}, "True bits"),
        ({"wbits": None}, "none of wbits, bits, w_bit"),
        ({"bits": 8}, "disagree"),
        ({"group_size": 64}, "group_size is 64"),
        ({"group_size": None}, "group_size is None"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"group_size": 128.0}, "group_size is 128.0"),
        ({"sym": False}, "sym is false"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"desc_act": True}, "desc_act is true with group_size 128"),
        ({"desc_act": True, "meta": {"static_groups": False}}, "without static groups"),
        ({"modules_to_not_convert": "lm_head"}, "list of module names"),
        ({"modules_to_not_convert": [1]}, "list of module names"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization_config(HAND | change)


def test_act_order_that_is_computable() -> None:
    # With one scale a channel, and with static groups, the order of the inputs does not reach the file.
    assert parse_quantization_config(HAND | {"desc_act": True, "group_size": -1}).group_size == -1
    assert parse_quantization_config(HAND | {"desc_act": True, "static_groups": True}).group_size == 128
    assert parse_quantization_config(HAND | {"desc_act": True, "meta": {"static_groups": True}}).group_size == 128


def test_skipped_modules_match_whole_parts() -> None:
    parsed = QuantizationSettings(128, ("lm_head", "layers.1"))
    assert parsed.is_skipped("lm_head")
    assert parsed.is_skipped("model.layers.1.mlp.up_proj")
    assert not parsed.is_skipped("model.layers.11.mlp.up_proj")
    assert not parsed.is_skipped("model.lm_head_norm")


def test_where_settings_are_looked_up(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a QQQ checkpoint"):
        read_quantization_config(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"wbits": 4, "group_size": -1}))
    assert read_quantization_config(tmp_path).group_size == -1
    (tmp_path / "quant_config.json").write_text(json.dumps({"wbits": 4, "group_size": 128}))
    assert read_quantization_config(tmp_path).group_size == 128
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": GPTQMODEL}))
    assert read_quantization_config(tmp_path).flavour == "GPTQModel"
    with pytest.raises(CheckpointError, match="not a folder"):
        read_quantization_config(tmp_path / "config.json")


def test_gptq_settings_without_a_method_are_not_taken_for_qqq(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False}))
    with pytest.raises(CheckpointError, match="names no quant_method"):
        read_quantization_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"a": ' + "[" * 100_000, "\xff", '{"a": ' + "1" * 5000 + "}"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json_object(tmp_path / "config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted({*HAND, *GPTQMODEL, "modules_to_not_convert", "w_bit"})), json_values))
def test_any_configuration_is_understood_or_refused(config: dict) -> None:
    try:
        parsed = parse_quantization_config(config)
    except CheckpointError:
        return
    assert parsed.group_size in (128, -1)
    # Who asks first whether a folder is QQQ must not miss one: other loaders would give it random weights.
    assert FoundConfig(config, "").is_qqq
