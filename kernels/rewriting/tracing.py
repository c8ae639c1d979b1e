"""What a model calls, as a torch.fx graph, also where only parts of its Python can be followed.

`trace` differs from `torch.fx.symbolic_trace`: it takes one mode for granted, evaluation unless told otherwise, leaves
arguments with a default at it where they are not asked for, and calls what it cannot follow as it is, with the reason.
Python that asks for the type of a tensor sees a Proxy, as everywhere in torch.fx; where strict, isinstance is refused.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

WRITING = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
LIBRARY = ("torch.nn.", "torch.ao.nn.")
ASKING = ("torch.jit", "torch._jit_internal")  # parts of torch that ask for types on behalf of users


@dataclass(frozen=True, slots=True)
class Traced:
    """What a module does in one mode when it is given certain arguments, and no others.

    inlined: names of the submodules whose Python the graph stands for. opaque: names of those that it calls as they
    are because theirs cannot be followed, and why.
    """

    graph: fx.Graph
    inlined: tuple[str, ...]
    opaque: dict[str, str]


def trace(
    root: nn.Module,
    *,
    whole: Callable[[nn.Module], bool] = lambda _module: False,
    training: bool = False,
    given: Sequence[str] | None = None,
    strict: bool = False,
) -> Traced:
    """Follow a module's Python; ValueError with the reason where that is not possible.

    Submodules that cannot be followed become opaque, and with them all others of their class. whole: whether to call a
    submodule as it is for another reason. training: the mode. given: names of the arguments; None for those that have
    no default. strict: refuse Python that does what no graph repeats: switch gradients, autocast or what is saved for
    backward, keep values on the module, or decide by the type of what it is given. Tracing may set attributes of the
    module: give it a twin.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(whole, opaque, given, strict=strict)
        try:
            with in_mode(root, training=training), _left_alone(root, strict=strict):
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


def given_of(forward: Callable[..., Any]) -> list[tuple[str, ...]]:
    """Return the sets of arguments that graphs can be for: those that have no default, and all if there are others."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    every = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return list(dict.fromkeys((tuple(required(forward)), tuple(every))))


def is_layer(module: nn.Module) -> bool:
    """Whether a module does what one of PyTorch's own does: the units that patterns are made of."""
    where = getattr(type(module).forward, "__module__", None) or ""
    library = where.startswith(LIBRARY) and not isinstance(module, nn.Sequential)
    return library or isinstance(module, torch.jit.ScriptModule)


def more_than_forward(module: nn.Module, *, gradients: bool = False) -> str:
    """Say what a call of the module does beside the forward of its class; empty where nothing.

    gradients: whether what it does in backward counts.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return "it has hooks" if hooked(module, gradients=gradients) else ""


def hooked(module: nn.Module, *, gradients: bool = False) -> bool:
    """Whether somebody listens to calls of the module, or also to gradients that pass it."""
    calls = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 - no public name
    return bool(calls or (gradients and (module._backward_hooks or module._backward_pre_hooks)))  # noqa: SLF001


def _followed(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    if "forward" in root.__dict__:
        raise ValueError(more_than_forward(root))
    return tracer.trace(root)


@contextmanager
def in_mode(root: nn.Module, *, training: bool) -> Iterator[None]:
    """Put modules into a mode, without calling what they make of `train()` and `eval()`, and back again."""
    modes = [(module, module.training) for module in root.modules()]
    for module, _ in modes:
        module.training = training
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def _left_alone(root: nn.Module, *, strict: bool) -> Iterator[None]:
    """Where strict, put back what forward set on the modules, and raise ValueError for it."""
    before = [(module, module.__dict__.copy()) for module in root.modules()] if strict else []
    try:
        yield
    finally:
        kept = [key for module, held in before for key in _differing(held, module.__dict__)]
        for module, held in before:
            module.__dict__.clear()
            module.__dict__.update(held)
    if kept:
        message = f"its forward keeps {kept[0]} on the module, which a graph would not"
        raise ValueError(message)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) is not other.get(key)]


def _surroundings() -> tuple[Any, ...]:
    """Return what decides how PyTorch runs a call besides the call itself, as far as a graph does not hold it."""
    casts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: SLF001 - no public name
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, *casts


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
    """Records `x += y` as the write that it is: torch.fx itself makes `x = x + y` of it, and others miss the change.

    isinstance(x, Tensor) would be False: of a strict tracer, who asks gets an error instead, except torch itself.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance reads
        """The class, unless Python of others asks."""
        name = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001 - as in the standard library
        ours = name == __name__ or (name.startswith("torch.") and not name.startswith(ASKING))
        if cast("_Tracer", self.tracer).around is not None and not ours:
            message = "its Python asks for the type of what it is given"
            raise ValueError(message)
        return type(self)


def _writing(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in WRITING:
    setattr(_Proxy, f"__{_function.__name__}__", _writing(_function))


class _Tracer(fx.Tracer):
    def __init__(
        self, whole: Callable[[nn.Module], bool], opaque: dict[str, str], given: Sequence[str] | None, *, strict: bool
    ) -> None:
        super().__init__()
        self.whole, self.opaque, self.given = whole, opaque, given
        self.around = _surroundings() if strict else None
        self.inlined: dict[str, None] = {}  # in order, each once

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:  # noqa: ARG002 - torch.fx's signature
        names = required(root_fn) if self.given is None else self.given
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_layer(m) or self.whole(m):
            return True
        if module_qualified_name not in self.opaque and (
            reason := more_than_forward(m, gradients=self.around is not None)
        ):
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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.around is not None and self.around != _surroundings():
            message = "it switches gradients, autocast or what is saved for backward inside, which a graph would lose"
            raise ValueError(message)
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            message = "it makes a tensor that depends on no argument, and may be another in the next call"
            raise ValueError(message)
        return super().create_arg(a)

    def _is_attribute(self, x: Tensor) -> bool:
        return x in self.tensor_attrs or any(x is each for each in self.root.buffers())
