"""Looks into the planner without running anything: which kernel a problem would get, on a GPU that need not be here.

The work is done by the C++ module ``_introspection``, which is built for one CPython version. Without it the ops still
work; only the functions here raise an ImportError that says so, and ``Plan`` is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._introspection import BuildInfo, Plan, TileDescription

__all__ = ["Plan", "build_info", "candidates", "plan", "tile_table"]


def _module() -> Any:
    try:
        from . import _introspection
    except ImportError as error:
        import sys

        raise ImportError(
            f"marlin_qqq: the introspection module is not built for this Python ({sys.version.split()[0]}), so plan(), "
            "candidates(), tile_table() and build_info() are not available; the ops are. Build the package with this "
            f"interpreter and its headers (python3-dev). ({error})"
        ) from error
    return _introspection


def plan(
    num_tokens: int,
    out_features: int,
    in_features: int,
    group_size: int = 128,
    device: str = "sm_90",
    quantizes: bool = False,
    constant_weights: bool = False,
    standalone: bool = False,
    **overrides: Any,
) -> Plan:
    """The launch that :func:`marlin_qqq.marlin_qqq_gemm` would make for a problem on a GPU.

    Args:
        num_tokens: rows of the activations, from 0 up.
        out_features: a positive multiple of 64.
        in_features: a positive multiple of 128, below 132104.
        group_size: 128, or -1 for per-channel weights.
        device: ``"sm_80"`` (A100), ``"sm_86"``, ``"sm_89"``, ``"sm_90"`` (H100, H200) or ``"sm_120"``.
        quantizes: the launch of :func:`marlin_qqq.marlin_qqq_linear` instead, for fp16 or bf16 rows. The plan's own
            ``quantizes`` says whether the product's kernel quantises them, or a kernel before it does.
        constant_weights: as the op's argument.
        standalone: whether the launch stands between kernels that let nothing start early, such as the norms of a model
            in a captured CUDA graph, and not in a row of launches of this library (docs/kernel-sm90.md).
        overrides: ``tile`` (a name from :func:`tile_table` or a plan's ``name``), ``split`` and ``family``
            (``"sm80"``, ``"sm90"``), as the environment variables ``MARLIN_QQQ_TILE``, ``MARLIN_QQQ_SPLIT`` and
            ``MARLIN_QQQ_FAMILY``.

    Returns:
        A :class:`Plan` whose fields can be read and printed.

    Raises:
        ValueError: a size, the device or an override is not allowed; the message says what is.
        ImportError: the package was built without the introspection module.

    Example:
        >>> print(marlin_qqq.plan(16, 4096, 4096, 128, device="sm_90"))     # doctest: +SKIP
    """
    return _module().plan(
        num_tokens,
        out_features,
        in_features,
        group_size,
        device,
        quantizes=quantizes,
        constant_weights=constant_weights,
        standalone=standalone,
        **overrides,
    )


def candidates(
    num_tokens: int,
    out_features: int,
    in_features: int,
    group_size: int = 128,
    device: str = "sm_90",
    quantizes: bool = False,
    constant_weights: bool = False,
    standalone: bool = False,
) -> list[Plan]:
    """Every launch that could run a problem, the planner's favourite first. Arguments and errors as :func:`plan`."""
    return _module().candidates(
        num_tokens,
        out_features,
        in_features,
        group_size,
        device,
        quantizes=quantizes,
        constant_weights=constant_weights,
        standalone=standalone,
    )


def tile_table() -> list[TileDescription]:
    """The compiled-in tiles: ``family``, ``name``, ``tile_tokens``, ``tile_features``, ``stages``, ``threads``."""
    return _module().tile_table()


def build_info() -> BuildInfo:
    """How the package was built: version, compilers, CUDA architectures, CPU instruction set in use."""
    return _module().build_info()


def __getattr__(name: str) -> Any:
    if name == "Plan":
        try:
            return _module().Plan
        except ImportError as error:  # hasattr, inspect and pydoc let an AttributeError alone pass
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
