"""quantize_model: every linear layer of a model, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

# The module, not the class: it imports this package, and whichever is imported first is not complete yet here.
from marlin_qqq import linear as qqq_linear
from marlin_qqq.packing import PER_CHANNEL, check_group_size
from marlin_qqq.quantization.calibration import collect_hessians, stages
from marlin_qqq.quantization.quantize import Method

Model = TypeVar("Model", bound=nn.Module)
# Called with the number of layers done, of all layers, and the name of the layer just done.
ProgressCallback = Callable[[int, int, str], None]


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a module's dotted name contains one of ``skip``, whole components at a time.

    Example:
        >>> is_skipped("layers.0.mlp.gate", ["mlp.gate"]), is_skipped("layers.0.mlp.gate_proj", ["mlp.gate"])
        (True, False)
    """
    return any(f".{entry}." in f".{name}." for entry in skip)


def quantize_model(
    model: Model,
    group_size: int = PER_CHANNEL,
    method: Method = "rtn",
    skip: Sequence[str] = ("lm_head",),
    *,
    calibration: Iterable[Any] | None = None,
    progress: bool | ProgressCallback = False,
    **options: Any,
) -> Model:
    """Replaces the ``torch.nn.Linear`` layers of a model by ``QQQLinear`` layers, in place.

    A layer whose weight is shared with a module of another kind (tied embeddings) is left alone, with a warning unless
    it is in ``skip``; linear layers that share a weight share the packed weight. Subclasses of ``nn.Linear`` are left
    alone: their owners reach into them.

    Args:
        model: any module; a ``nn.Linear`` itself cannot be replaced in place (use ``QQQLinear.from_linear``).
        group_size: 128 or -1.
        method: "rtn", "mse" or "gptq", see ``quantize_weight``.
        skip: names of modules that stay as they are, with everything in them: "lm_head", "layers.0", "mlp.gate". A name
            matches whole components anywhere in a module's dotted name.
        calibration: for "gptq": batches of model inputs (a tensor, a tuple of arguments, or a dict of keyword
            arguments), on the model's device. The blocks of a transformer are calibrated one after the other, each with
            the blocks before it quantised already; the memory needed is the Hessians of one block. Runs the batches
            through the first i blocks for block i.
        progress: True: a progress bar on the terminal. Or a function ``(done, total, name)``, called after every layer.
        **options: of the method.

    Returns:
        The model.

    Raises:
        TypeError: the model is a ``nn.Linear``.
        ValueError: there is nothing to quantise, a layer's weight is refused (the message names the layer), or
            "gptq" has no calibration.

    Example:
        >>> marlin_qqq.quantize_model(model, group_size=128, method="gptq", calibration=[input_ids], progress=True)
    """
    check_group_size(group_size)
    if type(model) is nn.Linear:
        raise TypeError("model is a torch.nn.Linear, which cannot be replaced in place; use QQQLinear.from_linear")
    if (calibration is not None) != (method == "gptq"):
        raise ValueError(
            f'method is {method!r}, calibration is {type(calibration).__name__}; "gptq" needs it, others do not'
        )
    names = _layers_to_quantize(model, skip)
    if not names:
        raise ValueError(f"model has no torch.nn.Linear to quantise outside skip = {list(skip)}")

    num_uses = Counter(id(model.get_submodule(name).weight) for name in names)
    # Layers that share a weight: the first one quantised, with the weight itself, which keeps its identity taken.
    shared: dict[int, tuple[qqq_linear.QQQLinear, Tensor]] = {}
    batches = list(calibration or ())
    done = 0
    with _reporter(progress) as report:
        for stage, members in stages(model, names) if method == "gptq" else [("", names)]:
            hessians = collect_hessians(model, batches, members, stage) if method == "gptq" else {}
            for name in members:
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                first, weight = shared.get(id(linear.weight), (None, linear.weight))
                if first is None:
                    own_options = options | ({"hessian": hessians.pop(name)} if name in hessians else {})
                    try:
                        layer = qqq_linear.QQQLinear.from_linear(linear, group_size, method, **own_options)
                    except (TypeError, ValueError) as error:
                        raise type(error)(f"{name}: {error}") from error
                    if num_uses[id(weight)] > 1:
                        shared[id(weight)] = (layer, weight)
                else:
                    layer = qqq_linear.QQQLinear.from_quantized(
                        first.quantized_weight(), linear.bias, linear.in_features, linear.out_features
                    )
                _replace(model, linear, layer.train(linear.training))
                done += 1
                report(done, len(names), name)
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        # A Transformers model, so that module is loaded already: save_pretrained writes a QQQ folder from here on.
        from marlin_qqq.integrations.transformers import mark_quantized

        mark_quantized(model, group_size, tuple(skip))
    return model


def _layers_to_quantize(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """Names of the plain linear layers outside ``skip`` whose weight is no other module's."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if type(module) is not nn.Linear
        for parameter in module.parameters(recurse=False)
    }
    names = []
    for name, linear in linears.items():
        if is_skipped(name, skip):
            continue
        if id(linear.weight) in elsewhere:
            warnings.warn(
                f"{name} is left as it is: its weight is shared with a module that is not a torch.nn.Linear (tied "
                "embeddings); name it in skip to leave it without this warning",
                stacklevel=3,
            )
            continue
        names.append(name)
    return names


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` is: one module may have several parents."""
    for parent in list(model.modules()):
        # Not named_children(), which names a child that is there twice only once.
        for key in [key for key, child in parent._modules.items() if child is old]:
            setattr(parent, key, new)


@contextmanager
def _reporter(progress: bool | ProgressCallback) -> Iterator[ProgressCallback]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total, name: None
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("quantising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}")) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)
