"""What a model calls, as a torch.fx graph, also where only parts of its Python can be followed.

`trace` differs from `torch.fx.symbolic_trace`: it takes evaluation for granted, leaves arguments with a default at it,
and calls what it cannot follow as it is, with the reason. Python that asks for the type of a tensor sees a Proxy, as
everywhere in torch.fx.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

WRITING = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
LIBRARY = ("torch.nn.", "torch.ao.nn.")


@dataclass(frozen=True, slots=True)
class Traced:
    """What a module does in evaluation when it is given the arguments that have no default, and no others.

    inlined: names of the submodules whose Python the graph stands for. opaque: names of those that it calls as they
    are because theirs cannot be followed, and why.
    """

    graph: fx.Graph
    inlined: tuple[str, ...]
    opaque: dict[str, str]


def trace(root: nn.Module, *, whole: Callable[[nn.Module], bool] = lambda _module: False) -> Traced:
    """Follow a module's Python; ValueError with the reason where that is not possible.

    Submodules that cannot be followed become opaque, and with them all others of their class. whole: whether to call a
    submodule as it is for another reason. Tracing may set attributes of the module: give it a twin.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(whole, opaque)
        try:
            return Traced(_followed(tracer, root), tuple(tracer.inlined), opaque)
        except _FailedError as failed:
            kind = type(root.get_submodule(failed.name))
            opaque |= {name: str(failed) for name, each in root.named_modules() if type(each) is kind}
        except Exception as error:  # what runs is the Python of others
            raise ValueError(_why(error)) from error


def required(forward: Callable[..., Any]) -> list[str]:
    """Names of a method's arguments that have no default; ValueError for one that has to be given by keyword."""
    names = []
    for name, each in list(inspect.signature(forward).parameters.items())[1:]:
        if each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.kind is each.KEYWORD_ONLY:
            message = f"its argument {name} can only be given by keyword"
            raise ValueError(message)
        names.append(name)
    return names


def is_layer(module: nn.Module) -> bool:
    """Whether a module does what one of PyTorch's own does: the units that patterns are made of."""
    where = getattr(type(module).forward, "__module__", None) or ""
    library = where.startswith(LIBRARY) and not isinstance(module, nn.Sequential)
    return library or isinstance(module, torch.jit.ScriptModule)


def more_than_forward(module: nn.Module) -> str:
    """Say what a call of the module does beside the forward of its class; empty where nothing."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return "it has hooks" if hooked(module) else ""


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to calls of the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 - no public name


def _followed(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    if "forward" in root.__dict__:
        raise ValueError(more_than_forward(root))
    with evaluating(root):
        return tracer.trace(root)


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Put modules into evaluation, without calling what they make of `eval()`, and back again."""
    modes = [(module, module.training) for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _FailedError(Exception):
    """A submodule's Python could not be followed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(_why(error))
        self.name = name


def _why(error: Exception) -> str:
    """Say in words why torch.fx failed; in its own where there are no better ones."""
    if isinstance(error, fx.proxy.TraceError):
        return "its Python decides by values or shapes of tensors"
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class _Proxy(fx.Proxy):
    """Records `x += y` as the write that it is: torch.fx itself makes `x = x + y` of it, and others miss the change."""


def _writing(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in WRITING:
    setattr(_Proxy, f"__{_function.__name__}__", _writing(_function))


class _Tracer(fx.Tracer):
    def __init__(self, whole: Callable[[nn.Module], bool], opaque: dict[str, str]) -> None:
        super().__init__()
        self.whole, self.opaque = whole, opaque
        self.inlined: dict[str, None] = {}  # in order, each once

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:  # noqa: ARG002 - torch.fx's signature
        names = required(root_fn)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_layer(m) or self.whole(m):
            return True
        if module_qualified_name not in self.opaque and (reason := more_than_forward(m)):
            self.opaque[module_qualified_name] = reason
        return module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.inlined[name] = None
        try:
            return super().call_module(m, forward, args, kwargs)
        except _FailedError:
            raise
        except Exception as error:  # what runs is the Python of others
            raise _FailedError(name, error) from error

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            message = "it makes a tensor that depends on no argument, and may be another in the next call"
            raise ValueError(message)
        return super().create_arg(a)

    def _is_attribute(self, x: Tensor) -> bool:
        return x in self.tensor_attrs or any(x is each for each in self.root.buffers())
