"""A user's model with another forward: the same layers, names and tensors, called as a changed graph says.

`twin` copies a model's modules but none of its tensors; `rewire` makes one of them run a graph. It keeps its class, as
a subclass: attributes, methods, state_dict are what they were, and its own forward runs wherever the graph would not
do the same. Nothing is registered, so nothing shows in named_modules or in a checkpoint.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from skipcost.kernels.prepack import ATTRIBUTE
from skipcost.kernels.tracing import Traced, hooked, required, trace

SHARED = {"_parameters", "_buffers", "_non_persistent_buffers_set"}
Pass = Callable[[nn.Module], object]


class Rewired(nn.Module):
    """What modules with a graph of their own have in common; `rewire` makes subclasses of it and of their class.

    traced: what runs. watched: names of all modules whose work the graph does. tools: what the graph reads from the
    module by name besides its layers. passes: each does again to a module that was loaded what made it this one.
    """

    traced: ClassVar[Traced]
    watched: ClassVar[tuple[str, ...]]
    tools: ClassVar[Mapping[str, object]]
    passes: ClassVar[tuple[Pass, ...]]

    def train(self, mode: bool = True) -> Self:  # noqa: FBT002 - torch's signature
        """Change the mode, as of any module; what was written to weights through .data shows from then on."""
        for module in self.modules():
            module.__dict__.pop(ATTRIBUTE, None)
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as what it was, to be rewired again on arrival: no generated code is stored."""
        state = {name: value for name, value in self.__dict__.items() if name != "_watched"}
        return _bare, (_base(type(self)), self.passes), state


def twin(model: nn.Module) -> nn.Module:
    """Copy a model: modules of its own, with hooks and a mode of their own, over the very same tensors.

    What is moved, loaded, trained or replaced among the tensors of one is so in the other.
    """
    copies: dict[int, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module  # its state is not in Python
        if id(module) in copies:
            return copies[id(module)]
        made = copies[id(module)] = object.__new__(type(module))
        made.__dict__.update(module.__dict__)
        for name in nn.Module().__dict__.keys() - SHARED:
            if isinstance(value := module.__dict__.get(name), dict | set):
                made.__dict__[name] = value.copy()
        made.__dict__.pop("_compiled_call_impl", None)  # it would call the original, compiled
        for name, child in module._modules.items():  # noqa: SLF001 - named_children leaves out a second name
            made._modules[name] = None if child is None else copy(child)
        if isinstance(made, Rewired):
            _watch(made)
        return made

    return copy(model)


def calls_of(module: nn.Module) -> Traced:
    """Return what a module of a twin calls, in a graph of the caller's own: `trace`, or what it was rewired to."""
    if not isinstance(module, Rewired):
        return trace(module, whole=lambda each: isinstance(each, Rewired))
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.traced.graph, {}))
    return Traced(graph, module.traced.inlined, module.traced.opaque)


def rewire(
    module: nn.Module,
    traced: Traced,
    absorbed: Sequence[str],
    again: Pass,
    *,
    title: str,
    tools: Mapping[str, object],
) -> None:
    """Let a module of a twin run the graph from now on, wherever its own forward would do the same.

    That is: in evaluation, where no gradient is asked for, given the arguments that have no default, outside of any
    tracing and compiling. absorbed: names of layers that the graph does the work of, or leaves out; they and what is
    inlined must be in evaluation and without hooks. again, tools: see `Rewired`. title: goes in front of the name of
    the class. Results are contiguous where all arguments are, whatever the layout of maps in between.
    """
    kind = type(module)
    before = module if isinstance(module, Rewired) else None
    base, name = _base(kind), f"{title}{kind.__name__}"
    body = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "forward": _guarded(base.forward, _compiled(traced.graph, name)),
        "traced": traced,
        "watched": (*(before.watched if before else traced.inlined), *absorbed),
        "tools": tools,
        "passes": (*(before.passes if before else ()), again),
        **tools,
    }
    module.__class__ = type(name, (Rewired, base), body)
    _watch(module)


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class as the user wrote it."""
    return kind.__bases__[1] if issubclass(kind, Rewired) else kind


def _watch(module: Any) -> None:
    module.__dict__["_watched"] = tuple(module.get_submodule(name) for name in module.watched)


def _bare(base: type[nn.Module], passes: tuple[Pass, ...]) -> nn.Module:
    """Return an object that waits for its state; with it, it is of class `base` and goes through the passes."""

    def arrive(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = base
        self.__setstate__(state)
        for each in passes:
            each(self)

    made: nn.Module = object.__new__(type(base.__name__, (base,), {"__setstate__": arrive}))
    return made


def _guarded(original: Callable[..., Any], rewired: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that chooses between the original and the rewired one in each call."""
    names = required(original)

    @wraps(original)
    def forward(self: Rewired, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        as_traced = len(given) == len(names) == len(args) + len(kwargs)
        if not as_traced or not _may_run(self, given):
            return original(self, *args, **kwargs)
        with torch.no_grad():
            result = rewired(self, *given)
        return tree_map(_contiguous, result) if dense(*given) else result

    return forward


def _may_run(module: Rewired, given: Sequence[Any]) -> bool:
    """Whether the graph does, now, what the module's own forward would do."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch's
        return False  # compilers fuse by themselves, and what is exported should need nothing of ours
    if any(isinstance(each, fx.Proxy) or (isinstance(each, Tensor) and type(each) is not Tensor) for each in given):
        return False
    if module.training or any(each.training or hooked(each) for each in module.__dict__["_watched"]):
        return False
    asked = torch.is_grad_enabled() and any(
        each.requires_grad for each in (*given, *module.parameters()) if isinstance(each, Tensor)
    )
    if asked:
        message = (
            f"{type(module).__name__} runs as the original where gradients may be asked for: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=5)  # the caller of module(...)
    return not asked


def dense(*given: Any) -> bool:
    """Whether all maps among the arguments are contiguous: then .view of callers may rely on it for results."""
    return all(each.is_contiguous() for each in given if isinstance(each, Tensor))


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Return the graph as a function of the module and its arguments, whose lines tracebacks can show."""
    code = graph.python_code("self")
    file = f"<forward of {name} {id(graph):x}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    scope = dict(code.globals)
    exec(compile(code.src, file, "exec"), scope)  # noqa: S102 - as torch.fx.GraphModule does
    made: Callable[..., Any] = scope["forward"]
    return made
