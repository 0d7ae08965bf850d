"""Opening a folder of any kind: which ones are QQQ, and that no layer is left with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import VOCABULARY, rewrite_config, rewrite_tensors, tiny_model

from marlin_qqq import quantize_model
from marlin_qqq.checkpoint import CheckpointError, write_checkpoint
from marlin_qqq.model_folder import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(24)[None] * 7 % VOCABULARY
# Everything that parse_quantization_config takes for QQQ.
QQQ_CONFIGS = [
    {"quant_method": "qqq", "wbits": 4, "group_size": 128},
    {"quant_method": "QQQ", "bits": 4, "group_size": 128},
    {"method": "qqq", "bits": 4, "group_size": 128},
    {"format": "qqq", "bits": 4, "group_size": 128},
    {"checkpoint_format": "QQQ", "w_bit": 4, "q_group_size": 128},
    {"wbits": 4, "group_size": 128},
]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A QQQ folder, and the logits that its model has."""
    model = quantize_model(tiny_model(), 128)
    return write_checkpoint(model, tmp_path / "q"), logits(model)


@pytest.mark.parametrize("config", QQQ_CONFIGS, ids=str)
@pytest.mark.parametrize("side_file", [None, "quant_config.json", "quantize_config.json"])
def test_every_spelling_of_qqq_is_opened_as_qqq(quantized, config: dict, side_file: str | None) -> None:
    folder, expected = quantized
    rewrite_config(folder, quantization_config=config if side_file is None else None)
    if side_file is not None:
        (folder / side_file).write_text(json.dumps(config))
    assert torch.equal(logits(load_model(folder)), expected)


def test_qqq_beside_another_method_is_refused(quantized) -> None:
    folder, _ = quantized
    rewrite_config(folder, quantization_config={"quant_method": "gptq", "format": "qqq", "bits": 4, "group_size": 128})
    with pytest.raises(CheckpointError, match="quant_method is 'gptq'"):
        load_model(folder)


def test_a_configuration_that_is_no_object_is_refused(source: Path) -> None:
    rewrite_config(source, quantization_config=["qqq"])
    with pytest.raises(CheckpointError, match=r"quantization_config in .*config\.json is a list; an object is needed"):
        load_model(source)


def test_a_float_folder_is_loaded_as_it_is(source: Path) -> None:
    assert torch.equal(logits(load_model(source)), logits(tiny_model()))


def test_a_float_folder_that_lacks_weights_is_refused(source: Path) -> None:
    rewrite_tensors(source, {"model.layers.1.mlp.down_proj.weight": None})
    with pytest.raises(
        CheckpointError, match=r"float lacks 1 tensors of the model, such as model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load_model(source)


def test_a_float_folder_with_weights_of_another_shape_is_refused(source: Path) -> None:
    rewrite_tensors(source, {"model.layers.1.mlp.down_proj.weight": torch.zeros(128, 128).half()})
    with pytest.raises(CheckpointError, match=r"down_proj"):
        load_model(source)


def test_a_folder_without_a_configuration_is_refused(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(source)
