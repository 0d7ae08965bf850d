"""Whole layers: quantisation and product as a linear layer runs them, and the four linears of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.implementations.humming import HummingGemm
from marlin_qqq.bench.implementations.marlin import MarlinGemm
from marlin_qqq.bench.implementations.served import KernelBetween, Served
from marlin_qqq.bench.implementations.torch_baselines import MATMULS, ChainedRead, Matmul
from marlin_qqq.bench.inputs import Activations, make_activations
from marlin_qqq.bench.presets import Layer
from marlin_qqq.bench.problem import GemmProblem
from marlin_qqq.bench.results import OURS

if TYPE_CHECKING:
    import torch

LINEAR_VARIANT = "constant"

Maker = Callable[[], Implementation]


class MarlinLinear(MarlinGemm):
    """``marlin_qqq_linear`` with constant weights, bias included: what QQQLinear enqueues."""

    def __init__(self, group_size: int, variant: str = LINEAR_VARIANT) -> None:
        super().__init__(variant, group_size)
        self.name = f"{OURS}:linear"

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        problem = self.with_group(problem)
        weights, bias = context.packed_weights(problem), context.bias(problem.out_features)
        linear = torch.ops.marlin_qqq.marlin_qqq_linear.default

        def launch(index: int) -> torch.Tensor:
            copy = index % weights.copies
            return linear(
                activations.x[index % activations.copies], weights.packed[copy], weights.channel_scale[copy],
                weights.group_scale[copy], bias=bias, out_dtype=context.dtype, constant_weights=True,
            )  # fmt: skip

        # The reference quantises on the CPU: the layer is right only if its quantisation is.
        quantized, token_scale = torch.ops.marlin_qqq.quantize_per_token.default(activations.x[0].cpu())
        first = Activations([activations.x[0]], [quantized], [token_scale])
        reference = context.reference(problem, first, bias=bias)
        extra_bytes = problem.num_tokens * problem.in_features
        return Bound(self.overridden(launch), reference.compare, problem.bytes_moved + extra_bytes, problem.operations)


class ChainedLinear(ChainedRead):
    """``quantize_per_token`` and the chained read: what a layer of two kernels takes at least.

    Less the chained read alone it is what the quantisation adds: its own work, and one more launch's start and end.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__(group_size)
        self.name = "chain:linear"

    def rows(self, activations: Activations) -> Callable[[int], torch.Tensor]:
        import torch

        quantize = torch.ops.marlin_qqq.quantize_per_token.default
        return lambda index: quantize(activations.x[index % activations.copies])[0].view(torch.int32)


class HummingLinear(HummingGemm):
    """Humming quantising its own activations."""

    def __init__(self, group_size: int) -> None:
        super().__init__(group_size)
        self.name = "humming:linear"

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        from marlin_qqq.bench.implementations.humming import CHECKED_ROWS, reason_of

        bound = super().bind(problem, activations, context)
        config, copies = self.config, self.copies
        locks = torch.zeros(2048, dtype=torch.int32, device=context.device)

        def launch(index: int) -> torch.Tensor:
            from humming.forward import humming_forward

            x = activations.x[index % activations.copies]
            return humming_forward(config, inputs=x, locks=locks, **copies[index % len(copies)])

        try:
            launch(0)
            torch.cuda.synchronize()
        except Exception as error:
            raise Unavailable(reason_of(error)) from error

        def check(output: torch.Tensor) -> str:
            assert self.dequantized is not None
            expected = activations.x[0][:CHECKED_ROWS].float() @ self.dequantized.float().t()
            error = ((output[:CHECKED_ROWS].float() - expected).norm() / expected.norm()).item()
            # int8 activations cost about one percent.
            return f"close (relative error {error:.2g})" if error < 0.05 else f"WRONG: relative error {error:.2g}"

        extra_bytes = problem.num_tokens * problem.in_features
        return replace(bound, launch=launch, check=check, bytes_moved=bound.bytes_moved + extra_bytes)


def linear_implementations(
    baselines: Sequence[str], group_sizes: Sequence[int], served: bool = False
) -> list[Implementation]:
    """Per group size: the layer and its product alone; then the baselines that have a layer of their own.

    ``served``: the layers behind a kernel of torch's each, which is then timed alone, too.
    """
    if served:
        return [make() for make in _served(_layer_makers(baselines, group_sizes))]
    chosen: list[Implementation] = []
    for group_size in group_sizes:
        chosen += [MarlinLinear(group_size), MarlinGemm(LINEAR_VARIANT, group_size)]
        if "humming" in baselines:
            chosen.append(HummingLinear(group_size))
        if "chain" in baselines:
            chosen += [ChainedLinear(group_size), ChainedRead(group_size)]
    return chosen + [Matmul(name) for name in baselines if name in MATMULS]


class DecoderLayer(Implementation):
    """The linears of one decoder layer one after the other, each on its own activations; one launch is all of them."""

    def __init__(self, layers: Sequence[Layer], make: Maker) -> None:
        self.layers = tuple(layers)
        self.parts = [make() for _ in layers]
        self.name = self.parts[0].name
        self.group_size = self.parts[0].group_size

    def available(self, context: Context) -> None:
        self.parts[0].available(context)

    def load(self, problem: GemmProblem, context: Context) -> None:
        for part, layer_problem in zip(self.parts, self._problems(problem), strict=True):
            part.load(layer_problem, context)

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        bounds = []
        for part, layer_problem in zip(self.parts, self._problems(problem), strict=True):
            inputs = self._activations(layer_problem, activations, context)
            bounds.append(part.bind(layer_problem, inputs, context))

        def launch(index: int) -> Any:
            return [bound.launch(index) for bound in bounds]

        def check(outputs: list[Any]) -> str:
            verdicts = [bound.check(output) for bound, output in zip(bounds, outputs, strict=True)]
            wrong = [verdict for verdict in verdicts if verdict.startswith("WRONG")]
            return wrong[0] if wrong else verdicts[0]

        return Bound(
            launch=launch,
            check=check,
            bytes_moved=sum(bound.bytes_moved for bound in bounds),
            operations=sum(bound.operations for bound in bounds),
            exact=False,  # the outputs are a list; the first launch of the graph is checked like any other
        )

    def unload(self) -> None:
        for part in self.parts:
            part.unload()

    def _problems(self, problem: GemmProblem) -> list[GemmProblem]:
        return [
            replace(problem, out_features=layer.out_features, in_features=layer.in_features, label=layer.name)
            for layer in self.layers
        ]

    def _activations(self, problem: GemmProblem, given: Activations, context: Context) -> Activations:
        """The runner's activations where they fit, else ones of the layer's own width that all share."""
        if given.x[0].shape[1] == problem.in_features:
            return given
        key = (problem.num_tokens, problem.in_features)
        if key not in context.extra_activations:
            context.extra_activations[key] = make_activations(
                problem.num_tokens, problem.in_features, context.dtype, context.device, context.generator
            )
        return context.extra_activations[key]


def decoder_layer_implementations(
    layers: Sequence[Layer], baselines: Sequence[str], group_sizes: Sequence[int], served: bool = False
) -> list[Implementation]:
    """Our linear layer, Humming's and unquantised matmul, each for the whole decoder layer.

    ``served``: every linear behind a kernel of torch's; those kernels are then timed alone, too.
    """
    makers = _layer_makers(baselines, group_sizes)
    return [DecoderLayer(layers, make) for make in (_served(makers) if served else makers)]


def decoder_layer(name: str, layers: Sequence[Layer]) -> Layer:
    """The shape under which a decoder layer is measured: all outputs of its linears, and the first one's inputs."""
    return Layer(name, sum(layer.out_features for layer in layers), layers[0].in_features)


def _layer_makers(baselines: Sequence[str], group_sizes: Sequence[int]) -> list[Maker]:
    """Our layer and Humming's per group size, and unquantised matmul."""
    makers: list[Maker] = [partial(MarlinLinear, group) for group in group_sizes]
    if "humming" in baselines:
        makers += [partial(HummingLinear, group) for group in group_sizes]
    return makers + [partial(Matmul, name) for name in baselines if name in MATMULS]


def _served(makers: Sequence[Maker]) -> list[Maker]:
    """The kernel between alone, then every layer behind it."""
    return [KernelBetween, *(partial(_behind_a_kernel, make) for make in makers)]


def _behind_a_kernel(make: Maker) -> Implementation:
    return Served(make())
