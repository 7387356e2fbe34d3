"""What a CUDA graph does, on a CPU: the operations of a step on the memory they touched, without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
WAIT = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.lift_fresh.default)
"""Numbers that Python asks for, shapes that depend on numbers, tensors made of Python's numbers."""


class Recorder(TorchDispatchMode):
    """The operations inside, and what was in the tensors from outside before one wrote to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.outside: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and keep it."""
        kwargs = kwargs or {}
        if operation in WAIT:
            raise RuntimeError(f"{operation} waits for the host")
        for argument, tensor in zip(operation._schema.arguments, args, strict=False):
            if argument.is_write:
                self.outside.append((tensor, tensor.clone()))
        result = operation(*args, **kwargs)
        self.calls.append((operation, args, kwargs, result))
        return result


class Recording:
    """A recording that is begun and ended by hand. Like a capture, it leaves everything as it was."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def begin(self) -> None:
        self.recorder.__enter__()

    def end(self) -> None:
        self.recorder.__exit__(None, None, None)
        for tensor, before in reversed(self.recorder.outside):
            tensor.copy_(before)

    def replay(self) -> None:
        made: dict[int, Any] = {}

        def now(value: Tensor) -> Tensor:
            return made.get(id(value), value)

        for operation, args, kwargs, result in self.recorder.calls:
            args, kwargs = tree_map_only(Tensor, now, (args, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                made[id(old)] = new


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """In place of `CudaGraph`.

    Raises:
        RuntimeError: the step waits for the host somewhere.
    """
    recording = Recording()
    recording.begin()
    try:
        step()
    finally:
        recording.end()
    return recording.replay
