"""The reference that a result must equal before its speed is shown.

On a GPU the reference of our op is the CPU op, bit for bit. On a CPU it is the format's formula, evaluated in float64,
which holds every integer sum of the format exactly. Where the whole product would take too long, two bands of it are
computed: some rows with all columns, and all rows with some columns. Rows and columns are drawn one from each of
equal strips, so that every tile of a kernel is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch

    from marlin_qqq.bench.inputs import Activations, PackedWeights

# Multiply-adds of a reference that is computed whole.
WHOLE_REFERENCE_OPERATIONS = {"cpu op": 4 << 30, "float64 formula": 1 << 28}
SAMPLED_ROWS = 32
SAMPLED_TILES = 2
TILE = 64  # packed weights can be cut along their columns at multiples of 64


@dataclass
class Band:
    """A part of the expected output: these rows and columns (None: all)."""

    rows: torch.Tensor | None
    columns: slice | None
    expected: torch.Tensor


@dataclass
class Reference:
    """The expected output of one problem, whole or in bands, and how to say so."""

    bands: list[Band]
    description: str

    def compare(self, output: torch.Tensor) -> str:
        """ "exact (...)", or "WRONG: ..." with where and by how much."""
        import torch

        for band in self.bands:
            actual = output if band.columns is None else output[:, band.columns]
            actual = (actual if band.rows is None else actual[band.rows.to(actual.device)]).cpu()
            if actual.shape != band.expected.shape or actual.dtype != band.expected.dtype:
                return (
                    f"WRONG: {tuple(actual.shape)} {actual.dtype}, "
                    f"expected {tuple(band.expected.shape)} {band.expected.dtype}"
                )
            if not torch.equal(actual, band.expected):
                different = (actual != band.expected) | actual.isnan()
                largest = (actual.float() - band.expected.float()).abs().nan_to_num(nan=float("inf")).max().item()
                return (
                    f"WRONG: {int(different.sum())} of {actual.numel()} values differ from the {self.description}, "
                    f"largest difference {largest:.3g}"
                )
        return f"exact ({self.description})"


def gemm_reference(
    problem: GemmProblem,
    activations: Activations,
    weights: PackedWeights,
    output_dtype: torch.dtype,
    bias: torch.Tensor | None,
    device: str,
) -> Reference:
    """The exact output of the first copies of ``activations`` and ``weights``."""
    method = "cpu op" if device.startswith("cuda") else "float64 formula"
    compute = _cpu_op if method == "cpu op" else _formula
    m, n, k = problem.num_tokens, problem.out_features, problem.in_features
    a, token_scale = activations.quantized[0].cpu(), activations.token_scale[0].cpu()
    packed, channel, group = weights.first_on_cpu
    bias = None if bias is None else bias.cpu()

    if m * n * k <= WHOLE_REFERENCE_OPERATIONS[method]:
        expected = compute(a, token_scale, packed, channel, group, bias, output_dtype, problem.group_size)
        return Reference([Band(None, None, expected)], f"{method}, every value")

    budget_rows = max(1, WHOLE_REFERENCE_OPERATIONS[method] // (n * k))
    rows = _spread(m, min(SAMPLED_ROWS, budget_rows if method != "cpu op" else SAMPLED_ROWS))
    bands = []
    if method == "cpu op" or n * k <= WHOLE_REFERENCE_OPERATIONS[method]:
        expected = compute(a[rows], token_scale[rows], packed, channel, group, bias, output_dtype, problem.group_size)
        bands.append(Band(rows, None, expected))
    tiles = _spread(n // TILE, SAMPLED_TILES).tolist()
    for tile in tiles:
        columns = slice(tile * TILE, (tile + 1) * TILE)
        words = packed[:, 2 * columns.start : 2 * columns.stop].contiguous()
        expected = compute(
            a,
            token_scale,
            words,
            channel[:, columns].contiguous(),
            group[:, columns].contiguous() if problem.group_size > 0 else group,
            None if bias is None else bias[columns].contiguous(),
            output_dtype,
            problem.group_size,
        )
        bands.append(Band(None, columns, expected))
    sampled = f"{len(rows)} of {m} rows with all columns, " if len(bands) > len(tiles) else ""
    return Reference(bands, f"{method}, {sampled}{len(tiles) * TILE} of {n} columns with all rows")


def close_check(expected: Callable[[], torch.Tensor], actual: torch.Tensor, tolerance: float) -> str:
    """A floating-point baseline against fp32 arithmetic: ||actual - expected|| / ||expected||."""
    reference = expected().float()
    error = ((actual.float() - reference).norm() / reference.norm()).item()
    verdict = f"relative error {error:.2g}"
    return f"close ({verdict})" if error <= tolerance else f"WRONG: {verdict}, allowed {tolerance:.2g}"


def _cpu_op(
    a: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    channel: torch.Tensor,
    group: torch.Tensor,
    bias: torch.Tensor | None,
    output_dtype: torch.dtype,
    group_size: int,
) -> torch.Tensor:
    import torch

    import marlin_qqq

    n = packed.shape[1] // 2
    return torch.ops.marlin_qqq.marlin_qqq_gemm(
        a.contiguous(), packed, token_scale.contiguous(), channel, group, marlin_qqq.make_workspace(n, "cpu"),
        a.shape[0], n, a.shape[1], bias=bias, out_dtype=output_dtype,
    )  # fmt: skip


def _formula(
    a: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    channel: torch.Tensor,
    group: torch.Tensor,
    bias: torch.Tensor | None,
    output_dtype: torch.dtype,
    group_size: int,
) -> torch.Tensor:
    """Section "The op in four lines" of docs/format.md, from unpacked codes."""
    import torch

    import marlin_qqq

    codes = marlin_qqq.unpack_weight(packed, group_size)
    if group_size > 0:
        scales = marlin_qqq.unpermute_group_scale(group).float().repeat_interleave(group_size, dim=0)
        weight = torch.round(codes.float() * scales)
    else:
        weight = 16.0 * codes.float()
    total = (a.double() @ weight.double()).to(torch.int32)
    output = total.float() * marlin_qqq.unpermute_channel_scale(channel).reshape(1, -1) * token_scale
    if bias is not None:
        output = output + bias.float()
    return output.to(output_dtype)


def _spread(count: int, samples: int) -> torch.Tensor:
    """Sorted indices, one at random from each of ``samples`` equal strips of range(count), first and last included."""
    import torch

    if count <= samples:
        return torch.arange(count)
    if samples == 1:
        return torch.tensor([count - 1])
    edges = torch.linspace(0, count, samples + 1).long()
    generator = torch.Generator().manual_seed(count)
    drawn = edges[:-1] + (torch.rand(samples, generator=generator) * (edges[1:] - edges[:-1])).long()
    drawn[0], drawn[-1] = 0, count - 1
    return drawn
