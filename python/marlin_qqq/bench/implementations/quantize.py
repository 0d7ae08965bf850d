"""Per-token activation quantisation: our op, and what does the same elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlin_qqq.bench.implementations.base import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.implementations.humming import check_installed
from marlin_qqq.bench.inputs import Activations
from marlin_qqq.bench.problem import GemmProblem, quantize_bytes
from marlin_qqq.bench.results import OURS

if TYPE_CHECKING:
    import torch

NAMES = {"cuda": ("torch", "torch_compile", "humming", "copy"), "cpu": ("torch",)}


def quantize_implementations(device: str, baselines: str = "auto") -> list[Implementation]:
    """Our op and the baselines named. Raises ValueError for a name the device does not have."""
    known = NAMES["cuda" if device.startswith("cuda") else "cpu"]
    names = known if baselines == "auto" else tuple(n for n in baselines.split(",") if n not in ("", "none"))
    for name in names:
        if name not in known:
            raise ValueError(f"unknown baseline {name!r} for bench quantize; known: auto, none, {', '.join(known)}")
    return [MarlinQuantize(), *(_Baseline(name) for name in names)]


class MarlinQuantize(Implementation):
    """``torch.ops.marlin_qqq.quantize_per_token``."""

    name = OURS

    def load(self, problem: GemmProblem, context: Context) -> None:
        import marlin_qqq.ops  # noqa: F401  registers the op

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        op = torch.ops.marlin_qqq.quantize_per_token.default
        return _bind(lambda index: op(activations.x[index % activations.copies]), problem, activations, context)


class _Baseline(Implementation):
    def __init__(self, name: str) -> None:
        self.name = name

    def available(self, context: Context) -> None:
        if self.name == "humming":
            check_installed(context.device)

    def load(self, problem: GemmProblem, context: Context) -> None:
        pass

    def bind(self, problem: GemmProblem, activations: Activations, context: Context) -> Bound:
        import torch

        x = activations.x
        if self.name == "copy":
            bytes_moved = 2 * x[0].numel() * x[0].element_size()
            return Bound(
                lambda index: x[index % len(x)].clone(), lambda output: "not checked", bytes_moved, 0, exact=False
            )
        if self.name == "humming":
            return _bind(_humming(x), problem, activations, context, tolerance=1)
        function = quantize_in_torch
        if self.name == "torch_compile":
            torch._dynamo.reset()  # one specialised kernel a size, as a fixed model would have
            function = torch.compile(quantize_in_torch, dynamic=False)
        try:
            return _bind(lambda index: function(x[index % len(x)]), problem, activations, context, tolerance=1)
        except Exception as error:  # the compiler is optional: no host compiler, an unsupported Python
            raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]) from error


def quantize_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch, as a model without our op would write it."""
    import torch

    largest = x.float().abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # 127.0 / largest would round twice
    return (x.float() * inverse).round().clamp(-127, 127).to(torch.int8), largest / 127.0


def _humming(x: list[torch.Tensor]) -> Any:
    try:
        from humming.ops import process_input
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {error}"[:200]) from error

    def launch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, _, scale = process_input(
            x[index % len(x)], quant_mode="dynamic_token", quant_dtype="int8", group_scale_dtype="float32"
        )
        return quantized, scale

    return launch


def _bind(launch: Any, problem: GemmProblem, activations: Activations, context: Context, tolerance: int = 0) -> Bound:
    import torch

    import marlin_qqq.ops  # noqa: F401  registers the op

    first = activations.x[0]
    if context.device.startswith("cuda") or tolerance:
        source = "cpu op"
        quantized, scale = torch.ops.marlin_qqq.quantize_per_token(first.cpu())
    else:
        source = "formula in torch"
        quantized, scale = quantize_in_torch(first)

    def check(output: tuple[torch.Tensor, torch.Tensor]) -> str:
        actual, actual_scale = output[0].cpu(), output[1].cpu().reshape(scale.shape)
        if torch.equal(actual, quantized) and torch.equal(actual_scale, scale):
            return f"exact ({source}, every value)"
        # Another library may round its scale elsewhere: off by one step at most, or it is wrong.
        steps = int((actual.int() - quantized.int()).abs().max())
        if steps <= tolerance and torch.allclose(actual_scale, scale, rtol=1e-3):
            return f"close (at most {steps} step off)"
        return f"WRONG: up to {steps} steps from the {source}, scales equal: {torch.equal(actual_scale, scale)}"

    try:
        launch(0)
    except Exception as error:
        if tolerance == 0:
            raise
        raise Unavailable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]) from error
    return Bound(
        launch=launch,
        check=check,
        bytes_moved=quantize_bytes(problem.num_tokens, problem.in_features, first.element_size()),
        operations=0,
        exact=False,  # outputs are pairs; the first launch of the graph is checked like any other
    )
