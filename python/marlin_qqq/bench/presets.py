"""Shapes of the linear layers of well-known models, as a serving engine runs them.

Query, key and value are one product ("qkv"), gate and up another ("gate_up"): engines fuse them. Under tensor
parallelism qkv and gate_up are cut along their outputs, o and down along their inputs; key/value heads are
replicated once there are fewer of them than ranks.

Sizes are those of the models' public ``config.json`` files.
"""

from __future__ import annotations

from dataclasses import dataclass

from marlin_qqq.limits import IN_FEATURES_MULTIPLE, OUT_FEATURES_MULTIPLE

# In a range of batch sizes: a larger one would be a mistake, and its list would fill the memory.
MOST_INTEGERS = 100_000


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that decide its linear layers."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Layer:
    """One linear layer of a preset: its name and its shape on one rank."""

    name: str
    out_features: int
    in_features: int

    @property
    def shape(self) -> str:
        """``NxK``, as ``--shape`` takes it."""
        return f"{self.out_features}x{self.in_features}"


MODELS: dict[str, Model] = {
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128),
    "llama-3.1-70b": Model(8192, 28672, 64, 8, 128),
    "llama-3.1-405b": Model(16384, 53248, 128, 8, 128),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128),
    "qwen2.5-14b": Model(5120, 13824, 40, 8, 128),
    "qwen2.5-32b": Model(5120, 27648, 40, 8, 128),
    "qwen2.5-72b": Model(8192, 29568, 64, 8, 128),
    "qwen3-8b": Model(4096, 12288, 32, 8, 128),
    "qwen3-14b": Model(5120, 17408, 40, 8, 128),
    "qwen3-32b": Model(5120, 25600, 64, 8, 128),
    "mistral-7b": Model(4096, 14336, 32, 8, 128),
    "mistral-nemo-12b": Model(5120, 14336, 32, 8, 128),
    "mistral-small-24b": Model(5120, 32768, 32, 8, 128),
    "mistral-large-123b": Model(12288, 28672, 96, 8, 128),
    "phi-3.5-mini": Model(3072, 8192, 32, 32, 96),
    "phi-4": Model(5120, 17920, 40, 10, 128),
}

# The shapes that this project's own performance goals are written for.
REFERENCE_SHAPES: tuple[Layer, ...] = (
    Layer("8192x21760", 8192, 21760),
    Layer("28672x4096", 28672, 4096),
    Layer("4096x4096", 4096, 4096),
    Layer("4096x14336", 4096, 14336),
    Layer("8192x28672", 8192, 28672),
)


def model_layers(model: str, tensor_parallel: int = 1) -> tuple[Layer, ...]:
    """The four linear layers of one decoder layer of ``model``, as one of ``tensor_parallel`` ranks sees them.

    Raises ValueError for an unknown model, or a tensor-parallel size that the model's heads or the format's
    tiles do not allow (outputs are cut at multiples of 64, inputs at multiples of 128).

    >>> [layer.shape for layer in model_layers("llama-3.1-8b")]
    ['6144x4096', '4096x4096', '28672x4096', '4096x14336']
    """
    try:
        config = MODELS[model]
    except KeyError:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}") from None
    if tensor_parallel < 1 or config.num_heads % tensor_parallel:
        raise ValueError(f"tensor parallel size {tensor_parallel} does not divide {model}'s {config.num_heads} heads")

    heads = config.num_heads // tensor_parallel
    key_value_heads = max(1, config.num_key_value_heads // tensor_parallel)
    if config.intermediate_size % tensor_parallel:
        raise ValueError(
            f"tensor parallel size {tensor_parallel} does not divide {model}'s intermediate size "
            f"{config.intermediate_size}"
        )
    intermediate = config.intermediate_size // tensor_parallel
    layers = (
        Layer("qkv", (heads + 2 * key_value_heads) * config.head_dim, config.hidden_size),
        Layer("o", config.hidden_size, heads * config.head_dim),
        Layer("gate_up", 2 * intermediate, config.hidden_size),
        Layer("down", config.hidden_size, intermediate),
    )
    for layer in layers:
        check_shape(layer, f"{model} with tensor parallel size {tensor_parallel}")
    return layers


def parse_shape(text: str) -> Layer:
    """``"8192x21760"`` (out_features x in_features) as a Layer. Raises ValueError for anything else."""
    parts = text.lower().replace("*", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"shape {text!r} is not NxK (out_features x in_features), for example 4096x14336")
    layer = Layer(text.strip(), int(parts[0]), int(parts[1]))
    check_shape(layer, "--shape")
    return layer


def check_shape(layer: Layer, origin: str) -> None:
    """Raises ValueError unless the op itself (without a layer's padding) can run ``layer``."""
    for name, value, multiple in (
        ("out_features", layer.out_features, OUT_FEATURES_MULTIPLE),
        ("in_features", layer.in_features, IN_FEATURES_MULTIPLE),
    ):
        if value <= 0 or value % multiple:
            raise ValueError(
                f"{origin}: {name} of {layer.name} is {value}; it must be a positive multiple of {multiple}"
            )


def parse_integers(text: str) -> list[int]:
    """``"1,16,64:256:64"`` as a sorted list without repeats; ``a:b[:step]`` includes both ends."""
    values: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            bounds = [int(piece) for piece in part.split(":")]
        except ValueError:
            raise ValueError(f"{part!r} in {text!r} is neither an integer nor a range first:last[:step]") from None
        if len(bounds) == 1:
            values.add(bounds[0])
        elif len(bounds) in (2, 3) and (len(bounds) == 2 or bounds[2] > 0):
            numbers = range(bounds[0], bounds[1] + 1, bounds[2] if len(bounds) == 3 else 1)
            if numbers[MOST_INTEGERS:]:
                raise ValueError(f"{part!r} in {text!r} is more than {MOST_INTEGERS} integers")
            values.update(numbers)
        else:
            raise ValueError(f"{part!r} in {text!r} is not a range first:last[:step]")
    if not values:
        raise ValueError(f"{text!r} holds no integer")
    return sorted(values)
