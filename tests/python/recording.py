"""What an op is called with."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class RecordedCalls(TorchDispatchMode):
    """Inside the block every call of a marlin_qqq op is noted, as a pair: its name, and its arguments by name.

    Arguments that were left out have their default, so a test sees what the op sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of one op."""
        return [arguments for called, arguments in self.calls if called == name]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "marlin_qqq":
            arguments = {argument.name: argument.default_value for argument in function._schema.arguments}
            names = [argument.name for argument in function._schema.arguments]
            arguments |= dict(zip(names, args, strict=False)) | kwargs
            self.calls.append((function._opname, arguments))
        return function(*args, **kwargs)
