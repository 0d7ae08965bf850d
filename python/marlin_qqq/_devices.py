"""Which devices a command or a function may be given."""

from __future__ import annotations


class NoDevice(ValueError):
    """The device that was asked for is not there; the message says so and what to do."""


def check_device(device: str) -> str:
    """``device`` made definite ("auto" becomes cuda or cpu). Raises NoDevice where it is not there.

    Example:
        >>> check_device("cpu")
        'cpu'
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise NoDevice(
            f"device is {device!r}, but there is no GPU here ({reason}); use --device cpu for the CPU kernels"
        )
    if device.startswith("cuda"):
        index = device.partition(":")[2] or str(torch.cuda.current_device())
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise NoDevice(f"device is {device!r}; this machine's GPUs are cuda:0 to cuda:{last}")
        return f"cuda:{index}"
    if device != "cpu":
        raise NoDevice(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:INDEX")
    return device
