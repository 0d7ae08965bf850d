"""Reading QQQ folders: what is accepted, what is repaired, and that a lie is refused with a sentence that names it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from folders import rewrite_config, rewrite_tensors
from safetensors.torch import load_file, save_file

from marlin_qqq.checkpoint import Checkpoint, CheckpointError, TensorFolder, write_checkpoint
from marlin_qqq.checkpoint.writer import write_tensors
from marlin_qqq.packing import permute_channel_scale, permute_group_scale, unpermute_channel_scale
from marlin_qqq.quantization import dequantize_weight, quantize_weight

LAYER = "model.layers.0.up"
N, K = 128, 256


def make_folder(path: Path, group_size: int, layers: int = 3, max_shard_bytes: int = 10**9) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(K).half()}
    for index in range(layers):
        name = f"model.layers.{index}.up"
        weight = quantize_weight(torch.randn(N, K), group_size)
        tensors |= {f"{name}.{key}": value for key, value in weight._asdict().items()}
        tensors[f"{name}.bias"] = torch.randn(N).half()
    write_checkpoint(tensors, path, config={"model_type": "x"}, group_size=group_size, max_shard_bytes=max_shard_bytes)
    return tensors


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_round_trip_to_equal_bits(tmp_path: Path, group_size: int, max_shard_bytes: int) -> None:
    tensors = make_folder(tmp_path / "q", group_size, layers=12, max_shard_bytes=max_shard_bytes)
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.settings.group_size == group_size
    assert [int(name.split(".")[2]) for name in checkpoint.modules] == list(range(12))
    assert (len(checkpoint.folder.files) > 1) == (max_shard_bytes < 10**9)
    for module, loaded in checkpoint.read_all():
        assert (module.out_features, module.in_features, module.group_size) == (N, K, group_size)
        assert loaded.repaired_columns == ()
        for key, value in loaded.weight._asdict().items():
            assert torch.equal(value, tensors[f"{module.name}.{key}"])
        assert loaded.bias is not None and torch.equal(loaded.bias, tensors[f"{module.name}.bias"])


def test_per_channel_files_leave_group_scales_out_as_the_original_does(tmp_path: Path) -> None:
    make_folder(tmp_path / "q", -1)
    assert not [name for name in TensorFolder(tmp_path / "q").tensors if name.endswith("s_group")]


@pytest.mark.parametrize("shape", [(0,), (0, N), (2, 0)])
def test_gptqmodel_flavour(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """GPTQModel writes `bits` and more, keeps the empty group scales, and puts a pickle or two beside the weights."""
    tensors = make_folder(tmp_path / "q", -1)
    rewrite_tensors(tmp_path / "q", {f"{LAYER}.s_group": torch.empty(shape, dtype=torch.float16)})
    quantization = {"bits": 4, "group_size": -1, "quant_method": "qqq", "format": "qqq", "sym": True, "desc_act": True}
    rewrite_config(tmp_path / "q", quantization_config=quantization | {"meta": {"mse": 0.0}})
    (tmp_path / "q" / "quantizers.pth").write_bytes(pickle.dumps("never opened"))
    checkpoint = Checkpoint(tmp_path / "q")
    assert checkpoint.settings.flavour == "GPTQModel"
    assert torch.equal(checkpoint.read(LAYER).weight.B, tensors[f"{LAYER}.B"])
    assert checkpoint.modules[LAYER].group_size == -1


def test_columns_that_leave_the_int8_range_are_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = make_folder(tmp_path / "q", 128)
    weight = quantize_weight(torch.randn(N, K), 128)
    real = dequantize_weight(weight)
    # Some converters take the channel scale from the weights before quantisation: it comes out too small.
    factor = torch.ones(N)
    factor[[3, 77]] = 1.25
    moved = weight._replace(
        s_channel=weight.s_channel / permute_channel_scale(factor[None]),
        s_group=(weight.s_group.float() * permute_group_scale(factor[None])).half(),
    )
    rewrite_tensors(tmp_path / "q", {f"{LAYER}.{key}": value for key, value in moved._asdict().items()})
    loaded = Checkpoint(tmp_path / "q").read(LAYER)
    assert loaded.repaired_columns == (3, 77)
    assert f"{LAYER}: 2 columns" in caplog.text
    difference = (dequantize_weight(loaded.weight) - real).abs()
    # A step of the int8 weight is s_channel; fp16 group scales may move a product across a rounding boundary.
    assert bool((difference <= 1.01 * unpermute_channel_scale(weight.s_channel).t()).all())
    untouched = [column for column in range(N) if column not in (3, 77)]
    assert float(difference[untouched].max()) == 0.0
    assert torch.equal(Checkpoint(tmp_path / "q").read("model.layers.1.up").weight.B, tensors["model.layers.1.up.B"])


def test_group_128_with_128_inputs(tmp_path: Path) -> None:
    """With one row of group scales a layer is per-group; without, it is what HandH1998/QQQ packs there: per-channel."""
    tensors = {}
    for name, group_size in (("a", 128), ("b", -1)):
        tensors |= {
            f"{name}.{key}": value for key, value in quantize_weight(torch.randn(64, 128), group_size)._asdict().items()
        }
    tensors["b.s_group"] = torch.empty(0, dtype=torch.float16)
    (tmp_path / "q").mkdir()
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "qqq", "wbits": 4, "group_size": 128}})
    )
    modules = Checkpoint(tmp_path / "q").modules
    assert (modules["a"].group_size, modules["b"].group_size) == (128, -1)


def test_tensors_that_share_memory_are_written_separately(tmp_path: Path) -> None:
    """Tied embeddings, slices of a fused weight: safetensors itself refuses them."""
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "b": whole, "part": whole[1:], "turned": whole.t(), "empty": whole[:0]}
    write_tensors(tmp_path / "model.safetensors", tensors)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


LIES = {
    "B of another dtype": ({f"{LAYER}.B": torch.zeros(16, 256, dtype=torch.int64)}, "dtype int64; int32"),
    "B of rank 1": ({f"{LAYER}.B": torch.zeros(4096, dtype=torch.int32)}, r"shape \[4096\]"),
    "B too wide": ({f"{LAYER}.B": torch.zeros(16, 300, dtype=torch.int32)}, r"shape \[16, 300\]"),
    "B without rows": ({f"{LAYER}.B": torch.zeros(0, 256, dtype=torch.int32)}, r"shape \[0, 256\]"),
    "B too long": ({f"{LAYER}.B": torch.zeros(8257, 128, dtype=torch.int32)}, "in_features is 132112"),
    "B of another K": ({f"{LAYER}.B": torch.zeros(24, 256, dtype=torch.int32)}, r"\[2, 128\]; \[3, 128\] is needed"),
    "K no multiple of the group": ({f"{LAYER}.B": torch.zeros(17, 256, dtype=torch.int32)}, "in_features is 272"),
    "no channel scale": ({f"{LAYER}.s_channel": None}, "no s_channel"),
    "channel scale too short": ({f"{LAYER}.s_channel": torch.ones(1, 64)}, r"s_channel has shape \[1, 64\]"),
    "channel scale fp16": ({f"{LAYER}.s_channel": torch.ones(1, N).half()}, "dtype float16; float32"),
    "no group scale": ({f"{LAYER}.s_group": None}, "no s_group"),
    "group scale fp32": ({f"{LAYER}.s_group": torch.ones(2, N)}, "dtype float32; float16"),
    "group scale transposed": ({f"{LAYER}.s_group": torch.ones(N, 2).half()}, r"\[128, 2\]; \[2, 128\]"),
    "bias too long": ({f"{LAYER}.bias": torch.ones(N + 1)}, r"bias has shape \[129\]"),
    "bias of integers": ({f"{LAYER}.bias": torch.ones(N, dtype=torch.int8)}, "dtype int8"),
    "weight beside B": ({f"{LAYER}.weight": torch.ones(N, K)}, "both B and weight"),
    "no B": ({f"{LAYER}.B": None}, r"has no model\.layers\.0\.up\.B beside it"),
    "nothing quantised": (
        {f"model.layers.{i}.up.{key}": None for i in range(3) for key in ("B", "s_channel", "s_group")},
        "no quantised module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path: Path, lie: str) -> None:
    change, message = LIES[lie]
    make_folder(tmp_path / "q", 128)
    rewrite_tensors(tmp_path / "q", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "q")


def test_group_size_of_the_config_must_be_the_files(tmp_path: Path) -> None:
    make_folder(tmp_path / "q", 128)
    rewrite_config(tmp_path / "q", quantization_config={"quant_method": "qqq", "wbits": 4, "group_size": -1})
    with pytest.raises(CheckpointError, match="says group_size -1"):
        Checkpoint(tmp_path / "q")


@pytest.mark.parametrize(
    ("key", "value"), [("s_channel", float("nan")), ("s_group", float("inf")), ("bias", float("-inf"))]
)
def test_values_that_are_not_finite(tmp_path: Path, key: str, value: float) -> None:
    tensors = make_folder(tmp_path / "q", 128)
    broken = tensors[f"{LAYER}.{key}"].clone()
    broken.view(-1)[5] = value
    rewrite_tensors(tmp_path / "q", {f"{LAYER}.{key}": broken})
    checkpoint = Checkpoint(tmp_path / "q")
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*{key}.* 1 "):
        checkpoint.read(LAYER)
    checkpoint.read("model.layers.1.up")


def test_unknown_module(tmp_path: Path) -> None:
    make_folder(tmp_path / "q", -1)
    with pytest.raises(CheckpointError, match="no quantised module nowhere"):
        Checkpoint(tmp_path / "q").read("nowhere")


class TestFolder:
    """Files and indexes, before anything is a tensor."""

    @staticmethod
    def sharded(path: Path) -> dict:
        make_folder(path, -1, max_shard_bytes=20_000)
        return json.loads((path / "model.safetensors.index.json").read_text())

    @staticmethod
    def rewrite_index(path: Path, index: dict) -> None:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    @pytest.mark.parametrize(
        "name",
        ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors",
         "x\0.safetensors", ".hidden.safetensors", "model.bin", 7, None, ["model.safetensors"]],
    )  # fmt: skip
    def test_index_that_leaves_the_folder(self, tmp_path: Path, name: object) -> None:
        index = self.sharded(tmp_path / "q")
        (tmp_path / "outside.safetensors").write_bytes(
            (tmp_path / "q" / index["weight_map"][f"{LAYER}.B"]).read_bytes()
        )
        index["weight_map"][f"{LAYER}.B"] = name
        self.rewrite_index(tmp_path / "q", index)
        with pytest.raises(CheckpointError, match=r"maps model\.layers\.0\.up\.B to"):
            Checkpoint(tmp_path / "q")

    def test_index_and_shards_that_disagree(self, tmp_path: Path) -> None:
        index = self.sharded(tmp_path / "q")
        files = sorted(set(index["weight_map"].values()))
        swapped = json.loads(json.dumps(index))
        swapped["weight_map"][f"{LAYER}.B"] = files[-1]
        self.rewrite_index(tmp_path / "q", swapped)
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.up\.B is in .*, but it is not"):
            TensorFolder(tmp_path / "q")
        unlisted = json.loads(json.dumps(index))
        del unlisted["weight_map"][f"{LAYER}.B"]
        self.rewrite_index(tmp_path / "q", unlisted)
        with pytest.raises(CheckpointError, match="does not list"):
            TensorFolder(tmp_path / "q")

    def test_tensor_in_two_shards(self, tmp_path: Path) -> None:
        index = self.sharded(tmp_path / "q")
        save_file({f"{LAYER}.B": torch.zeros(16, 256, dtype=torch.int32)}, tmp_path / "q" / "extra.safetensors")
        index["weight_map"]["other"] = "extra.safetensors"
        self.rewrite_index(tmp_path / "q", index)
        with pytest.raises(CheckpointError, match=r"is in both .*extra\.safetensors"):
            TensorFolder(tmp_path / "q")

    def test_missing_shard_and_shard_that_is_a_folder(self, tmp_path: Path) -> None:
        index = self.sharded(tmp_path / "q")
        shard = tmp_path / "q" / index["weight_map"][f"{LAYER}.B"]
        shard.unlink()
        with pytest.raises(CheckpointError, match="is missing"):
            Checkpoint(tmp_path / "q")
        shard.mkdir()
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint(tmp_path / "q")

    def test_names_that_would_reach_a_terminal(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "q", -1)
        rewrite_tensors(tmp_path / "q", {"a\x1b]0;owned\x07": torch.ones(1)})
        with pytest.raises(CheckpointError, match=r"named 'a\\x1b.*printable"):
            Checkpoint(tmp_path / "q")

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
    def test_index_without_a_map(self, tmp_path: Path, index: dict) -> None:
        self.sharded(tmp_path / "q")
        self.rewrite_index(tmp_path / "q", index)
        with pytest.raises(CheckpointError, match="no weight_map"):
            Checkpoint(tmp_path / "q")

    def test_pickles_are_refused_and_never_opened(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "q", -1)
        (tmp_path / "q" / "model.safetensors").unlink()
        marker = tmp_path / "opened"
        (tmp_path / "q" / "pytorch_model.bin").write_bytes(
            b"cos\nmkdir\n(S'" + str(marker).encode() + b"'\ntR."  # unpickling this makes a folder
        )
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never opened"):
            Checkpoint(tmp_path / "q")
        assert not marker.exists()
        # A pickle under a safetensors name is no safetensors file.
        (tmp_path / "q" / "pytorch_model.bin").rename(tmp_path / "q" / "model.safetensors")
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            Checkpoint(tmp_path / "q")
        assert not marker.exists()

    @pytest.mark.parametrize("size", [0, 4, 8, 9, 100, -1])
    def test_truncated_file(self, tmp_path: Path, size: int) -> None:
        make_folder(tmp_path / "q", -1)
        file = tmp_path / "q" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            Checkpoint(tmp_path / "q")

    def test_links_as_the_hub_cache_has_them(self, tmp_path: Path) -> None:
        """A cache's snapshot is a folder of links to blobs beside it; what a link leads to must be a regular file."""
        tensors = make_folder(tmp_path / "blobs", -1)
        (tmp_path / "snapshot").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
        assert torch.equal(Checkpoint(tmp_path / "snapshot").read(LAYER).weight.B, tensors[f"{LAYER}.B"])
        (tmp_path / "snapshot" / "model.safetensors").unlink()
        os.mkfifo(tmp_path / "snapshot" / "model.safetensors")  # opening it would wait for ever
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint(tmp_path / "snapshot")
        (tmp_path / "snapshot" / "config.json").unlink()
        os.mkfifo(tmp_path / "snapshot" / "config.json")
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint(tmp_path / "snapshot")

    def test_empty_folder_and_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no model\.safetensors and no"):
            TensorFolder(tmp_path)
        with pytest.raises(CheckpointError, match="not a folder"):
            TensorFolder(tmp_path / "nowhere")
