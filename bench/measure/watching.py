"""See every operator that a program dispatches, below autograd, once it has run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Inside a `with` block, call `seen(operator, arguments, result)` after each operator."""

    def __init__(self, seen: Callable[[Any, tuple[Any, ...], Any], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self._seen = seen

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._seen(func, args, result)
        return result
