"""The ops as the specification states them, in int64 and by nothing of the package: what every kernel is compared with.

Layouts are scattered weight by weight from the formulas of docs/format.md, sums are int64, and float operations are the
specification's, one torch operation each (CPU, IEEE).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128


class Problem(NamedTuple):
    """One product in natural layout (codes, scales) and in stored layout (the op's arguments)."""

    a: Tensor  # int8 [M, K]
    s_tok: Tensor  # fp32 [M, 1]
    codes: Tensor  # int8 [K, N], natural
    channel_scale: Tensor  # fp32 [N], natural
    group_scale: Tensor | None  # fp16 [K/128, N], natural
    b_q_weight: Tensor  # int32 [K/16, 2N]
    s_ch: Tensor  # fp32 [1, N], stored
    s_group: Tensor  # fp16 [K/128, N], stored; [0] per-channel
    workspace: Tensor  # int32 [N/64*16]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.codes.shape[1], self.a.shape[1]

    @property
    def arguments(self) -> tuple:
        """The op's nine positional arguments."""
        return (self.a, self.b_q_weight, self.s_tok, self.s_ch, self.s_group, self.workspace, *self.sizes)

    def to(self, device: str) -> Problem:
        return Problem(*(None if value is None else value.to(device) for value in self))


def packed_position(in_features: int, out_features: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, word and nibble of every weight (k, n): three int64 [K, N]."""
    k = torch.arange(in_features)[:, None].expand(in_features, out_features)
    n = torch.arange(out_features)[None, :].expand(in_features, out_features)
    row = k // 16
    word = 128 * (n // 64) + 16 * (n % 8) + 4 * ((k % 16) // 4) + (n % 64) // 16
    b = (n % 16) // 8
    r = k % 4
    nibble = 2 * r + (1 - b) if group_size == -1 else 2 * b + r // 2 + 4 * (r % 2)
    return row, word, nibble


def pack_nibbles(nibbles: Tensor, group_size: int) -> Tensor:
    """Raw nibbles 0..15 [K, N] -> int32 [K/16, 2N]."""
    in_features, out_features = nibbles.shape
    row, word, nibble = packed_position(in_features, out_features, group_size)
    words = torch.zeros(in_features // 16 * 2 * out_features, dtype=torch.int64)
    words.index_add_(0, (row * 2 * out_features + word).flatten(), (nibbles.long() << (4 * nibble)).flatten())
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).reshape(in_features // 16, 2 * out_features)


def pack(codes: Tensor, group_size: int) -> Tensor:
    """Codes -8..7 [K, N] -> int32 [K/16, 2N]."""
    return pack_nibbles((codes.long() & 0xF) if group_size == -1 else codes.long() + 8, group_size)


def stored_group_column(out_features: int) -> Tensor:
    n = torch.arange(out_features)
    return 64 * (n // 64) + 8 * (n % 8) + (n % 64) // 8


def stored_channel_column(out_features: int) -> Tensor:
    n = torch.arange(out_features)
    j = n % 32
    return 32 * (n // 32) + 8 * ((j % 8) // 2) + 2 * (j // 8) + j % 2


def store(scale: Tensor, stored_column: Tensor) -> Tensor:
    """Natural columns to their stored places."""
    out = torch.empty_like(scale)
    out[..., stored_column] = scale
    return out


def int8_weight(codes: Tensor, group_scale: Tensor | None) -> Tensor:
    """W8 as int64 [K, N]; a product outside int8 wraps modulo 256, as the kernels' bit trick does."""
    if group_scale is None:
        return 16 * codes.long()
    product = codes.double() * group_scale.double().repeat_interleave(GROUP, dim=0)
    return (torch.round(product).long() + 128) % 256 - 128


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs or scales are equal to the bit. torch.equal takes -0 for +0."""
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def bits(value: Tensor) -> Tensor:
    """A floating-point tensor as the integers of its bits."""
    return value.view({2: torch.int16, 4: torch.int32}[value.element_size()])


def gemm(problem: Problem, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float16) -> Tensor:
    """The product and its epilogue: [M, N] of out_dtype."""
    accumulator = problem.a.long() @ int8_weight(problem.codes, problem.group_scale)
    value = accumulator.float() * problem.channel_scale[None, :].float()
    value = value * problem.s_tok.reshape(-1, 1).float()
    if bias is not None:
        value = value + bias.float()[None, :]
    return value.to(out_dtype)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] rows -> int8 [M, K], fp32 [M, 1]."""
    x = x.float()
    bad = ~torch.isfinite(x).all(dim=-1, keepdim=True)
    x = torch.where(bad, torch.zeros_like(x), x)
    amax = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    factor = torch.full_like(amax, 127.0) / amax
    vanishing = ~torch.isfinite(factor)
    quantized = torch.round(x * torch.where(vanishing, torch.zeros_like(factor), factor)).clamp(-128, 127)
    scale = torch.where(vanishing, torch.zeros_like(amax), amax / torch.full_like(amax, 127.0))
    scale = torch.where(bad, torch.full_like(scale, float("nan")), scale)
    return quantized.to(torch.int8), scale


def random_problem(
    num_tokens: int, out_features: int, in_features: int, group_size: int, seed: int = 0, extreme: bool = False
) -> Problem:
    """Random tensors in the format's range. `extreme`: the largest magnitudes everywhere, the sum's worst case.

    Scales have both signs, and some are zero: what follows is a product with a sign, whose zeros have one too.
    """
    g = torch.Generator().manual_seed(seed)
    grouped = group_size == GROUP
    a = torch.randint(-128, 128, (num_tokens, in_features), generator=g, dtype=torch.int8)
    codes = torch.randint(-8, 8, (in_features, out_features), generator=g, dtype=torch.int8)
    group_scale = None
    if grouped:
        # |code * scale| reaches 127 for the largest code of every group, and no more.
        largest = codes.reshape(-1, GROUP, out_features).abs().amax(dim=1).clamp(min=1).float()
        group_scale = (torch.rand(largest.shape, generator=g) * 127 / largest).half()
        group_scale = torch.where(group_scale.float() * largest > 127, torch.zeros_like(group_scale), group_scale)
    if extreme:
        a = torch.where(a < 0, torch.full_like(a, -128), torch.full_like(a, 127))
        codes = torch.where(codes < 0, torch.full_like(codes, -8), torch.full_like(codes, 7))
        if grouped:
            group_scale = torch.full_like(group_scale, 15.875)
    channel_scale = torch.rand(out_features, generator=g) * 1e-3 + 1e-6
    s_tok = torch.rand(num_tokens, 1, generator=g) * 1e-2 + 1e-6
    channel_scale = channel_scale * _random_signs(out_features, g)
    s_tok = s_tok * _random_signs(num_tokens, g)[:, None]
    return Problem(
        a=a,
        s_tok=s_tok,
        codes=codes,
        channel_scale=channel_scale,
        group_scale=group_scale,
        b_q_weight=pack(codes, group_size),
        s_ch=store(channel_scale, stored_channel_column(out_features))[None, :],
        s_group=store(group_scale, stored_group_column(out_features)) if grouped else torch.empty(0, dtype=torch.half),
        workspace=torch.zeros(out_features // 64 * 16, dtype=torch.int32),
    )


def _random_signs(count: int, generator: torch.Generator) -> Tensor:
    """1, with -1 and both zeros here and there; the first is not zero, so that there is something to compare."""
    choices = torch.tensor([1.0] * 11 + [-1.0] * 3 + [0.0, -0.0])
    drawn = choices[torch.randint(len(choices), (count,), generator=generator)]
    drawn[:1] = torch.where(drawn[:1] == 0, 1.0, drawn[:1])
    return drawn
