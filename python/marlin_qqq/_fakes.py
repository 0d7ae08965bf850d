"""Fakes: what the ops give on tensors without memory, as torch.compile, torch.export and meta tensors need it.

They refuse what csrc/torch refuses, in its sentences (the tests run one table of mistakes through both), with two
exceptions: strides, which torch.compile may still change, and limits that would bound a dynamic ``num_tokens``. Sizes
may be symbols, so conditions go through ``torch._check``: a condition on sizes that are not known until run time is
then checked at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library  # noqa: F401  defines the ops
from .limits import (
    GROUP_SIZE,
    IN_FEATURES_LIMIT,
    IN_FEATURES_MULTIPLE,
    OUT_FEATURES_MULTIPLE,
    PER_CHANNEL,
    TILE_IN_FEATURES,
    workspace_size,
)

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_name(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


class _Checker(NamedTuple):
    """Checks of one op's arguments."""

    op: str
    activations: str = ""  # name of the argument whose device the others must be on

    def that(self, condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
        torch._check(condition, lambda: f"{self.op}: {message()}")

    def defined(self, name: str, tensor: Tensor | None, hint: str = "") -> None:
        self.that(tensor is not None, lambda: f"{name} must be a tensor, got None{hint}")

    def device(self, name: str, tensor: Tensor, device: torch.device) -> None:
        self.that(
            tensor.device == device,
            lambda: f"{name} must be on the device of {self.activations}, {device}, got {tensor.device}",
        )

    def dtype(self, name: str, tensor: Tensor, expected: torch.dtype) -> None:
        self.that(
            tensor.dtype == expected,
            lambda: f"{name} must be {_dtype_name(expected)}, got {_dtype_name(tensor.dtype)}",
        )

    def rank_2(self, name: str, shape: str, tensor: Tensor) -> None:
        self.that(tensor.dim() == 2, lambda: f"{name} must have 2 dimensions, {shape}, got shape {_shape_name(tensor)}")

    def numel(self, name: str, what: str, tensor: Tensor, expected: int) -> None:
        self.that(
            tensor.numel() == expected,
            lambda: f"{name} must hold {what} = {expected} values, got shape {_shape_name(tensor)}",
        )

    def size_argument(self, name: str, got: int, tensor_size: str, expected: int) -> None:
        self.that(got == expected, lambda: f"{name} must equal {tensor_size} = {expected}, got {got}")

    def rows(self, x: Tensor) -> None:
        self.defined("x", x)
        self.that(
            x.dtype in _FLOAT_DTYPES,
            lambda: f"x must be float16, bfloat16 or float32, got {_dtype_name(x.dtype)}",
        )
        self.that(x.dim() >= 1, lambda: "x must have at least 1 dimension, [..., in_features], got a scalar")

    def weights(
        self,
        activations: Tensor,
        in_features_name: str,
        b_q_weight: Tensor,
        s_ch: Tensor,
        s_group: Tensor,
        bias: Tensor | None,
        output_dtype: torch.dtype,
    ) -> int:
        """The weight of a product with activations ``[..., in_features]``; returns ``out_features``."""
        self.that(
            output_dtype in (torch.float16, torch.bfloat16),
            lambda: f"out_dtype must be float16 or bfloat16, got {_dtype_name(output_dtype)}",
        )
        self.defined("b_q_weight", b_q_weight)
        self.defined("s_ch", s_ch)
        self.defined("s_group", s_group, "; for per-channel weights pass a tensor without values")
        for name, tensor, dtype in (
            ("b_q_weight", b_q_weight, torch.int32),
            ("s_ch", s_ch, torch.float32),
            ("s_group", s_group, torch.float16),
        ):
            self.device(name, tensor, activations.device)
            self.dtype(name, tensor, dtype)

        self.rank_2("b_q_weight", "[in_features / 16, 2 * out_features]", b_q_weight)
        in_features, out_features = activations.shape[-1], b_q_weight.shape[1] // 2
        subject = f"in_features ({in_features_name})"
        self.that(in_features > 0, lambda: f"{subject} must be a positive multiple of {IN_FEATURES_MULTIPLE}, got 0")
        self.that(
            in_features % IN_FEATURES_MULTIPLE == 0,
            lambda: f"{subject} must be a positive multiple of {IN_FEATURES_MULTIPLE}, got {in_features}",
        )
        self.that(
            in_features < IN_FEATURES_LIMIT,
            lambda: (
                f"{subject} must be below {IN_FEATURES_LIMIT}, where the int32 sum could overflow, got {in_features}"
            ),
        )
        for condition in (b_q_weight.shape[1] > 0, b_q_weight.shape[1] % (2 * OUT_FEATURES_MULTIPLE) == 0):
            self.that(
                condition,
                lambda: (
                    "b_q_weight's second size must be 2 * out_features with out_features a positive multiple of "
                    f"{OUT_FEATURES_MULTIPLE}, got {b_q_weight.shape[1]}"
                ),
            )
        self.that(
            b_q_weight.shape[0] == in_features // TILE_IN_FEATURES,
            lambda: (
                f"b_q_weight's first size must be in_features / 16 = {in_features // TILE_IN_FEATURES}, "
                f"got {b_q_weight.shape[0]}"
            ),
        )

        self.numel("s_ch", "out_features", s_ch, out_features)
        if s_group.numel() != 0:
            self._group_scale(s_group, in_features // GROUP_SIZE, out_features)
        if bias is not None:
            self.device("bias", bias, activations.device)
            self.that(
                bias.dtype == output_dtype,
                lambda: (
                    f"bias must have the output's dtype, {_dtype_name(output_dtype)}, got {_dtype_name(bias.dtype)}"
                ),
            )
            self.numel("bias", "out_features", bias, out_features)
        return out_features

    def _group_scale(self, s_group: Tensor, groups: int, out_features: int) -> None:
        def message() -> str:
            return (
                f"s_group must have shape [in_features / 128, out_features] = [{groups}, {out_features}] "
                f"(group_size {GROUP_SIZE}), or no values (per-channel), got {_shape_name(s_group)}"
            )

        self.that(s_group.dim() == 2, message)
        self.that(s_group.shape[0] == groups, message)
        self.that(s_group.shape[1] == out_features, message)

    def grouped(self, group_size: int) -> bool:
        self.that(
            group_size in (GROUP_SIZE, PER_CHANNEL),
            lambda: f"group_size must be {GROUP_SIZE} or {PER_CHANNEL} (per-channel), got {group_size}",
        )
        return group_size == GROUP_SIZE

    def packed_sizes(self, in_features: int, out_features: int, grouped: bool) -> None:
        multiple = GROUP_SIZE if grouped else TILE_IN_FEATURES
        for condition in (in_features > 0, in_features % multiple == 0):
            self.that(
                condition,
                lambda: (
                    f"in_features must be a positive multiple of {multiple}"
                    f"{' (group_size 128)' if grouped else ''}, got {in_features}"
                ),
            )
        for condition in (out_features > 0, out_features % OUT_FEATURES_MULTIPLE == 0):
            self.that(
                condition,
                lambda: f"out_features must be a positive multiple of {OUT_FEATURES_MULTIPLE}, got {out_features}",
            )


@torch.library.register_fake("marlin_qqq::marlin_qqq_gemm")
def _gemm(
    a,
    b_q_weight,
    s_tok,
    s_ch,
    s_group,
    workspace,
    size_m,
    size_n,
    size_k,
    *,
    bias=None,
    out_dtype=None,
    constant_weights=False,
):
    check = _Checker("marlin_qqq_gemm", "a")
    check.defined("a", a)
    for name, tensor, dtype in (("s_tok", s_tok, torch.float32), ("workspace", workspace, torch.int32)):
        check.defined(name, tensor)
        check.device(name, tensor, a.device)
        check.dtype(name, tensor, dtype)
    check.dtype("a", a, torch.int8)
    check.rank_2("a", "[num_tokens, in_features]", a)
    output_dtype = out_dtype or torch.float16
    out_features = check.weights(a, "a's second size", b_q_weight, s_ch, s_group, bias, output_dtype)
    check.size_argument("size_m", size_m, "a.size(0)", a.shape[0])
    check.size_argument("size_n", size_n, "b_q_weight.size(1) / 2", out_features)
    check.size_argument("size_k", size_k, "a.size(1)", a.shape[1])
    check.numel("s_tok", "num_tokens", s_tok, a.shape[0])
    check.that(
        workspace.numel() >= workspace_size(out_features),
        lambda: (
            f"workspace must hold at least out_features / 64 * 16 = {workspace_size(out_features)} int32 zeros, "
            f"got {workspace.numel()} (see make_workspace)"
        ),
    )
    return a.new_empty((a.shape[0], out_features), dtype=output_dtype)


@torch.library.register_fake("marlin_qqq::quantize_per_token")
def _quantize_per_token(x):
    _Checker("quantize_per_token").rows(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("marlin_qqq::marlin_qqq_linear")
def _linear(x, b_q_weight, s_ch, s_group, *, bias=None, out_dtype=None, constant_weights=False):
    check = _Checker("marlin_qqq_linear", "x")
    check.rows(x)
    output_dtype = out_dtype or (torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16)
    out_features = check.weights(x, "x's last size", b_q_weight, s_ch, s_group, bias, output_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=output_dtype)


@torch.library.register_fake("marlin_qqq::pack_weight")
def _pack_weight(codes, group_size):
    check = _Checker("pack_weight")
    grouped = check.grouped(group_size)
    check.dtype("codes", codes, torch.int8)
    check.rank_2("codes", "[in_features, out_features]", codes)
    in_features, out_features = codes.shape
    check.packed_sizes(in_features, out_features, grouped)
    return codes.new_empty((in_features // TILE_IN_FEATURES, 2 * out_features), dtype=torch.int32)


@torch.library.register_fake("marlin_qqq::unpack_weight")
def _unpack_weight(packed, group_size):
    check = _Checker("unpack_weight")
    grouped = check.grouped(group_size)
    check.dtype("packed", packed, torch.int32)
    check.rank_2("packed", "[in_features / 16, 2 * out_features]", packed)
    columns = packed.shape[1]
    check.that(columns % 2 == 0, lambda: f"packed's second size must be 2 * out_features, got {columns}")
    in_features, out_features = TILE_IN_FEATURES * packed.shape[0], columns // 2
    check.packed_sizes(in_features, out_features, grouped)
    return packed.new_empty((in_features, out_features), dtype=torch.int8)


def _permutation(op: str, multiple: int) -> Callable[[Tensor], Tensor]:
    check = _Checker(op)

    def fake(scale):
        check.that(scale.dim() >= 1, lambda: "scale must have at least 1 dimension, [..., out_features], got a scalar")
        check.that(
            scale.shape[-1] % multiple == 0,
            lambda: f"scale's last size, out_features, must be a multiple of {multiple}, got {scale.shape[-1]}",
        )
        check.that(
            scale.element_size() in (2, 4),
            lambda: (
                f"scale must have elements of 2 or 4 bytes (float16, bfloat16, float32), got {_dtype_name(scale.dtype)}"
            ),
        )
        return scale.new_empty(scale.shape)

    return fake


for _kind, _multiple in (("group", 64), ("channel", 32)):
    for _direction in ("permute", "unpermute"):
        _op = f"{_direction}_{_kind}_scale"
        torch.library.register_fake(f"marlin_qqq::{_op}", _permutation(_op, _multiple))
