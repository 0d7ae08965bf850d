"""Options that the subcommands of `marlin-qqq bench` share, and how their text becomes shapes and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from marlin_qqq._devices import check_device
from marlin_qqq.bench.presets import REFERENCE_SHAPES, Layer, model_layers, parse_integers, parse_shape
from marlin_qqq.bench.problem import GROUP_128, PER_CHANNEL
from marlin_qqq.bench.runner import METHODS, Settings

ModelOption = Annotated[
    str | None, typer.Option(help="Shapes of a model's linear layers (see `bench models`), or `reference`.")
]
TensorParallelOption = Annotated[int, typer.Option("--tp", help="Tensor-parallel size: the shapes of one rank.")]
ShapeOption = Annotated[
    list[str] | None, typer.Option("--shape", help="NxK (out_features x in_features); may be given more than once.")
]
TokensOption = Annotated[str, typer.Option("--num-tokens", "-m", help="Batch sizes: 1,16,64 or first:last:step.")]
GroupOption = Annotated[str, typer.Option("--group-size", "-g", help="128, -1 (per-channel) or both: 128,-1.")]
VariantOption = Annotated[
    str,
    typer.Option(
        "--variant",
        help="Variants of our op, comma-separated: default, constant (constant_weights=True), standalone, bias, bf16, "
        "sm80, sm90, tile:NAME, split:COUNT; join parts with +.",
    ),
]
BaselinesOption = Annotated[
    str,
    typer.Option(help="auto, none, or of: read, fp16, bf16, int_mm, fp8, humming, vllm (on a CPU: fp32, int_mm)."),
]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda, cuda:INDEX or cpu.")]
DtypeOption = Annotated[str, typer.Option(help="Output type: float16 or bfloat16.")]
MethodOption = Annotated[
    str, typer.Option(help="On a GPU: graph, sustained (400 launches back to back) or graph,sustained.")
]
ReplaysOption = Annotated[int, typer.Option(min=3, help="Timed replays of each CUDA graph.")]
SecondsOption = Annotated[float, typer.Option(help="On a CPU: seconds to time each implementation for.")]
ServedOption = Annotated[
    bool, typer.Option("--served", help="Put a kernel of torch's before every layer, as a model does.")
]
BiasOption = Annotated[bool, typer.Option("--bias", help="Add a bias.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the random data.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the whole run here.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="Write one row a measurement here.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write plots (PNG and SVG) into this folder.")]

DEFAULT_TOKENS = "1,16,64,256,1024,4096"
DEFAULT_CPU_TOKENS = "1,16,64"


def make_settings(
    device: str, dtype: str, method: str, replays: int, seconds: float, bias: bool, seed: int
) -> Settings:
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"--dtype {dtype!r} is not allowed; float16 or bfloat16")
    if not 0 < seconds < math.inf:  # false for NaN, too
        raise ValueError(f"--seconds {seconds} is not allowed; a positive number of seconds")
    methods = split(method)
    if not methods or set(methods) - set(METHODS):
        raise ValueError(f"--method {method!r} is not allowed; one or both of {', '.join(METHODS)}")
    settings = Settings(dtype=dtype, methods=methods, replays=replays, cpu_seconds=seconds, with_bias=bias, seed=seed)
    return replace(settings, device=check_device(device))


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def select_layers(model: str | None, tensor_parallel: int, shapes: Sequence[str] | None) -> list[Layer]:
    if model is None and not shapes:
        model = "llama-3.1-8b"
    layers = [parse_shape(part) for text in shapes or () for part in split(text)]
    if shapes and not layers:
        raise ValueError(f"--shape {shapes[0]!r} holds no shape; NxK (out_features x in_features) is needed")
    if model == "reference":
        return layers + list(REFERENCE_SHAPES)
    return layers + (list(model_layers(model, tensor_parallel)) if model is not None else [])


def select_tokens(text: str, settings: Settings) -> list[int]:
    tokens = parse_integers(text or (DEFAULT_TOKENS if settings.on_gpu else DEFAULT_CPU_TOKENS))
    if tokens[0] < 1:
        raise ValueError(f"--num-tokens {text!r}: every batch must have at least one token")
    return tokens


def select_groups(text: str) -> list[int]:
    groups = split(text)
    allowed = {"128": GROUP_128, "-1": PER_CHANNEL}
    if not groups or set(groups) - set(allowed):
        raise ValueError(f"--group-size {text!r} is not allowed; 128, -1 (per-channel) or both: 128,-1")
    return list(dict.fromkeys(allowed[group] for group in groups))
