"""Kernels of an installed vLLM: its built-in QQQ op (versions 0.5.4 to 0.10.1) and CUTLASS W8A8 int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin_qqq.bench.check import close_check
from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch

CHECKED_ROWS = 32


def _import_custom_ops(context: Context) -> None:
    if not context.device.startswith("cuda"):
        raise Unavailable("vLLM's kernels need a CUDA device")
    try:
        import vllm._custom_ops  # noqa: F401
    except Exception as error:  # not installed, or built for another torch
        raise Unavailable(f"vllm cannot be imported: {type(error).__name__}: {error}"[:200]) from error


class VllmQQQ(Implementation):
    """The QQQ op that vLLM had built in: same bytes, same arguments, so it is checked to the bit."""

    name = "vllm_qqq"

    def __init__(self, group_size: int) -> None:
        self.group_size: int = group_size

    def available(self, context: Context) -> None:
        import torch

        _import_custom_ops(context)
        if not hasattr(torch.ops._C, "marlin_qqq_gemm"):
            raise Unavailable("this vLLM has no built-in QQQ op (0.5.4 to 0.10.1 had)")

    def load(self, problem: GemmProblem, context: Context) -> None:
        context.packed_weights(self.with_group(problem))

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        problem = self.with_group(problem)
        if context.dtype != torch.float16 or context.with_bias:
            raise Unavailable("vLLM's QQQ op has fp16 outputs and no bias")
        weights = context.packed_weights(problem)
        workspace = torch.zeros(problem.out_features // 64 * 16, dtype=torch.int32, device=context.device)

        def launch(index: int) -> torch.Tensor:
            return torch.ops._C.marlin_qqq_gemm(
                activations.quantized[index % activations.copies],
                weights.packed[index % weights.copies],
                activations.token_scale[index % activations.copies],
                weights.channel_scale[index % weights.copies],
                weights.group_scale[index % weights.copies],
                workspace,
                problem.num_tokens,
                problem.out_features,
                problem.in_features,
            )

        return Bound(
            launch=launch,
            check=context.reference(problem, activations).compare,
            bytes_moved=problem.bytes_moved,
            operations=problem.operations,
        )


class VllmScaledMm(Implementation):
    """``cutlass_scaled_mm`` with int8 weights: W8A8, twice our weight bytes."""

    name = "vllm_w8a8"

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def available(self, context: Context) -> None:
        _import_custom_ops(context)

    def load(self, problem: GemmProblem, context: Context) -> None:
        import torch

        shape = (problem.out_features, problem.in_features)
        self.weights = [
            torch.randint(-128, 128, shape, dtype=torch.int8, device=context.device, generator=context.generator)
            for _ in range(context.copies(problem.out_features * problem.in_features))
        ]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch
        from vllm._custom_ops import cutlass_scaled_mm

        column_scale = torch.full((1, problem.out_features), 1e-3, device=context.device)
        transposed = [weight.t() for weight in self.weights]

        def launch(index: int) -> torch.Tensor:
            return cutlass_scaled_mm(
                activations.quantized[index % activations.copies],
                transposed[index % len(transposed)],
                activations.token_scale[index % activations.copies],
                column_scale,
                context.dtype,
            )

        try:
            launch(0)
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]) from error

        def expected() -> torch.Tensor:
            a = activations.quantized[0][:CHECKED_ROWS].float() * activations.token_scale[0][:CHECKED_ROWS]
            return (a @ self.weights[0].float().t()) * 1e-3

        elements = problem.num_tokens * problem.in_features + problem.out_features * problem.in_features
        return Bound(
            launch=launch,
            check=lambda output: close_check(expected, output[:CHECKED_ROWS], 2e-2),
            bytes_moved=elements + 2 * problem.num_tokens * problem.out_features,
            operations=problem.operations,
            exact=False,
        )

    def unload(self) -> None:
        self.weights = []
