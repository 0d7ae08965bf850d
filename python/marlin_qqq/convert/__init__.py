"""Model folders to QQQ checkpoints: float, GPTQ or QQQ in, HandH1998's layout out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from marlin_qqq.convert.plan import ConversionOptions, ConversionPlan, plan_conversion
from marlin_qqq.convert.run import ConversionResult, Progress, run_conversion

__all__ = ["ConversionOptions", "ConversionPlan", "ConversionResult", "convert", "plan_conversion", "run_conversion"]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionResult:
    """Converts a model folder to a QQQ checkpoint; what `marlin-qqq convert` runs.

    Args:
        source: a Hugging Face folder with fp16, bf16 or fp32 weights, a 4-bit GPTQ folder, or a QQQ folder of either
            flavour (which is checked, repaired and rewritten).
        destination: the folder to make.
        restart: throw an unfinished conversion away.
        progress: called with (name, bytes) for every piece of the output.
        **options: fields of `ConversionOptions`.

    Raises:
        CheckpointError: see `plan_conversion` and `run_conversion`.

    Example:
        >>> convert("TinyLlama", "TinyLlama-QQQ", group_size=128)  # doctest: +SKIP
    """
    plan = plan_conversion(Path(source), Path(destination), ConversionOptions(**options))
    return run_conversion(plan, restart=restart, progress=progress)
