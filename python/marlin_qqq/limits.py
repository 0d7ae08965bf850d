"""The sizes that the format has, for Python (csrc/format/limits.h holds them for C++). Knows no torch."""

from __future__ import annotations

GROUP_SIZE = 128
PER_CHANNEL = -1
# A packed tile is 16 inputs x 64 outputs; packed tensors may be cut only between tiles.
TILE_IN_FEATURES = 16
TILE_OUT_FEATURES = 64
# What marlin_qqq_gemm takes: N a multiple of 64, K a multiple of 128 (in both modes) below the limit.
OUT_FEATURES_MULTIPLE = 64
IN_FEATURES_MULTIPLE = 128
IN_FEATURES_LIMIT = 132104


def check_integer(name: str, value: int) -> None:
    """Raises ``TypeError`` for what is no integer; NumPy's and torch's symbolic ones are."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an integer")


def check_group_size(group_size: int) -> int:
    """Returns ``group_size`` if the format has it (128 or -1), else raises ``ValueError``."""
    if group_size not in (GROUP_SIZE, PER_CHANNEL):
        raise ValueError(
            f"group_size is {group_size!r}; allowed: {GROUP_SIZE}, or {PER_CHANNEL} for one scale a channel"
        )
    return int(group_size)


def check_in_features_limit(in_features: int, subject: str) -> None:
    """Raises ``ValueError`` for more inputs than a product may have; ``subject`` says what has them, and the number."""
    if in_features >= IN_FEATURES_LIMIT:
        raise ValueError(
            f"{subject}; in_features must be below {IN_FEATURES_LIMIT}, where the int32 sum could overflow"
        )


def workspace_size(out_features: int) -> int:
    """int32 values of the workspace that ``marlin_qqq_gemm`` takes."""
    return out_features // TILE_OUT_FEATURES * 16
