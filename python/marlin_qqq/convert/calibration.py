"""Hessians of a model's linear layers, one decoder block in memory at a time.

The calibration text goes through the blocks in order; a block's inputs come from blocks that are quantised already, so
that each one corrects the errors of those before it (arXiv:2210.17323, section 4, "Setup").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.convert.source import Source, build_empty_model, decoder_layer_of
from marlin_qqq.model_folder import load_tokenizer, read_tokens
from marlin_qqq.quantization import HessianAccumulator


def calibration_tokens(source: Path, text_file: Path, num_samples: int, sequence_length: int) -> list[Tensor]:
    """Sequences of the text, evenly spaced, each int64 [1, sequence_length]; fewer when the text is short.

    Raises:
        CheckpointError: no tokenizer in the source, the file is not UTF-8 text, or it has no complete sequence.
    """
    tokens = read_tokens(load_tokenizer(source), text_file)
    available = tokens.numel() // sequence_length
    if available == 0:
        raise CheckpointError(
            f"{text_file} has {tokens.numel()} tokens; at least one sequence of {sequence_length} is needed"
        )
    count = min(num_samples, available)
    starts = [(tokens.numel() - sequence_length) * index // max(count - 1, 1) for index in range(count)]
    return [tokens[start : start + sequence_length][None] for start in starts]


class BlockwiseCalibration:
    """Runs a model block by block and hands out the Hessian of every linear layer.

    Ask for the layers in the order of the blocks, and give each one's quantised weight back with `replace_weight`: the
    next block sees its effect.

    Args:
        source: the float model.
        tokens: sequences from `calibration_tokens`.
        device: where blocks, Hessians and hidden states live.
        finished: dequantised weights of layers that an earlier run has quantised already, by name.

    Raises:
        CheckpointError: the model's decoder blocks are not found.
    """

    def __init__(
        self, source: Source, tokens: list[Tensor], device: str, finished: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.finished = finished
        self.model = build_empty_model(source.config, source.directory)
        self.model.eval()
        self.block_names = _decoder_blocks(self.model, source)
        self.position = -1
        self.hessians: dict[str, Tensor] = {}
        self.hidden, self.block_arguments = self._run_up_to_blocks(tokens)

    def hessian(self, layer_name: str) -> Tensor:
        """The Hessian fp32 [K, K] of a linear layer, a shared tensor where layers share their input."""
        block = decoder_layer_of(layer_name)
        if block not in self.block_names:
            raise CheckpointError(f"{layer_name} is outside of the decoder blocks; skip it or use method rtn")
        while self.position < 0 or self.block_names[self.position] != block:
            if self.position + 1 >= len(self.block_names):
                raise CheckpointError(f"{layer_name} was asked for after later blocks")
            self._advance()
        return self.hessians[layer_name]

    def replace_weight(self, layer_name: str, weight: Tensor) -> None:
        """Puts a dequantised weight [N, K] in place of a layer's own."""
        self.hessian(layer_name)
        self._set_weight(layer_name, weight)

    def _set_weight(self, layer_name: str, weight: Tensor) -> None:
        layer = self.model.get_submodule(layer_name)
        layer.weight = torch.nn.Parameter(weight.to(self.device, torch.float32), requires_grad=False)

    @torch.no_grad()
    def _advance(self) -> None:
        if self.position >= 0:
            self.hidden = [self._run_block(index) for index in range(len(self.hidden))]
            self._drop(self.block_names[self.position])
        self.position += 1
        name = self.block_names[self.position]
        self._load(name)
        layers = [layer for layer in self.source.layers if decoder_layer_of(layer) == name]
        unfinished = [layer for layer in layers if layer not in self.finished]
        if unfinished:
            self._collect_hessians(layers)
        for layer in layers:
            if layer in self.finished:
                self._set_weight(layer, self.finished[layer]())

    def _collect_hessians(self, layers: list[str]) -> None:
        accumulators: dict[str, HessianAccumulator] = {}
        # Layers that read the same tensor (q, k, v; gate, up) share one accumulator.
        seen: dict[int, str] = {}
        shared: dict[str, str] = {}

        def collect(layer_name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
                inputs = arguments[0]
                owner = seen.setdefault(id(inputs), layer_name)
                shared[layer_name] = owner
                if owner != layer_name:
                    return
                if layer_name not in accumulators:
                    accumulators[layer_name] = HessianAccumulator(inputs.shape[-1], device=self.device)
                accumulators[layer_name].add(inputs)
                kept.append(inputs)

            return hook

        # Keeps inputs alive during a pass: a freed tensor's id may be given to another one.
        kept: list[Tensor] = []
        hooks = [self.model.get_submodule(layer).register_forward_pre_hook(collect(layer)) for layer in layers]
        for index in range(len(self.hidden)):
            self._run_block(index)
            kept.clear()
            seen.clear()
        for handle in hooks:
            handle.remove()
        missing = [layer for layer in layers if layer not in shared]
        if missing:
            raise CheckpointError(
                f"{missing[0]} was not run by its block, so it has no Hessian; skip it or use method rtn"
            )
        self.hessians = {layer: accumulators[shared[layer]].hessian for layer in layers}

    def _run_block(self, index: int) -> Tensor:
        arguments, keywords = self.block_arguments[index][self.position]
        output = self.model.get_submodule(self.block_names[self.position])(self.hidden[index], *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _run_up_to_blocks(self, tokens: list[Tensor]) -> tuple[list[Tensor], list[list[tuple]]]:
        """What every block is called with: the first one's input, and each one's own mask, positions and so on."""
        blocks = [self.model.get_submodule(name) for name in self.block_names]
        for name, module in list(self.model.named_modules()):
            if decoder_layer_of(name + ".") is None and name not in self.block_names:
                self._load_own(name, module)
        calls: list[tuple] = []
        first_input: list[Tensor] = []

        def catch(module: torch.nn.Module) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
                if not calls:
                    first_input.append(hidden_states)
                # Its name in Transformers of either age: blocks run anew must not add to a cache.
                cache = {name: None for name in ("cache", "past_key_values") if name in keywords}
                calls.append((arguments, keywords | cache))
                return hidden_states

            return forward

        for block in blocks:
            block.forward = catch(block)
        body = self.model.get_submodule(self.block_names[0].rpartition(".")[0].rpartition(".")[0])
        hidden, block_arguments = [], []
        for sequence in tokens:
            calls.clear()
            body(input_ids=sequence.to(self.device), use_cache=False)
            if len(calls) != len(blocks):
                raise CheckpointError(f"{type(body).__name__} ran {len(calls)} of its {len(blocks)} blocks")
            hidden.append(first_input.pop())
            block_arguments.append(list(calls))
        for block in blocks:
            del block.forward
        return hidden, block_arguments

    def _load(self, prefix: str) -> None:
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            self._load_own(name, module)
        for name, parameter in self.model.get_submodule(prefix).named_parameters(prefix=prefix):
            if parameter.is_meta:  # such as experts, which Transformers joins into one tensor
                raise CheckpointError(f"{name} is not in the files by that name, so gptq cannot run its block; use rtn")

    def _load_own(self, prefix: str, module: torch.nn.Module) -> None:
        """Reads a module's own parameters and buffers, children not included, in fp32."""
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if name not in self.source.folder:
                continue  # tied, such as lm_head: not needed to run the blocks
            value = self.source.folder.read(name).to(self.device, torch.float32)
            module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            self._build_buffers(prefix, module)

    def _build_buffers(self, prefix: str, module: torch.nn.Module) -> None:
        # Rotary frequencies and the like are not in the files; the module computes them when it is built for real.
        try:
            built = type(module)(self.model.config)
        except Exception as error:
            raise CheckpointError(
                f"{prefix} ({type(module).__name__}) has buffers that cannot be rebuilt: {error}"
            ) from error
        for key, buffer in built._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(self.device)
        for key, value in vars(built).items():
            # Some models keep a plain reference to the same buffer (original_inv_freq).
            if isinstance(value, Tensor):
                setattr(module, key, value.to(self.device))

    def _drop(self, prefix: str) -> None:
        self.model.get_submodule(prefix).to_empty(device="meta")
        self.hessians = {}


def _decoder_blocks(model: torch.nn.Module, source: Source) -> list[str]:
    """The blocks of the module list that holds the layers to quantise, also those in which nothing is quantised."""
    for name in source.layers:
        block = decoder_layer_of(name)
        if block is None:
            continue
        parent = block.rpartition(".")[0]
        blocks = model.get_submodule(parent)
        if isinstance(blocks, torch.nn.ModuleList):
            return [f"{parent}.{index}" for index in range(len(blocks))]
    raise CheckpointError(f"{source.directory}: no list of decoder blocks found, which gptq goes through in order")
