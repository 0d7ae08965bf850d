"""Baselines that every torch has: 16-bit and 32-bit matmul, ``_int_mm``, fp8 ``_scaled_mm``, a plain read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from marlin_qqq.bench.check import close_check
from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem

if TYPE_CHECKING:
    import torch

MATMULS = ("fp16", "bf16", "fp32")  # torch.mm of unquantised weights, by their type
# cuBLAS wants more than 16 rows of an int8 product, and multiples of 8 elsewhere.
SMALLEST_INT_MM_TOKENS = 17
CHECKED_ROWS = 32
LARGEST_CHAINED_TOKENS = 64  # a block's part of more rows does not fit its registers


def make(name: str) -> Implementation:
    """The baseline called ``name`` on the command line. Raises ValueError for an unknown name."""
    if name in MATMULS:
        return Matmul(name)
    if name == "int_mm":
        return IntMm()
    if name == "fp8":
        return ScaledMmFp8()
    raise ValueError(f"unknown baseline {name!r}")


class Matmul(Implementation):
    """``torch.mm`` of unquantised weights: what the layer costs without this library."""

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
        self.weights: list[torch.Tensor] = []

    def load(self, problem: GemmProblem, context: Context) -> None:
        size = self.dtype.itemsize * problem.out_features * problem.in_features
        self.weights = [_random_weight(problem, context, self.dtype) for _ in range(context.copies(size))]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        x = [copy.to(self.dtype) for copy in activations.x]
        transposed = [weight.t() for weight in self.weights]

        def launch(index: int) -> torch.Tensor:
            return torch.mm(x[index % len(x)], transposed[index % len(transposed)])

        def expected() -> torch.Tensor:
            return x[0][:CHECKED_ROWS].float() @ self.weights[0].float().t()

        size = self.dtype.itemsize
        return Bound(
            launch=launch,
            check=lambda output: close_check(expected, output[:CHECKED_ROWS], 1e-2),
            bytes_moved=size * _elements(problem),
            operations=problem.operations,
            exact=False,
        )

    def unload(self) -> None:
        self.weights = []


class IntMm(Implementation):
    """``torch._int_mm``: int8 weights, int32 out, no scales at all; less work than our op does."""

    name = "int_mm"

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def load(self, problem: GemmProblem, context: Context) -> None:
        copies = context.copies(problem.out_features * problem.in_features)
        self.weights = [_random_int8(problem, context) for _ in range(copies)]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        if context.device.startswith("cuda") and problem.num_tokens < SMALLEST_INT_MM_TOKENS:
            raise Unavailable("torch._int_mm needs more than 16 tokens")
        a = activations.quantized
        transposed = [weight.t() for weight in self.weights]
        a_rows, rows_weight = a[0][:CHECKED_ROWS].cpu(), self.weights[0][:256].cpu()

        def launch(index: int) -> torch.Tensor:
            return torch._int_mm(a[index % len(a)], transposed[index % len(transposed)])

        try:
            launch(0)
        except RuntimeError as error:
            raise Unavailable(str(error).splitlines()[0]) from None

        def check(output: torch.Tensor) -> str:
            expected = (a_rows.double() @ rows_weight.double().t()).to(torch.int32)
            if torch.equal(output[:CHECKED_ROWS, : rows_weight.shape[0]].cpu(), expected):
                return f"exact (float64 sums, first {a_rows.shape[0]} rows, first {rows_weight.shape[0]} columns)"
            return "WRONG: differs from the integer sums"

        elements = problem.num_tokens * problem.in_features + problem.out_features * problem.in_features
        return Bound(
            launch=launch,
            check=check,
            bytes_moved=elements + 4 * problem.num_tokens * problem.out_features,
            operations=problem.operations,
        )

    def unload(self) -> None:
        self.weights = []


class ScaledMmFp8(Implementation):
    """``torch._scaled_mm`` with e4m3 weights and activations and one scale a row of each."""

    name = "fp8"

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def available(self, context: Context) -> None:
        import torch

        if context.device.startswith("cuda") and torch.cuda.get_device_capability(context.device) < (8, 9):
            raise Unavailable("fp8 needs compute capability 8.9")

    def load(self, problem: GemmProblem, context: Context) -> None:
        import torch

        copies = context.copies(problem.out_features * problem.in_features)
        self.weights = [_random_weight(problem, context, torch.float16).to(torch.float8_e4m3fn) for _ in range(copies)]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        x = [(copy.float() / 8).to(torch.float8_e4m3fn) for copy in activations.x]
        transposed = [weight.t() for weight in self.weights]
        row_scale = torch.full((problem.num_tokens, 1), 8.0, device=context.device)
        column_scale = torch.ones((1, problem.out_features), device=context.device)
        # Row-wise scaling has bf16 outputs only in some versions of torch.
        out_dtype = context.dtype

        def launch(index: int) -> torch.Tensor:
            return torch._scaled_mm(
                x[index % len(x)],
                transposed[index % len(transposed)],
                scale_a=row_scale,
                scale_b=column_scale,
                out_dtype=out_dtype,
                use_fast_accum=True,
            )

        try:
            launch(0)
        except (RuntimeError, ValueError):
            out_dtype = torch.bfloat16
            try:
                launch(0)
            except (RuntimeError, ValueError) as error:
                raise Unavailable(str(error).splitlines()[0]) from None

        def expected() -> torch.Tensor:
            return (8 * x[0][:CHECKED_ROWS].float()) @ self.weights[0].float().t()

        elements = problem.num_tokens * problem.in_features + problem.out_features * problem.in_features
        return Bound(
            launch=launch,
            check=lambda output: close_check(expected, output[:CHECKED_ROWS], 3e-2),
            bytes_moved=elements + 2 * problem.num_tokens * problem.out_features,
            operations=problem.operations,
            exact=False,
            extra={"out_dtype": str(out_dtype)},
        )

    def unload(self) -> None:
        self.weights = []


class PlainRead(Implementation):
    """A kernel that reads as many bytes as our packed weights and group scales hold and does nothing else.

    It needs Triton, which comes with torch's CUDA wheels. Of several variants the fastest for this size is timed.
    """

    name = "read"

    def __init__(self, group_size: int) -> None:
        self.group_size: int = group_size
        self.sources: list[torch.Tensor] = []
        self.variant: tuple[int, int, int] = (0, 0, 0)
        self.read: Callable[[torch.Tensor], torch.Tensor] | None = None

    def available(self, context: Context) -> None:
        if not context.device.startswith("cuda"):
            raise Unavailable("a read kernel needs a CUDA device")
        try:
            import triton  # noqa: F401
        except ImportError:
            raise Unavailable("triton is not installed") from None

    def load(self, problem: GemmProblem, context: Context) -> None:
        from marlin_qqq.bench.ceilings import fastest_read_kernel

        self.load_sources(problem, context)
        self.variant, self.read = fastest_read_kernel(self.sources, context.device)

    def load_sources(self, problem: GemmProblem, context: Context) -> None:
        import torch

        weights = context.packed_weights(self.with_group(problem))
        self.sources = [packed.view(-1) for packed in weights.packed]
        if self.group_size > 0:
            scales = (scale.view(-1).view(torch.int32) for scale in weights.group_scale)
            self.sources = [torch.cat(both) for both in zip(self.sources, scales, strict=True)]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        read = self.read
        assert read is not None, "load() comes before bind()"

        def launch(index: int) -> torch.Tensor:
            return read(self.sources[index % len(self.sources)])

        return Bound(
            launch=launch,
            check=lambda output: "not checked",
            bytes_moved=4 * self.sources[0].numel(),
            operations=0,
            exact=False,
            extra={"read_variant": str(self.variant)},
        )

    def unload(self) -> None:
        self.sources, self.read = [], None


class ChainedRead(PlainRead):
    """All of a product but its arithmetic, a launch of which waits for the one before it as ours do.

    Under programmatic dependent launch: the weights are read before the wait, as with ``constant_weights``, then the
    activations, then as many bytes are written as the output has. Of several variants the fastest for this problem is
    timed. What a product takes beyond that is its arithmetic and where its sums meet; from some 32 tokens on the
    activations are read slower here than in our kernels.
    """

    name = "chain"

    def available(self, context: Context) -> None:
        import torch

        super().available(context)
        if torch.cuda.get_device_capability(context.device) < (9, 0):
            raise Unavailable("programmatic dependent launch needs compute capability 9.0")

    def load(self, problem: GemmProblem, context: Context) -> None:
        self.load_sources(problem, context)

    def rows(self, activations: Activations) -> Callable[[int], torch.Tensor]:
        """The int8 activations of a launch, as int32, after all that is enqueued for them."""
        import torch

        copies = [copy.view(torch.int32) for copy in activations.quantized]
        return lambda index: copies[index % len(copies)]

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        from marlin_qqq.bench.ceilings import fastest_launch
        from marlin_qqq.bench.triton_kernels import CHAINED_READ_VARIANTS, launch_chained_read

        if problem.num_tokens > LARGEST_CHAINED_TOKENS:
            raise Unavailable(f"for up to {LARGEST_CHAINED_TOKENS} tokens")
        rows = self.rows(activations)
        output_words = problem.num_tokens * problem.out_features // 2  # two 16-bit values a word

        def launch(variant: tuple[int, int], index: int) -> torch.Tensor:
            output = torch.empty(output_words, dtype=torch.int32, device=context.device)
            source = self.sources[index % len(self.sources)]
            return launch_chained_read(source, rows(index), output, variant)

        variants = {variant: partial(launch, variant) for variant in CHAINED_READ_VARIANTS}
        best = fastest_launch(variants, len(self.sources), 4 * self.sources[0].numel())
        return Bound(
            launch=variants[best],
            check=lambda output: "not checked",
            bytes_moved=self.with_group(problem).bytes_moved,
            operations=0,
            exact=False,
            extra={"chain_variant": str(best)},
        )


def _elements(problem: GemmProblem) -> int:
    m, n, k = problem.num_tokens, problem.out_features, problem.in_features
    return m * k + n * k + m * n


def _random_weight(problem: GemmProblem, context: Context, dtype: torch.dtype) -> torch.Tensor:
    """Uniform weights [out_features, in_features], made in slices so that fp32 of the whole is never held."""
    import torch

    weight = torch.empty(problem.out_features, problem.in_features, dtype=dtype, device=context.device)
    weight.uniform_(-0.05, 0.05, generator=context.generator)
    return weight


def _random_int8(problem: GemmProblem, context: Context) -> torch.Tensor:
    import torch

    return torch.randint(
        -128,
        128,
        (problem.out_features, problem.in_features),
        dtype=torch.int8,
        device=context.device,
        generator=context.generator,
    )
