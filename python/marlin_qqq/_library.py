"""Finds and loads the two shared libraries that hold the ops. Imported for its effect, once, by ops.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
CPU_LIBRARY = _FOLDER / "libmarlin_qqq.so"
CUDA_LIBRARY = _FOLDER / "libmarlin_qqq_cuda.so"

#: Why there are no CUDA kernels in this process, in one sentence; None when there are.
cuda_unavailable_reason: str | None = None


def _load() -> None:
    global cuda_unavailable_reason
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"marlin_qqq: {CPU_LIBRARY} does not exist: the package is not built. "
            "Run `pip install .` in its source folder, or see CONTRIBUTING.md for an in-place build."
        )
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"marlin_qqq: {CPU_LIBRARY} does not load beside torch {torch.__version__} "
            f"(2.10 or newer is needed): {error}"
        ) from error

    if not CUDA_LIBRARY.exists():
        cuda_unavailable_reason = "this build of marlin_qqq has no CUDA kernels (no nvcc was found when it was built)"
    elif torch.version.cuda is None:
        cuda_unavailable_reason = f"torch {torch.__version__} is built without CUDA"
    else:
        try:
            torch.ops.load_library(str(CUDA_LIBRARY))
        except OSError as error:
            cuda_unavailable_reason = f"{CUDA_LIBRARY.name} does not load: {error}"
            warnings.warn(f"marlin_qqq: no CUDA kernels: {cuda_unavailable_reason}", RuntimeWarning, stacklevel=3)


_load()
