"""What a benchmark can time: our op in its variants, and the baselines that are installed.

``gemm_implementations`` turns names from the command line into objects; whether one can run is decided when it is
loaded, and the table says why where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.problem import PER_CHANNEL

__all__ = [
    "CPU_BASELINES",
    "CUDA_BASELINES",
    "Bound",
    "Context",
    "Implementation",
    "Unavailable",
    "default_baselines",
    "gemm_implementations",
    "parse_baselines",
]

CUDA_BASELINES = ("read", "chain", "fp16", "bf16", "int_mm", "fp8", "humming", "vllm")
CPU_BASELINES = ("fp32", "int_mm")


def default_baselines(device: str) -> tuple[str, ...]:
    """All baselines of the device but bf16 matmul, which runs at fp16's speed, and the chained read, a ceiling."""
    if not device.startswith("cuda"):
        return CPU_BASELINES
    return tuple(name for name in CUDA_BASELINES if name not in ("bf16", "chain"))


def parse_baselines(text: str, device: str) -> tuple[str, ...]:
    """``"auto"``, ``"none"`` or a comma-separated list. Raises ValueError for a name the device does not have."""
    if text == "auto":
        return default_baselines(device)
    names = tuple(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")
    known = CUDA_BASELINES if device.startswith("cuda") else CPU_BASELINES
    for name in names:
        if name not in known:
            raise ValueError(f"unknown baseline {name!r} for device {device}; known: auto, none, {', '.join(known)}")
    return names


def gemm_implementations(
    variants: Sequence[str], baselines: Sequence[str], group_sizes: Sequence[int]
) -> list[Implementation]:
    """Our op for every variant and group size, then the baselines (reads, Humming and vLLM for every size too)."""
    from marlin_qqq.bench.implementations import humming, marlin, torch_baselines, vllm

    implementations: list[Implementation] = [
        marlin.MarlinGemm(variant, group_size) for group_size in group_sizes for variant in variants
    ]
    for name in baselines:
        if name == "read":
            implementations += [torch_baselines.PlainRead(group_size) for group_size in group_sizes]
        elif name == "chain":
            implementations += [torch_baselines.ChainedRead(group_size) for group_size in group_sizes]
        elif name == "humming":
            implementations += [humming.HummingGemm(group_size) for group_size in group_sizes]
        elif name == "vllm":
            implementations += [vllm.VllmQQQ(group_size) for group_size in group_sizes]
            if PER_CHANNEL in group_sizes:
                implementations.append(vllm.VllmScaledMm())
        else:
            implementations.append(torch_baselines.make(name))
    return implementations
