"""Humming (the package ``humming-kernels``): int4 weights x int8 activations, the peer that vLLM uses today.

Its kernels are compiled when a shape is first used, seconds a shape; :func:`compile_ahead` does that for many shapes at
once. Everything here goes through its Python functions, and whatever fails there becomes the reason in the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.check import close_check
from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch

CHECKED_ROWS = 32


class HummingGemm(Implementation):
    """``humming_forward`` on activations that are int8 already (as our op's are)."""

    name = "humming"

    def __init__(self, group_size: int) -> None:
        self.group_size: int = group_size
        self.config: Any = None
        self.copies: list[dict[str, torch.Tensor]] = []
        self.dequantized: torch.Tensor | None = None

    def available(self, context: Context) -> None:
        check_installed(context.device)

    def load(self, problem: GemmProblem, context: Context) -> None:
        import torch

        try:
            from humming.transform import prepare_and_transform_humming_tensors

            weight_schema, input_schema = _schemas(self.group_size)
            shape = (problem.out_features, problem.in_features)
            weight = torch.empty(shape, dtype=context.dtype, device=context.device)
            weight.uniform_(-0.05, 0.05, generator=context.generator)
            tensors = type(weight_schema).quant_tensor(weight, weight_schema, context.dtype)
            self.dequantized = weight_schema.dequant_tensors(tensors).to(torch.float16)
            self.config, transformed = prepare_and_transform_humming_tensors(
                tensors,
                shape_n=problem.out_features,
                shape_k=problem.in_features,
                weight_schema=weight_schema,
                input_schema=input_schema,
                torch_dtype=context.dtype,
                device=torch.device(context.device),
            )
            self.copies = [
                {name: tensor.clone() for name, tensor in transformed.items()}
                for _ in range(context.copies(problem.packed_weight_bytes))
            ]
        except Exception as error:  # an optional peer must not end the run, whatever it raises
            raise Unavailable(reason_of(error)) from error

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        # Split reductions synchronise through these; launches of one stream may share them.
        locks = torch.zeros(2048, dtype=torch.int32, device=context.device)

        def launch(index: int) -> torch.Tensor:
            from humming.forward import humming_forward

            copy = self.copies[index % len(self.copies)]
            return humming_forward(
                self.config,
                inputs=activations.quantized[index % activations.copies],
                input_scale=activations.token_scale[index % activations.copies],
                locks=locks,
                **copy,
            )

        try:
            launch(0)
            torch.cuda.synchronize()
        except Exception as error:
            raise Unavailable(reason_of(error)) from error

        def expected() -> torch.Tensor:
            assert self.dequantized is not None
            a = activations.quantized[0][:CHECKED_ROWS].float() * activations.token_scale[0][:CHECKED_ROWS]
            return a @ self.dequantized.float().t()

        grouped = self.with_group(problem)
        return Bound(
            launch=launch,
            check=lambda output: close_check(expected, output[:CHECKED_ROWS], 2e-2),
            bytes_moved=grouped.bytes_moved,
            operations=grouped.operations,
            exact=False,
        )

    def unload(self) -> None:
        self.copies, self.dequantized, self.config = [], None, None


def check_installed(device: str) -> None:
    """Raises Unavailable unless humming-kernels can be imported for a CUDA device."""
    if not device.startswith("cuda"):
        raise Unavailable("Humming needs a CUDA device")
    try:
        import humming.forward
        import humming.schema
        import humming.transform  # noqa: F401
    except Exception as error:
        raise Unavailable(f"humming-kernels cannot be imported: {reason_of(error)}") from error


def compile_ahead(shapes: Iterable[tuple[int, int]], group_sizes: Iterable[int], context: Context) -> str:
    """Compiles Humming's kernels of all (out_features, in_features) at once; returns "" or why it did not."""
    try:
        check_installed(context.device)
        import torch
        from humming.kernel.humming import HummingKernel
        from humming.transform import prepare_layer_config

        configs = []
        for group_size in group_sizes:
            weight_schema, input_schema = _schemas(group_size)
            for out_features, in_features in shapes:
                config = prepare_layer_config(
                    shape_n=out_features,
                    shape_k=in_features,
                    weight_schema=weight_schema,
                    input_schema=input_schema,
                    torch_dtype=context.dtype,
                    device=torch.device(context.device),
                )
                configs.append(config.to_str())
        index = torch.device(context.device).index or 0
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda config: HummingKernel.prepare_kernels(config, None, None, index), configs))
        return ""
    except Exception as error:
        return reason_of(error)


def _schemas(group_size: int) -> tuple[Any, Any]:
    from humming.schema import HummingInputSchema, HummingWeightSchema

    weight_schema = HummingWeightSchema(b_dtype="int4", weight_scale_group_size=max(group_size, 0))
    return weight_schema, HummingInputSchema(a_dtype="int8")


def reason_of(error: BaseException) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:200]
