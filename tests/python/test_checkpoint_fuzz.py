"""Damaged files: whatever the bytes say, the reader returns tensors of the promised form or raises CheckpointError."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlin_qqq.checkpoint import Checkpoint, CheckpointError, write_checkpoint
from marlin_qqq.quantization import quantize_weight

BIG = [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
DTYPES = ["I32", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "i32", "", 3]
NAMES = ["a.B", "a.s_channel", "a.s_group", "a.bias", ".B", "B", "a..B", "a.B.B", "\ud800.B", "__metadata__"]
FUZZ = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fuzz") / "q"
    weight = quantize_weight(torch.randn(64, 128), 128)
    tensors = {f"a.{key}": value for key, value in weight._asdict().items()} | {"a.bias": torch.ones(64).half()}
    write_checkpoint(tensors, path, config={"model_type": "x"}, group_size=128)
    yield path


def read_or_refuse(folder: Path) -> None:
    try:
        checkpoint = Checkpoint(folder)
        for module, loaded in checkpoint.read_all():
            assert loaded.weight.B.shape == (module.in_features // 16, 2 * module.out_features)
            assert loaded.weight.B.dtype == torch.int32
            assert bool(torch.isfinite(loaded.weight.s_channel).all() and torch.isfinite(loaded.weight.s_group).all())
    except CheckpointError as error:
        assert str(error)


def with_bytes(folder: Path, name: str, content: bytes) -> None:
    file = folder / name
    original = file.read_bytes()
    try:
        file.write_bytes(content)
        read_or_refuse(folder)
    finally:
        file.write_bytes(original)


@FUZZ
@given(data=st.data())
def test_flipped_bytes(folder: Path, data: st.DataObject) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 8))):
        # The header matters most; now and then the values.
        last = data.draw(st.sampled_from([7, header_end, header_end, len(content) - 1]))
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    with_bytes(folder, "model.safetensors", bytes(content))


@FUZZ
@given(cut=st.integers(0, 10_000), extra=st.binary(max_size=64))
def test_cut_and_extended(folder: Path, cut: int, extra: bytes) -> None:
    content = (folder / "model.safetensors").read_bytes()
    with_bytes(folder, "model.safetensors", content[:cut] + extra)
    with_bytes(folder, "model.safetensors", content + extra)


dimension = st.integers(-1, 3) | st.sampled_from([8, 64, 128, 1.5, "8", None, *BIG])
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(dimension, max_size=4),
        "data_offsets": st.lists(st.integers(-2, 5000) | st.sampled_from(BIG), max_size=3),
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(NAMES), entry | st.none() | st.text(max_size=3), max_size=5),
    size=st.integers(0, 300),
)
def test_invented_headers(folder: Path, header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    with_bytes(folder, "model.safetensors", struct.pack("<Q", len(text)) + text + bytes(size))


@FUZZ
@given(length=st.integers(0, 2**64 - 1), body=st.binary(max_size=64))
def test_header_lengths(folder: Path, length: int, body: bytes) -> None:
    with_bytes(folder, "model.safetensors", struct.pack("<Q", length) + body)


@FUZZ
@given(content=st.binary(max_size=40) | st.text(alphabet='{}[]":,qwbits4grou_size128-', max_size=60).map(str.encode))
def test_configurations(folder: Path, content: bytes) -> None:
    with_bytes(folder, "config.json", content)


@FUZZ
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a.B", "a.s_channel", "a.s_group", "a.bias", "other"]),
        st.text(max_size=12)
        | st.sampled_from(["model.safetensors", "../q/model.safetensors", "config.json"])
        | st.none(),
    )
)
def test_indexes(folder: Path, weight_map: dict) -> None:
    index = folder / "model.safetensors.index.json"
    try:
        index.write_text(json.dumps({"weight_map": weight_map}))
        read_or_refuse(folder)
    finally:
        index.unlink()
