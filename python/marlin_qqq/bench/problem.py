"""One problem of a benchmark, what it costs at least, and the floor that follows from the device's ceilings."""

from __future__ import annotations

from dataclasses import dataclass

from marlin_qqq.limits import GROUP_SIZE as GROUP_128  # noqa: F401  importers take both from here
from marlin_qqq.limits import PER_CHANNEL


@dataclass(frozen=True)
class Ceilings:
    """What the device of this run can do at all, each with where the number comes from."""

    read_gbps: float | None = None
    read_source: str = "not measured"
    int8_tops: float | None = None
    int8_source: str = "not measured"

    def floor_us(self, bytes_moved: float, operations: float) -> float | None:
        """max(bytes / bandwidth, operations / int8 rate), in microseconds; None without both ceilings."""
        if not self.read_gbps or not self.int8_tops:
            return None
        return max(bytes_moved / (self.read_gbps * 1e3), operations / (self.int8_tops * 1e6))


@dataclass(frozen=True)
class GemmProblem:
    """out[num_tokens, out_features] = activations[num_tokens, in_features] x weights, 4-bit weights."""

    num_tokens: int
    out_features: int
    in_features: int
    group_size: int = PER_CHANNEL
    label: str = ""

    @property
    def packed_weight_bytes(self) -> int:
        """The 4-bit codes alone: what a plain read kernel of the same bytes has to read."""
        return self.out_features * self.in_features // 2

    @property
    def scale_bytes(self) -> int:
        group_scales = self.in_features // self.group_size if self.group_size > 0 else 0
        return 4 * self.out_features + 2 * group_scales * self.out_features + 4 * self.num_tokens

    @property
    def bytes_moved(self) -> int:
        """Every input read once, the 16-bit output written once."""
        activations = self.num_tokens * self.in_features
        output = 2 * self.num_tokens * self.out_features
        return self.packed_weight_bytes + self.scale_bytes + activations + output

    @property
    def operations(self) -> int:
        """A multiply and an add count as two."""
        return 2 * self.num_tokens * self.out_features * self.in_features


def quantize_bytes(num_tokens: int, in_features: int, input_bytes: int = 2) -> int:
    """Bytes that quantize_per_token moves at least: the input read, int8 and one fp32 scale a row written."""
    return num_tokens * in_features * (input_bytes + 1) + 4 * num_tokens
