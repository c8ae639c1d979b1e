"""A user's model with another forward: the same layers, names and tensors, called as a changed graph says.

`twin` copies a model's modules but none of its tensors; `rewire` makes one of them run graphs, each a `Route` for the
arguments and the mode that it was traced with. It keeps its class, as a subclass: attributes, methods, state_dict are
what they were, and its own forward runs wherever no graph would do the same. Nothing is registered, so nothing shows in
named_modules or in a checkpoint.
"""

from __future__ import annotations

import inspect
import linecache
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from skipcost.kernels.rewriting.tracing import Traced, hooked, required, trace
from skipcost.kernels.weights import ATTRIBUTE

SHARED = {"_parameters", "_buffers", "_non_persistent_buffers_set"}
Pass = Callable[[nn.Module], object]


@dataclass(frozen=True, slots=True)
class Route:
    """A graph for a module to run, and when it does what the module's own forward would do.

    absorbed: names of layers that the graph does the work of, or leaves out; they and what is inlined must have no
    hooks. given: names of the arguments that it is for; None for those that have no default. training: the mode that
    all of these modules must be in; None where that makes no difference. gradients: whether it may run where gradients
    are asked for.
    """

    traced: Traced
    absorbed: tuple[str, ...]
    given: tuple[str, ...] | None = None
    training: bool | None = False
    gradients: bool = False


class Rewired(nn.Module):
    """What modules with graphs of their own have in common; `rewire` makes subclasses of it and of their class.

    routes: what runs. watched: for each route the names of all modules whose work it does. tools: what graphs read from
    the module by name besides its layers. passes: each does again to a module that was loaded what made it this one.
    """

    routes: ClassVar[tuple[Route, ...]]
    watched: ClassVar[tuple[tuple[str, ...], ...]]
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
        return trace(module, whole=lambda each: isinstance(each, Rewired), strict=True)
    if len(module.routes) > 1 or module.routes[0].gradients:
        message = "it was rewritten, and what runs in training too is not changed once more"
        raise ValueError(message)
    (traced,), graph = (route.traced for route in module.routes), fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    return Traced(graph, traced.inlined, traced.opaque)


def rewire(
    module: nn.Module, routes: Sequence[Route], again: Pass, *, title: str, tools: Mapping[str, object] | None = None
) -> None:  # fmt: skip
    """Let a module of a twin run the graphs from now on, wherever its own forward would do the same.

    That is: outside of any tracing, compiling and transforming, and as each `Route` says. again, tools: see `Rewired`.
    title: goes in front of the name of the class. Where no gradients are asked for by design, results are contiguous
    where all arguments are, whatever the layout of maps in between.
    """
    kind = type(module)
    before = module if isinstance(module, Rewired) else None
    base, name = _base(kind), f"{title}{kind.__name__}"
    seen = [before.watched[0] if before else route.traced.inlined for route in routes]
    body = {
        "__module__": __name__,
        "__doc__": base.__doc__,
        "forward": _guarded(base.forward, [(route, _compiled(route.traced.graph, name)) for route in routes]),
        "routes": tuple(routes),
        "watched": tuple((*names, *route.absorbed) for names, route in zip(seen, routes, strict=True)),
        "tools": tools or {},
        "passes": (*(before.passes if before else ()), again),
        **(tools or {}),
    }
    module.__class__ = type(name, (Rewired, base), body)
    _watch(module)


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class as the user wrote it."""
    return kind.__bases__[1] if issubclass(kind, Rewired) else kind


def _watch(module: Any) -> None:
    module.__dict__["_watched"] = [tuple(map(module.get_submodule, names)) for names in module.watched]


def _bare(base: type[nn.Module], passes: tuple[Pass, ...]) -> nn.Module:
    """Return an object that waits for its state; with it, it is of class `base` and goes through the passes."""

    def arrive(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = base
        self.__setstate__(state)
        for each in passes:
            each(self)

    made: nn.Module = object.__new__(type(base.__name__, (base,), {"__setstate__": arrive}))
    return made


def _guarded(original: Callable[..., Any], graphs: Sequence[tuple[Route, Callable[..., Any]]]) -> Callable[..., Any]:
    """Return the forward that chooses between the original and the graphs in each call."""
    needed = tuple(required(original))
    parameters = list(inspect.signature(original).parameters.values())[1:]
    order = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

    @wraps(original)
    def forward(self: Rewired, *args: Any, **kwargs: Any) -> Any:
        bound = _bound(order, defaults, args, kwargs)
        for index, (route, graph) in enumerate(graphs):
            names = needed if route.given is None else route.given
            if bound is None or bound.keys() != set(names) or not _may_run(self, index, list(bound.values())):
                continue
            given = [bound[name] for name in names]
            if route.gradients:
                return graph(self, *given)
            with torch.no_grad():
                result = graph(self, *given)
            return tree_map(_contiguous, result) if dense(*given) else result
        return original(self, *args, **kwargs)

    return forward


def _bound(
    order: Sequence[str], defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what a call gives by name, without what is the default anyway.

    None where a graph cannot be for it: too many arguments, or one by which Python may have decided something, which
    is None, True or False, or no tensor in place of a default.
    """
    if len(args) > len(order):
        return None
    bound = {**dict(zip(order, args, strict=False)), **kwargs}
    told = {name: value for name, value in bound.items() if name not in defaults or not _equal(value, defaults[name])}
    deciding = any(value is None or isinstance(value, bool) for value in told.values())
    plain = all(isinstance(value, Tensor) for name, value in told.items() if name in defaults)
    return None if deciding or not plain else told


def _equal(value: Any, default: Any) -> bool:
    plain = type(value) is type(default) and isinstance(value, bool | int | float | str)
    return value is default or (plain and value == default)


def _may_run(module: Rewired, index: int, given: Sequence[Any]) -> bool:
    """Whether a graph does, now, what the module's own forward would do."""
    route, watched = module.routes[index], module.__dict__["_watched"][index]
    mode = route.training
    if mode is not None and (module.training != mode or any(each.training != mode for each in watched)):
        return False
    if _seen_through(route, given) or any(hooked(each, gradients=route.gradients) for each in watched):
        return False
    return route.gradients or not _asked(module, given)


def _seen_through(route: Route, given: Sequence[Any]) -> bool:
    """Whether somebody traces, compiles or transforms this call for whom the module's own forward is the right one."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined, no-untyped-call]  # torch's
        return True  # what is exported should need nothing of ours
    if any(isinstance(each, fx.Proxy) or (isinstance(each, Tensor) and type(each) is not Tensor) for each in given):
        return True
    if not route.gradients:
        return torch.compiler.is_compiling()  # compilers fuse by themselves
    # Our ops have a backward, and no rule for vmap and forward mode
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001 - no public names


def _asked(module: Rewired, given: Sequence[Any]) -> bool:
    """Whether gradients may be asked for, with a warning if so."""
    asked = torch.is_grad_enabled() and any(
        each.requires_grad for each in (*given, *module.parameters()) if isinstance(each, Tensor)
    )
    if asked:
        message = (
            f"{type(module).__name__} runs as the original where gradients may be asked for: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=6)  # the caller of module(...)
    return asked


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
