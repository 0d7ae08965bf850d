"""Whether the tensors of a folder are those of a model: by names, shapes and kinds, without reading any."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from marlin_qqq.checkpoint.reader import PACKED
from marlin_qqq.checkpoint.tensors import TensorInfo


@dataclass
class _Stored:
    """What the files hold for one tensor of the model. joined: loaders join several tensors to this one."""

    name: str
    infos: list[TensorInfo]
    joined: bool = False

    def problems(self, needed: torch.Tensor) -> list[str]:
        shape = tuple(needed.shape)
        found = []
        for info in self.infos:
            if not self.joined and info.shape != shape:
                found.append(f"{info.name} has shape {list(info.shape)}, the model's has {list(shape)}")
            if info.dtype.is_floating_point != needed.dtype.is_floating_point:
                kind = "a floating-point type"
                if not needed.dtype.is_floating_point:
                    kind = str(needed.dtype).removeprefix("torch.")
                found.append(f"{info.name} has dtype {str(info.dtype).removeprefix('torch.')}; {kind} is needed")
        values = sum(math.prod(info.shape) for info in self.infos)
        if self.joined and values != needed.numel():
            found.append(f"{self.name} is joined from {len(self.infos)} tensors of {values} values, not {list(shape)}")
        return found


def tensor_problems(
    model: torch.nn.Module, infos: Iterable[TensorInfo], is_quantized: Callable[[str], bool] | None = None
) -> list[str]:
    """Tensors that ``model`` (on the meta device) needs and the files lack, or hold in another shape or kind.

    Args:
        infos: what the files' headers say.
        is_quantized: whether they hold a linear layer's weights in quantised form, which is not looked at here; None
            where they must not.

    Returns:
        A sentence each. Tensors that the model ties to others may be missing.
    """
    stored = _stored_as(model, infos)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    problems: list[str] = []
    for names, tensor in _tied_names(model):
        found = [stored[name] for name in names if name in stored]
        for sources in found:
            problems += sources.problems(tensor)
        layers = [name.removesuffix(".weight") for name in names if name in linear]
        if found or (is_quantized is not None and any(is_quantized(layer) for layer in layers)):
            continue
        if any(rule.search(name) for rule in ignored for name in names):
            continue
        if is_quantized is not None and names[0] in linear:
            layer = layers[0]
            problems.append(f"{layer} is missing: neither {layer}.{PACKED} nor {layer}.weight is in the folder")
        else:
            problems.append(f"{names[0]} is missing")
    return problems


def _tied_names(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """The model's parameters and stored buffers, each with all names that stand for it."""
    groups: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _stored_as(model: Any, infos: Iterable[TensorInfo]) -> dict[str, _Stored]:
    """The files' tensors by their name in the model: some families' files have other names, or split tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    stored: dict[str, _Stored] = {}
    for info in infos:
        name, pattern = rename_source_key(info.name, renamings, converters, model.base_model_prefix, expected)
        entry = stored.setdefault(name, _Stored(name, [], joined=pattern is not None))
        entry.infos.append(info)
    return stored
