"""Random inputs: activations as per-token quantisation leaves them, packed weights as any bits, enough copies of each.

Packed weights need no packing here: every 32-bit word is eight valid codes in both modes. Group scales are drawn so
that every product of code and scale stays inside the format's int8 range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch

# A layer's input was written by the kernel before it, so small activations may stay in L2: a few copies, not many.
ACTIVATION_COPIES = 4
# |code| <= 8 and |code * scale| <= 127: scales up to 15.87.
SMALLEST_GROUP_SCALE, LARGEST_GROUP_SCALE = 4.0, 15.8


@dataclass
class Activations:
    """Copies of one batch: the model's 16-bit values and what per-token quantisation makes of them."""

    x: list[torch.Tensor]  # [num_tokens, in_features], the model's dtype
    quantized: list[torch.Tensor]  # int8 [num_tokens, in_features]
    token_scale: list[torch.Tensor]  # fp32 [num_tokens, 1]

    @property
    def copies(self) -> int:
        return len(self.x)


@dataclass
class PackedWeights:
    """Copies of one layer's packed weights with their stored (permuted) scales."""

    packed: list[torch.Tensor]  # int32 [in_features / 16, 2 * out_features]
    channel_scale: list[torch.Tensor]  # fp32 [1, out_features]
    group_scale: list[torch.Tensor]  # fp16 [in_features / 128, out_features], or [0]

    @cached_property
    def first_on_cpu(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first copy for the reference: packed words, channel scales, group scales."""
        return self.packed[0].cpu(), self.channel_scale[0].cpu(), self.group_scale[0].cpu()

    @property
    def copies(self) -> int:
        return len(self.packed)


def make_generator(device: str, seed: int) -> torch.Generator:
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return generator


def make_activations(
    num_tokens: int,
    in_features: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    copies: int = ACTIVATION_COPIES,
) -> Activations:
    """Normal activations and their symmetric per-token int8 form (the rounding of docs/format.md, in torch)."""
    import torch

    activations = Activations([], [], [])
    for _ in range(copies):
        x = torch.randn(num_tokens, in_features, dtype=torch.float32, device=device, generator=generator).to(dtype)
        largest = x.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-20)
        activations.x.append(x)
        # A tensor over a tensor: 127.0 / tensor would be a reciprocal and a product, rounded twice.
        inverse = torch.full_like(largest, 127.0) / largest
        activations.quantized.append((x.float() * inverse).round_().clamp_(-127, 127).to(torch.int8))
        activations.token_scale.append(largest / 127.0)
    return activations


def make_packed_weights(problem: GemmProblem, copies: int, device: str, generator: torch.Generator) -> PackedWeights:
    """``copies`` different layers of the problem's shape and mode. num_tokens does not matter."""
    import torch

    n, k = problem.out_features, problem.in_features
    weights = PackedWeights([], [], [])
    # Outputs of about one: the sum of K products of codes (times 16 or a group scale) and activations near 40.
    typical = 40.0 * 74.0 * k**0.5 * 0.03
    for _ in range(copies):
        weights.packed.append(
            torch.randint(-(2**31), 2**31, (k // 16, 2 * n), dtype=torch.int32, device=device, generator=generator)
        )
        uniform = torch.rand(1, n, device=device, generator=generator)
        weights.channel_scale.append((0.5 + uniform) / typical)
        if problem.group_size > 0:
            span = LARGEST_GROUP_SCALE - SMALLEST_GROUP_SCALE
            uniform = torch.rand(k // problem.group_size, n, device=device, generator=generator)
            weights.group_scale.append((SMALLEST_GROUP_SCALE + span * uniform).half())
        else:
            weights.group_scale.append(torch.empty(0, dtype=torch.float16, device=device))
    return weights
