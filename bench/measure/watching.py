"""What runs in a `with` block: every operator below autograd, and the module whose forward pass it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Call `seen(operator, arguments, keywords, result)` after each operator.

    instead: runs an operator in another way, whose operators are watched in its place, and returns the result;
    NotImplemented where the operator is to run itself.
    """

    def __init__(
        self, seen: Callable[..., object], instead: Callable[..., Any] = lambda *_call: NotImplemented
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self._seen, self._instead = seen, instead

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        with self:
            result = self._instead(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._seen(func, args, kwargs, result)
        return result


class Layers:
    """`layer` is the name of the innermost module that runs, of those that have one: `names`, by the module's id.

    top: what it is outside of any. left: is told a module's id and what it returns, whenever one ends. The hooks are
    on all modules there are: a ScriptModule takes none of its own, and a module that sees hooks of its own may take
    another way (MultiheadAttention's in one piece).
    """

    def __init__(
        self, names: Mapping[int, str], top: str = "", left: Callable[[int, object], object] = lambda *_end: None
    ) -> None:  # fmt: skip
        self._names, self._left = names, left
        self._stack = [top]

    @property
    def layer(self) -> str:
        """The innermost module's name."""
        return self._stack[-1]

    def _enter(self, module: nn.Module, _inputs: object) -> None:
        self._stack.append(self._names.get(id(module), self.layer))

    def _leave(self, module: nn.Module, _inputs: object, output: object) -> None:
        self._stack.pop()
        self._left(id(module), output)

    def __enter__(self) -> Self:
        """Begin to follow."""
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_error: object) -> None:
        """Let go."""
        for hook in self._hooks:
            hook.remove()
