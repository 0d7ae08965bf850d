"""Runs calibration data through a model and collects the Hessians of some of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from marlin_qqq.quantization.gptq import HessianAccumulator


class _StopForward(Exception):
    """Leaves a forward pass whose rest is of no interest."""


def call_model(model: nn.Module, batch: Any) -> None:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def stages(model: nn.Module, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Groups modules that are calibrated together, in the model's order.

    Args:
        model: the model.
        names: of modules in it, in the order of ``named_modules``.

    Returns:
        Pairs of a stage's module and the names in it. A stage is an element of an outermost ``nn.ModuleList`` (a
        transformer's block); a module outside any is a stage of its own.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    found: dict[str, list[str]] = {}
    for name in names:
        stage = name
        for prefix in outermost:
            if name.startswith(prefix + "."):
                stage = prefix + "." + name[len(prefix) + 1 :].split(".")[0]
        found.setdefault(stage, []).append(name)
    return list(found.items())


@torch.no_grad()
def collect_hessians(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    stage: str | None = None,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Runs batches and collects ``mean x x^T`` of the inputs of some layers.

    Args:
        model: the model; its mode and parameters are left as they are.
        batches: what :func:`call_model` takes.
        names: of layers whose first argument is their ``[..., K]`` input.
        stage: a module after which a batch is done; None: batches run to the end.
        on_batch: called after every batch.

    Returns:
        fp32 ``[K, K]`` by name, on the layers' devices.

    Raises:
        ValueError: a layer saw no token.
    """
    accumulators: dict[str, HessianAccumulator] = {}
    handles = []

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if name not in accumulators:
                accumulators[name] = HessianAccumulator(x.shape[-1], x.device)
            accumulators[name].add(x)

        return hook

    def stop(*_arguments: Any) -> None:
        raise _StopForward

    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook_for(name)))
        if stage is not None:
            handles.append(model.get_submodule(stage).register_forward_hook(stop))
        for batch in batches:
            with suppress(_StopForward):
                call_model(model, batch)
            if on_batch is not None:
                on_batch()
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in accumulators or accumulators[name].num_tokens == 0:
            raise ValueError(f"the calibration data never reached {name}; skip the layer, or give data that uses it")
    return {name: accumulator.hessian for name, accumulator in accumulators.items()}
