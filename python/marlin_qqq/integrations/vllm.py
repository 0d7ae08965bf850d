"""vLLM plug-in: a checkpoint with `"quant_method": "qqq"` is served by vLLM with this library's ops.

vLLM finds `register` through the entry point group `vllm.general_plugins`; nothing needs to be imported or passed by
hand. Only translation happens here: the configuration is read by `marlin_qqq.checkpoint`, values are checked there, the
arithmetic is one op. From nothing to a served answer: docs/vllm.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from marlin_qqq.checkpoint.config import QUANT_METHOD, SIDE_FILES, QuantizationSettings, parse_quantization_config
from marlin_qqq.checkpoint.reader import CHANNEL_SCALE, GROUP_SCALE, PACKED, check_values
from marlin_qqq.linear import round_up
from marlin_qqq.ops import marlin_qqq_linear
from marlin_qqq.packing import GROUP_SIZE, IN_FEATURES_MULTIPLE, OUT_FEATURES_MULTIPLE, TILE_IN_FEATURES

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(__name__)

# int4 codes in an int32; a packed row holds 16 rows of weights (vLLM calls that the Marlin tile).
_CODES_PER_WORD = 8
_MOE_LAYERS = frozenset({"FusedMoE", "RoutedExperts"})


def register() -> None:
    """Makes vLLM know the quantisation method "qqq". vLLM calls it in each of its processes; calling it again is fine.

    A vLLM that has a method of this name built in (0.5.4 to 0.10.1) keeps it.
    """
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(QQQConfig)


class QQQConfig(QuantizationConfig):
    """`quantization_config` of a QQQ checkpoint, of either flavour, as vLLM wants it.

    Args:
        settings: the checked configuration.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        super().__init__()
        self.settings = settings
        self.unquantized_modules = list(settings.modules_to_not_convert)

    def __repr__(self) -> str:
        return f"QQQConfig(group_size={self.settings.group_size}, unquantized_modules={self.unquantized_modules})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return list(SIDE_FILES)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QQQConfig:
        if config.get("lm_head") is True:
            raise ValueError("quantization_config says that lm_head is quantised; only a plain lm_head is served")
        return cls(parse_quantization_config(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Takes from the files' headers which modules are not quantised: configurations rarely tell it all."""
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        names = get_safetensors_params_metadata(model_name, revision=revision)
        plain = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        packed = {name.removesuffix(f".{PACKED}") for name in names if name.endswith(f".{PACKED}")}
        self.unquantized_modules = sorted({*self.unquantized_modules, *(plain - packed)})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.unquantized_modules = hf_to_vllm_mapper.apply_list(self.unquantized_modules)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if self._is_unquantized(prefix):
                return UnquantizedLinearMethod()
            return QQQLinearMethod(self.settings.group_size)
        if _MOE_LAYERS & {base.__name__ for base in type(layer).__mro__} and not self._is_unquantized(prefix):
            raise NotImplementedError(f"{prefix}: QQQ experts of a mixture-of-experts layer cannot be served")
        return None  # embeddings, lm_head, attention

    def _is_unquantized(self, prefix: str) -> bool:
        """Whether a layer stays unquantised; one that vLLM fuses (q, k, v) must be so in all its parts or in none."""
        stem, _, name = prefix.rpartition(".")
        parts = [f"{stem}.{part}" if stem else part for part in self.packed_modules_mapping.get(name, [])]
        settings = QuantizationSettings(self.settings.group_size, tuple(self.unquantized_modules))
        skipped = [settings.is_skipped(part) for part in (prefix, *parts)]
        if any(skipped) and not skipped[0] and not all(skipped[1:]):
            raise ValueError(
                f"{prefix}: vLLM joins {', '.join(parts)} into one layer, but only some of them are quantised in this "
                "checkpoint; quantise all of them or none"
            )
        return any(skipped)


@register_weight_loader_v2_supported_method
class QQQLinearMethod(LinearMethodBase):
    """How vLLM's linear layers (replicated, column, merged column, QKV, row parallel) hold and apply QQQ weights.

    Args:
        group_size: 128 or -1.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        weight_loader = extra_weight_attrs["weight_loader"]
        prefix = getattr(layer, "prefix", type(layer).__name__)
        tp_size = getattr(layer, "tp_size", 1)
        grouped = self.group_size == GROUP_SIZE
        input_sharded = input_size_per_partition != input_size
        output_sharded = sum(output_partition_sizes) != output_size
        if input_sharded:
            multiple = GROUP_SIZE if grouped else TILE_IN_FEATURES
            check_cut(prefix, tp_size, "in_features", input_size_per_partition, multiple)
        if output_sharded:
            for size in output_partition_sizes:
                check_cut(prefix, tp_size, "out_features", size, OUT_FEATURES_MULTIPLE)

        in_features = round_up(input_size_per_partition, IN_FEATURES_MULTIPLE)
        part_sizes = [round_up(size, OUT_FEATURES_MULTIPLE) for size in output_partition_sizes]
        out_features = sum(part_sizes)
        # Scales start as NaN, so that process_weights_after_loading notices those that no file brought.
        packed = torch.zeros(in_features // TILE_IN_FEATURES, 2 * out_features, dtype=torch.int32)
        channel_scale = torch.full((1, out_features), torch.nan, dtype=torch.float32)
        group_scale = torch.full((in_features // GROUP_SIZE, out_features), torch.nan, dtype=torch.float16)

        parameters: dict[str, BasevLLMParameter] = {}
        if in_features == input_size_per_partition and part_sizes == list(output_partition_sizes):
            parameters[PACKED] = PackedvLLMParameter(
                data=packed,
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=_CODES_PER_WORD,
                marlin_tile_size=TILE_IN_FEATURES,
                weight_loader=weight_loader,
            )
            parameters[CHANNEL_SCALE] = ChannelQuantScaleParameter(
                data=channel_scale, output_dim=1, weight_loader=weight_loader
            )
            parameters[GROUP_SCALE] = GroupQuantScaleParameter(
                data=group_scale, input_dim=0, output_dim=1, weight_loader=weight_loader
            )
        else:
            shard = input_size_per_partition if input_sharded else 0
            for name, data, columns, shard_rows in (
                (PACKED, packed, 2, shard // TILE_IN_FEATURES),
                (CHANNEL_SCALE, channel_scale, 1, 0),
                (GROUP_SCALE, group_scale, 1, shard // GROUP_SIZE),
            ):
                parameters[name] = PaddedParameter(
                    data=data,
                    part_sizes=[size * columns for size in part_sizes],
                    shard_rows=shard_rows,
                    weight_loader=weight_loader,
                )
        if not grouped:
            no_values = torch.empty(0, dtype=torch.float16)
            parameters[GROUP_SCALE] = BasevLLMParameter(data=no_values, weight_loader=_refuse_group_scale(prefix))
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        layer.qqq_output_sizes = list(output_partition_sizes)
        layer.qqq_whole_input_size = input_size

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Checks the loaded values, repairs scales in place, and makes the parameters plain ones on the same memory."""
        packed, channel_scale, group_scale = layer.B.data, layer.s_channel.data, layer.s_group.data
        if layer.qqq_whole_input_size == GROUP_SIZE and torch.isnan(group_scale).all():
            # HandH1998/QQQ packs a layer with a single group as per-channel, whatever the configuration says.
            group_scale = group_scale.new_empty(0)
        checked = check_values(getattr(layer, "prefix", type(layer).__name__), packed, channel_scale, group_scale, None)
        if checked.repaired_columns:
            channel_scale.copy_(checked.weight.s_channel)
            group_scale.copy_(checked.weight.s_group)
        for name, data in ((PACKED, packed), (CHANNEL_SCALE, channel_scale), (GROUP_SCALE, group_scale)):
            layer.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))

        if checked.weight.out_features != sum(layer.qqq_output_sizes):
            # A buffer, not a parameter: no file brings it, and vLLM's sleep mode keeps the values of buffers.
            real_columns = _real_columns(layer.qqq_output_sizes, packed.device)
            layer.register_buffer("real_columns", real_columns, persistent=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        in_features, out_features = layer.B.shape[0] * TILE_IN_FEATURES, layer.B.shape[1] // 2
        real_columns = getattr(layer, "real_columns", None)
        if x.shape[-1] != in_features:
            x = torch.nn.functional.pad(x, (0, in_features - x.shape[-1]))  # zeros change no token's scale
        if bias is not None and real_columns is not None:
            bias = bias.new_zeros(out_features).index_copy(0, real_columns, bias)
        # constant_weights: vLLM writes weights only between steps (loading, reloading, waking up), and every step has
        # ordinary kernels, each of which waits for all work ahead of it, before its first matrix product.
        output = marlin_qqq_linear(
            x, layer.B, layer.s_channel, layer.s_group, bias=bias, out_dtype=x.dtype, constant_weights=True
        )
        return output if real_columns is None else output.index_select(-1, real_columns)


class PaddedParameter(BasevLLMParameter):
    """A tensor of a layer whose inputs or outputs do not fill whole tiles, e.g. 96 outputs of one key head.

    Files hold the outputs of every module padded to whole tiles, so the parts of a layer that vLLM fuses lie at other
    columns than vLLM's own parameters assume. Inputs may be padded in the file, or in memory only.

    Args:
        part_sizes: columns of every part, padding included.
        shard_rows: rows that a rank takes where they are divided over the ranks; 0: all.
    """

    def __init__(self, part_sizes: Sequence[int], shard_rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part_sizes = tuple(part_sizes)
        self.shard_rows = shard_rows

    def _load_part(self, loaded_weight: torch.Tensor, part: int, column_rank: int) -> None:
        size = self.part_sizes[part]
        target = self.data.narrow(1, sum(self.part_sizes[:part]), size)
        source = loaded_weight.narrow(1, column_rank * size, size)
        if source.shape[0] > target.shape[0]:
            raise ValueError(f"a tensor of the file has {source.shape[0]} rows; at most {target.shape[0]} are expected")
        target[: source.shape[0]].copy_(source)
        target[source.shape[0] :].zero_()

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load_part(loaded_weight, 0, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._load_part(loaded_weight, kwargs["shard_id"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        # Ranks share a key head where there are more ranks than key heads; num_heads is how many do.
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        self._load_part(loaded_weight, self._shard_id_as_int(kwargs["shard_id"]), rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        if self.shard_rows:
            loaded_weight = loaded_weight.narrow(0, self.tp_rank * self.shard_rows, self.shard_rows)
        self._load_part(loaded_weight, 0, 0)


def check_cut(layer_name: str, tensor_parallel_size: int, dimension: str, shard_size: int, multiple: int) -> None:
    """Refuses a shard that would cut a tile or a group of the packed weight.

    Raises:
        ValueError: `shard_size` is not a multiple of `multiple`.
    """
    if shard_size % multiple:
        whole = shard_size * tensor_parallel_size
        raise ValueError(
            f"{layer_name}: tensor_parallel_size {tensor_parallel_size} divides {dimension} {whole} into shards of "
            f"{shard_size}; packed QQQ weights can be divided along {dimension} only into multiples of {multiple}: use "
            "a smaller tensor_parallel_size"
        )


def _refuse_group_scale(layer_name: str) -> Callable[..., None]:
    """The weight loader of a layer without group scales: a file may bring an empty tensor, but no values."""

    def no_group_scale_loader(param: torch.Tensor, loaded_weight: torch.Tensor, *shard_id: Any) -> None:
        if loaded_weight.numel():
            raise ValueError(
                f"{layer_name}: the configuration says group_size -1, but the files hold group scales of shape "
                f"{list(loaded_weight.shape)}"
            )

    return no_group_scale_loader


def _real_columns(output_sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the outputs are among the padded ones: int64 `[sum(output_sizes)]`."""
    columns, start = [], 0
    for size in output_sizes:
        columns.append(torch.arange(start, start + size, device=device))
        start += round_up(size, OUT_FEATURES_MULTIPLE)
    return torch.cat(columns)
