"""QQQLinear: a linear layer with 4-bit weights and 8-bit activations, in place of torch.nn.Linear for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from marlin_qqq.limits import check_in_features_limit, check_integer
from marlin_qqq.ops import marlin_qqq_linear
from marlin_qqq.packing import (
    GROUP_SIZE,
    IN_FEATURES_MULTIPLE,
    OUT_FEATURES_MULTIPLE,
    PER_CHANNEL,
    TILE_IN_FEATURES,
    QQQWeight,
    check_group_size,
)
from marlin_qqq.quantization import Method, check_and_repair, check_weight, dequantize_weight, quantize_weight

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Buffers whose dtype is part of the format, and an integer dtype of the same size that no conversion touches.
_FIXED_DTYPES = {"B": torch.int32, "s_channel": torch.int32, "s_group": torch.int16}


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def _padded_in_features(in_features: int) -> int:
    padded = round_up(in_features, IN_FEATURES_MULTIPLE)
    padding = f", padded to {padded}" if padded != in_features else ""
    check_in_features_limit(padded, f"in_features is {in_features}{padding}")
    return padded


class QQQLinear(nn.Module):
    """``y = x W^T + bias`` with a QQQ weight; x is quantised per token to int8 on the way.

    The result is that of ``quantize_per_token`` and ``marlin_qqq_gemm``, to the bit, on every device and whatever else
    is in the batch. For inference: nothing has a gradient. The layer may run where gradients are recorded, but a
    backward pass that reaches it raises NotImplementedError; an input that requires no gradient is in nobody's way.

    Sizes that the op does not take are padded with zeros, K to a multiple of 128 and N of 64, in the stored tensors;
    the output is cut to ``out_features``.

    Buffers, which are also the keys of the state dict:
        B: int32 ``[K/16, 2N]``, packed codes (K, N padded).
        s_channel: fp32 ``[1, N]``.
        s_group: fp16 ``[K/128, N]``; shape ``[0]`` per-channel.
        bias: ``[out_features]`` (not padded), or None.
    ``.half()``, ``.bfloat16()``, ``.to(dtype)`` convert the bias and leave the other dtypes alone.

    The output has the activation's dtype. fp16 and bf16 are what the op writes; for fp32 activations it writes fp16,
    the more exact of the two, and the result is converted: magnitudes above 65504 become infinite (use bf16 activations
    for layers that need the range).

    The layer promises the op that its weights do not change while earlier work on the device is unfinished
    (``constant_weights``), so that a kernel may fetch them before the one in front of it has ended. After changing a
    buffer in place on a GPU, call ``torch.cuda.synchronize()`` before the next forward.

    Args:
        in_features: K of the inputs, any positive size up to 132096.
        out_features: N of the outputs, any positive size.
        bias: whether there is a bias.
        group_size: 128 or -1.
        device: of the buffers.
        dtype: of the bias; default: torch's default dtype.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size that is not positive or too large, or a group size that the format does not have.

    Example:
        >>> layer = marlin_qqq.QQQLinear.from_linear(torch.nn.Linear(4096, 11008), group_size=128)
        >>> y = layer(torch.randn(2, 5, 4096, dtype=torch.bfloat16))
        >>> y.shape, y.dtype
        (torch.Size([2, 5, 11008]), torch.bfloat16)
    """

    B: Tensor
    s_channel: Tensor
    s_group: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = PER_CHANNEL,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_integer(name, size)
            if size <= 0:
                raise ValueError(f"{name} is {size}; it must be positive")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = check_group_size(group_size)
        self.padded_in_features = _padded_in_features(in_features)
        self.padded_out_features = round_up(out_features, OUT_FEATURES_MULTIPLE)
        k, n = self.padded_in_features, self.padded_out_features
        group_shape = (k // GROUP_SIZE, n) if group_size == GROUP_SIZE else (0,)
        self.register_buffer("B", torch.zeros(k // TILE_IN_FEATURES, 2 * n, dtype=torch.int32, device=device))
        self.register_buffer("s_channel", torch.zeros(1, n, dtype=torch.float32, device=device))
        self.register_buffer("s_group", torch.zeros(group_shape, dtype=torch.float16, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = PER_CHANNEL, method: Method = "rtn", **options: Any
    ) -> QQQLinear:
        """Quantises a linear layer.

        Args:
            linear: fp16, bf16, fp32 or fp64, any size; not modified, and its bias is copied.
            group_size: 128 or -1.
            method: "rtn", "mse" or "gptq", see ``quantize_weight``.
            **options: of the method; ``hessian`` is ``[in_features, in_features]``, without padding.

        Raises:
            TypeError, ValueError: not a linear layer, or what ``quantize_weight`` refuses.

        Example:
            >>> layer = marlin_qqq.QQQLinear.from_linear(linear, group_size=128, method="mse")
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear")
        pad_k = _padded_in_features(linear.in_features) - linear.in_features
        pad_n = round_up(linear.out_features, OUT_FEATURES_MULTIPLE) - linear.out_features
        hessian = options.pop("hessian", None)
        if hessian is not None:
            # Inputs that are always zero, as the padding is.
            options["hessian"] = functional.pad(hessian, (0, pad_k, 0, pad_k))
        weight = functional.pad(linear.weight.detach(), (0, pad_k, 0, pad_n))
        quantized = quantize_weight(weight, group_size, method, **options)
        return cls.from_quantized(quantized, linear.bias, linear.in_features, linear.out_features)

    @classmethod
    def from_quantized(
        cls,
        weight: QQQWeight,
        bias: Tensor | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> QQQLinear:
        """A layer around a packed weight.

        Args:
            weight: the packed weight; its tensors are used, not copied, unless they are slices that lie apart.
            bias: floating point ``[out_features]``; copied.
            in_features, out_features: when the weight is padded, the sizes without the padding.

        Raises:
            TypeError, ValueError: tensors that do not form a QQQWeight, sizes that do not belong to the weight.
            RuntimeError: scales that are NaN or infinite, a bias of another shape or dtype.

        Example:
            >>> layer = marlin_qqq.QQQLinear.from_quantized(marlin_qqq.repack_gptq(qweight, qzeros, scales, g_idx))
        """
        weight = QQQWeight(*weight)
        check_weight(weight)
        layer = cls(
            weight.in_features if in_features is None else in_features,
            weight.out_features if out_features is None else out_features,
            bias=bias is not None,
            group_size=weight.group_size,
            device="meta",
        )
        state = {name: tensor.contiguous() for name, tensor in weight._asdict().items()}
        if bias is not None:
            state["bias"] = bias.detach().clone()
        layer.load_state_dict(state, assign=True)
        return layer

    def quantized_weight(self) -> QQQWeight:
        """The packed weight, with its padding: the layer's own tensors."""
        return QQQWeight(self.B, self.s_channel, self.s_group)

    def dequantize(self) -> Tensor:
        """The weight that the layer stands for: fp32 ``[out_features, in_features]``, without the padding."""
        return dequantize_weight(self.quantized_weight())[: self.out_features, : self.in_features].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: fp16, bf16 or fp32 ``[..., in_features]``, any strides, possibly empty, on the layer's device.

        Returns:
            ``[..., out_features]``, contiguous, in the dtype of x. A token that holds NaN or an infinity gives NaN.

        Raises:
            TypeError: the dtype of x.
            ValueError: its last dimension.
            RuntimeError: its device.
        """
        if x.dtype not in _ACTIVATION_DTYPES:
            raise TypeError(f"x is {x.dtype}; it must be float16, bfloat16 or float32")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {list(x.shape)}; the last dimension must be in_features = {self.in_features}"
            )
        output_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
        padding = self.padded_in_features - self.in_features
        y = marlin_qqq_linear(
            functional.pad(x, (0, padding)) if padding else x,  # zeros change no token's scale
            self.B,
            self.s_channel,
            self.s_group,
            bias=self._output_bias(output_dtype),
            out_dtype=output_dtype,
            constant_weights=True,
        )
        if self.padded_out_features != self.out_features:
            y = y[..., : self.out_features].contiguous()
        return y.to(x.dtype)

    def _output_bias(self, output_dtype: torch.dtype) -> Tensor | None:
        """The bias as the op takes it: in the output's dtype, with the output's padding."""
        if self.bias is None:
            return None
        bias = self.bias.to(output_dtype)
        if self.padded_out_features == self.out_features:
            return bias
        return functional.pad(bias, (0, self.padded_out_features - self.out_features))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QQQLinear:
        """Device moves reach every buffer, dtype conversions only the bias: the other buffers pass as bare integers."""
        fixed: dict[str, Tensor] = {}
        for name in _FIXED_DTYPES:
            fixed[name] = getattr(self, name)
            self._buffers[name] = None  # skipped by nn.Module
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, integer_dtype in _FIXED_DTYPES.items():
                bits = fixed[name].view(integer_dtype)
                moved = fn(bits)
                if moved.dtype != integer_dtype:  # .type(dtype) converts integers too
                    moved = bits.to(moved.device)
                fixed[name] = moved.view(fixed[name].dtype)
        finally:
            self._buffers.update(fixed)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Checks what is loaded, and repairs columns whose int8 weight would wrap around, with a warning."""
        if self.group_size == PER_CHANNEL:
            # Per-channel files hold no group scales, or an empty tensor of some shape.
            stored = state_dict.get(prefix + "s_group")
            if stored is None or stored.numel() == 0:
                device = state_dict.get(prefix + "B", self.B).device
                state_dict[prefix + "s_group"] = torch.empty(0, dtype=torch.float16, device=device)
        try:
            self._check_state(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        name = prefix.removesuffix(".") or type(self).__name__
        for key in (*QQQWeight._fields, "bias"):
            stored, own = state_dict.get(prefix + key), self._buffers[key]
            if stored is None or own is None:
                continue
            if stored.shape != own.shape:
                raise ValueError(f"{name}: {key} has shape {list(stored.shape)}; {self!r} needs {list(own.shape)}")
            if key == "bias" and not stored.is_floating_point():
                raise TypeError(f"{name}: bias is {stored.dtype}; it must be floating point")
        keys = [prefix + key for key in QQQWeight._fields]
        if any(key not in state_dict for key in keys):
            return  # reported as missing
        weight = QQQWeight(*(state_dict[key] for key in keys))
        check_weight(weight, name)
        if weight.B.is_meta:
            return
        weight, repaired = check_and_repair(weight, name)
        if repaired:
            warnings.warn(
                f"{name}: repaired {len(repaired)} of {weight.out_features} columns whose int8 weight would have "
                f"wrapped around (the first is {repaired[0]})",
                stacklevel=2,
            )
        for key, tensor in weight._asdict().items():
            state_dict[prefix + key] = tensor
