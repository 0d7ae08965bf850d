"""`quantization_config` of a QQQ checkpoint: both flavours in, HandH1998/QQQ's out.

The fields' meaning: docs/format.md. HandH1998/QQQ writes `wbits` and `group_size`; GPTQModel writes `bits`, `desc_act`,
`sym`, `format`, `meta` and more. What a file says about a module (regular expressions in GPTQModel's `dynamic`) is not
evaluated: the tensors in the folder decide which modules are quantised, and their shapes are checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marlin_qqq.checkpoint.errors import CheckpointError
from marlin_qqq.packing import GROUP_SIZE, PER_CHANNEL
from marlin_qqq.quantization.model import is_skipped

QUANT_METHOD = "qqq"
SUPPORTED_GROUP_SIZES = (GROUP_SIZE, PER_CHANNEL)
# Where the settings may live, in the order in which they are looked up (vLLM and GPTQModel used the last two).
SIDE_FILES = ("quant_config.json", "quantize_config.json")
# A config of a real model is a few KiB; an index of the largest ones about 10 MiB.
MAX_JSON_BYTES = 100 * 1024 * 1024

_BITS_NAMES = ("wbits", "bits", "w_bit")
_GROUP_SIZE_NAMES = ("group_size", "groupsize", "q_group_size")
_METHOD_NAMES = ("quant_method", "method")
_FORMAT_NAMES = ("format", "checkpoint_format")


@dataclass(frozen=True)
class QuantizationSettings:
    """What a checkpoint's configuration says about its quantised modules.

    Attributes:
        group_size: 128 or -1 (one scale a channel).
        modules_to_not_convert: names that stay unquantised, as Transformers spells them ("lm_head").
        flavour: "QQQ" (HandH1998/QQQ's fields) or "GPTQModel".
    """

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    flavour: str = "QQQ"
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.group_size not in SUPPORTED_GROUP_SIZES or isinstance(self.group_size, bool):
            raise CheckpointError(f"group_size is {self.group_size!r}; allowed: 128, or -1 for one scale a channel")

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` object that HandH1998/QQQ, vLLM and this library read."""
        config: dict[str, Any] = {"quant_method": QUANT_METHOD, "wbits": 4, "group_size": self.group_size}
        if self.modules_to_not_convert:
            config["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return config

    def is_skipped(self, module_name: str) -> bool:
        """True if `module_name` or a module around it is named by modules_to_not_convert (whole dotted parts)."""
        return is_skipped(module_name, self.modules_to_not_convert)


@dataclass(frozen=True)
class FoundConfig:
    """A folder's quantization_config of any method, not checked yet; source: what to call it in an error."""

    fields: Mapping[str, Any]
    source: str

    @property
    def is_qqq(self) -> bool:
        """True for all that `parse_quantization_config` accepts, and for what names QQQ beside another method.

        The latter is to be refused with a sentence, which other loaders would not do: they skip what they do not know
        and leave random weights.
        """
        named = [self.fields[name] for name in (*_METHOD_NAMES, *_FORMAT_NAMES) if self.fields.get(name) is not None]
        return any(_is_qqq_name(value) for value in named) if named else "wbits" in self.fields

    @property
    def method(self) -> Any:
        """The name of the method, in lower case; None where there is none."""
        if self.is_qqq:
            return QUANT_METHOD
        named = next((self.fields[name] for name in _METHOD_NAMES if self.fields.get(name) is not None), None)
        return named.lower() if isinstance(named, str) else named


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file; anything else is a CheckpointError that names the file."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a regular file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a configuration has at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except CheckpointError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    except ValueError as error:  # an integer literal longer than Python converts
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed")
    return value


def parse_quantization_config(config: Mapping[str, Any], source: str = "quantization_config") -> QuantizationSettings:
    """Checks a `quantization_config` object of either flavour.

    Args:
        config: the JSON object.
        source: what to call it in an error, e.g. the file's path.

    Raises:
        CheckpointError: another method, another bit width, an unsupported group size, asymmetric weights, or act-order
            without static groups.

    Example:
        >>> parse_quantization_config({"quant_method": "qqq", "bits": 4, "group_size": 128}).group_size
        128
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{source} is a {type(config).__name__}; an object is needed")
    method = _one_value(config, _METHOD_NAMES, source)
    weight_format = _one_value(config, _FORMAT_NAMES, source)
    if method is None and weight_format is None and "wbits" not in config:
        raise CheckpointError(f"{source} names no quant_method; this library reads {QUANT_METHOD!r}")
    for name, value in (("quant_method", method), ("format", weight_format)):
        if value is not None and not _is_qqq_name(value):
            raise CheckpointError(f"{source}: {name} is {value!r}; this library reads {QUANT_METHOD!r}")

    bits = _one_value(config, _BITS_NAMES, source)
    if bits is None:
        raise CheckpointError(f"{source} has none of {', '.join(_BITS_NAMES)}; 4 is needed")
    if isinstance(bits, bool) or bits != 4:
        raise CheckpointError(f"{source}: weights of {bits!r} bits; QQQ has 4-bit weights")
    group_size = _one_value(config, _GROUP_SIZE_NAMES, source)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size not in SUPPORTED_GROUP_SIZES:
        raise CheckpointError(f"{source}: group_size is {group_size!r}; allowed: 128, or -1 for one scale a channel")
    if config.get("sym") is False:
        raise CheckpointError(f"{source}: sym is false; QQQ's 4-bit codes are symmetric, there is no zero point")
    if config.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise CheckpointError(f"{source}: pack_dtype is {config['pack_dtype']!r}; QQQ packs into int32")
    if config.get("desc_act") is True and group_size != -1 and not _has_static_groups(config):
        raise CheckpointError(
            f"{source}: desc_act is true with group_size {group_size} and without static groups, so a weight's group "
            "follows an order of the inputs that the QQQ format does not store; it cannot be computed correctly"
        )
    return QuantizationSettings(
        group_size=group_size,
        modules_to_not_convert=_skip_list(config, source),
        flavour="QQQ" if "wbits" in config else "GPTQModel",
        source=source,
    )


def find_quantization_config(directory: str | os.PathLike[str]) -> FoundConfig | None:
    """What a folder says about its quantisation, by any method; None: the weights are not quantised.

    `quantization_config` in config.json counts, else the first side file of older versions that there is.

    Raises:
        CheckpointError: no such folder, or something that is no JSON object.

    Example:
        >>> find_quantization_config("Llama-3-8B-QQQ").is_qqq  # doctest: +SKIP
        True
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    config_path = folder / "config.json"
    if config_path.exists():
        embedded = read_json_object(config_path).get("quantization_config")
        if embedded is not None:
            source = f"quantization_config in {config_path}"
            if not isinstance(embedded, dict):
                raise CheckpointError(f"{source} is a {type(embedded).__name__}; an object is needed")
            return FoundConfig(embedded, source)
    for name in SIDE_FILES:
        if (folder / name).exists():
            return FoundConfig(read_json_object(folder / name), str(folder / name))
    return None


def read_quantization_config(directory: str | os.PathLike[str]) -> QuantizationSettings:
    """The settings of a QQQ folder: `quantization_config` in config.json, else a side file of older versions.

    Raises:
        CheckpointError: no such object, or one that `parse_quantization_config` refuses.

    Example:
        >>> read_quantization_config("Llama-3-8B-QQQ").group_size  # doctest: +SKIP
        128
    """
    found = find_quantization_config(directory)
    if found is None:
        raise CheckpointError(
            f"{directory} has no quantization_config in config.json and no {' or '.join(SIDE_FILES)}: "
            "not a QQQ checkpoint"
        )
    return parse_quantization_config(found.fields, found.source)


def _one_value(config: Mapping[str, Any], names: tuple[str, ...], source: str) -> Any:
    """The value that several historical names stand for; two names that disagree are refused."""
    found = {name: config[name] for name in names if config.get(name) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise CheckpointError(f"{source}: {found} disagree")
    return values[0] if values else None


def _is_qqq_name(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == QUANT_METHOD


def _has_static_groups(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta")
    return config.get("static_groups") is True or (isinstance(meta, Mapping) and meta.get("static_groups") is True)


def _skip_list(config: Mapping[str, Any], source: str) -> tuple[str, ...]:
    names = config.get("modules_to_not_convert")
    if names is None:
        return ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{source}: modules_to_not_convert is {names!r}; a list of module names is needed")
    return tuple(names)
