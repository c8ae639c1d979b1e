"""`rewrite(model)` and `fuse(model)`: a model of the user's own at fewer MACs, or in fewer passes over memory.

It is a new module over the same parameters whose forward is compiled by a backend of `torch.compile`, so that modes,
attributes, replaced blocks and sizes are the model's in each call (docs/rewritten.md).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.kernels.rewriting.places import Choose, folded_or_dispatched
from skipcost.kernels.rewriting.twin import twin
from skipcost.kernels.weights import ATTRIBUTE
from skipcost.unet_models.network import SkipNet
from skipcost.unet_models.rewriting import flat

# Where PyTorch knows it, each model's graphs count for themselves towards the limit of graphs for one Python function
ISOLATED: dict[str, Any] = dict.fromkeys(
    {"isolate_recompiles"} & inspect.signature(torch.compile).parameters.keys(), True
)

WHY = "in the form that is cheaper for the maps of each call"
BROKEN = Change(("the model",), "forward", "", "it goes on in a module of its own behind a break of the graph")
KNOWN = (Tensor, nn.Parameter)


def rewrite(model: nn.Module, *example: Any) -> tuple[nn.Module, list[Change]]:
    """Return a model that computes the same with fewer MACs, and what becomes of each up-sampling in it.

    model: any module of Python; it is not changed. The returned one is of its class, has modules of its own over the
    very same parameters and buffers, under the same names, and a mode, hooks and attributes of its own: what is
    trained or loaded in one is in the other. Copied, pickled and saved it stays rewritten; torch.compile, torch.export,
    torch.jit, torch.fx, torch.func and dispatch modes, such as FlopCounterMode, see the model's own operators.
    example: what the model takes. With one it is compiled at once, in evaluation; else by its first call, which takes
    seconds, as does each that differs in mode or in what Python reads. Only then is the list filled.

    The function is the same in inference and in training, gradients included, differentiable once. Transposed
    convolutions are composed under torch.no_grad() or torch.inference_mode() alone.
    ValueError for what is no module of Python, or where modules cannot be told apart from the model's (`twin`).
    """
    return _running(model, "rewrite", Forms(low=True), example)


def fuse(
    model: nn.Module, *example: Any, choose: Choose = folded_or_dispatched
) -> tuple[nn.Module, list[Change]]:  # fmt: skip
    """Return a model that computes the same with fewer passes over memory, and what becomes of each place of it.

    At inference: a convolution runs with the batch norm, ReLU and pool behind it and the concatenation in front of it,
    on a GPU in our kernels where they win; where gradients may be asked for, the model's own operators run, with a
    warning. Maps are channels_last in between; results are laid out as the model's. model, example, errors and what is
    returned: as of `rewrite`; a model can be both.
    choose: takes a call and one of the maps that it reads, and names the implementation: "triton" or "tma" for the
    kernels, "cudnn" for PyTorch's convolution with the norm folded, "reference" for the layers one by one.
    """
    return _running(model, "fuse", Forms(choose=choose), example)


@dataclass(frozen=True, slots=True)
class Forms:
    """What is done to a graph. low: convolutions over up-sampled maps; choose: blocks, where it is given."""

    low: bool = False
    choose: Choose | None = None

    def and_of(self, other: Forms) -> Forms:
        """Return what does both."""
        return Forms(self.low or other.low, self.choose or other.choose)


def _running(
    model: Any, caller: str, forms: Forms, example: tuple[Any, ...]
) -> tuple[nn.Module, list[Change]]:  # fmt: skip
    if not isinstance(model, nn.Module):
        message = f"{caller} got a {type(model).__name__}, whose code it cannot follow: give it an nn.Module of Python"
        raise ValueError(message)  # noqa: TRY004 - all input that is refused raises ValueError
    made = twin(model)
    changes = [
        change for name, each in made.named_modules() if isinstance(each, SkipNet) for change in _on(each, forms, name)
    ]
    if isinstance(made, SkipNet):
        return made, changes
    own: Any = made.__dict__.get("forward")
    if isinstance(own, Running):
        own, forms = own.own, forms.and_of(own.forms)
    running = Running(made, own, forms, changes)
    made.__dict__["forward"] = running
    if example:
        _compile(made, example)
    return made, running.changes


def _on(network: SkipNet, forms: Forms, name: str) -> Iterator[Change]:
    """Let a network of the suite run the program of the backend, and say what stands for several ops."""
    network.use(RewrittenOps().ops() if forms.choose is None else FusedOps(forms.choose).ops())
    for op in network.program.ops:
        if op.parts:
            parts = list(flat(op))
            where = (".".join(filter(None, (name, each.where, each.part))) for each in parts)
            yield Change(tuple(where), " -> ".join(each.kind for each in parts), op.kind, WHY)


def _compile(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Run a model once in evaluation, which writes no statistics, and leave all modes as they were."""
    modes = {each: each.training for each in model.modules()}
    for each in modes:  # a train() of the user's own may do more
        each.training = False
    try:
        model(*example)
    finally:
        for each, training in modes.items():
            each.training = training


class Running:
    """The forward of a module that `rewrite` made: its own, compiled by the backend when it is first called.

    own: a forward that was set on the object; None for that of its class. changes: what became of each place so far.
    A copy or a pickle is compiled anew.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None, forms: Forms, changes: list[Change]) -> None:
        self.module, self.own, self.forms, self.changes = module, own, forms, list(changes)
        self._compiled: Callable[..., Any] | None = None
        self._restore: Callable[[], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's own forward does."""
        if torch.compiler.is_compiling() or _seen_through((*args, *kwargs.values())):
            return self.own(*args, **kwargs) if self.own else type(self.module).forward(self.module, *args, **kwargs)
        if self.forms.choose is not None and self.module.training:
            self._forget()
        if self._compiled is None:
            own = weakref.ref(self)  # Dynamo keeps a backend for good, and what holds on to the weights with it
            self._compiled = torch.compile(
                self.__wrapped__,
                backend=lambda *given: cast("Running", own())._rewrite(*given),  # noqa: SLF001 - its own
                **ISOLATED,
            )
        try:
            return self._compiled(*args, **kwargs)
        finally:
            if self._restore is not None:
                self._restore()
                self._restore = None

    def _rewrite(self, module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        """Be the backend, and have hooks guarded, too, which by default Dynamo ignores if they come later."""
        from torch._dynamo import config  # noqa: PLC0415 - loads Dynamo
        from torch._dynamo.symbolic_convert import InstructionTranslator  # noqa: PLC0415 - as above

        from skipcost.kernels.rewriting.blocks import fuse_graph  # noqa: PLC0415 - as above
        from skipcost.kernels.rewriting.graph import rewrite_graph  # noqa: PLC0415 - as above

        changes = rewrite_graph(module.graph) if self.forms.low else []
        if self.forms.choose is not None:
            roots = _called(InstructionTranslator.current_tx().output.local_scope, self.module)
            find, ops = _finder(self.module), FusedOps(self.forms.choose)
            changes += fuse_graph(module.graph, roots, find, ops) if roots else [BROKEN]
        for change in changes:
            self._note(change)
        module.recompile()
        if self._restore is None:
            self._restore = partial(setattr, config, "skip_nnmodule_hook_guards", config.skip_nnmodule_hook_guards)
        config.skip_nnmodule_hook_guards = False  # guards are made next
        run: Callable[..., Any] = module.forward
        return run

    def _forget(self) -> None:
        """Drop what inference made of weights: writes through .data, as in training, leave no trace."""
        for each in self.module.modules():
            each.__dict__.pop(ATTRIBUTE, None)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own forward, whose signature this has."""
        return self.own or MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> Any:
        """Where torch.export says that it is."""
        return inspect.unwrap(self.__wrapped__).__code__

    def _note(self, change: Change) -> None:
        """Keep what is known last of a place: it is compiled again for another mode or other sizes."""
        same = (change.where, change.before, change.after)
        self.changes[:] = [each for each in self.changes if (each.where, each.before, each.after) != same] + [change]

    def __reduce__(self) -> tuple[type[Running], tuple[Any, ...]]:
        """Copy and pickle by what it was made of."""
        return Running, (self.module, self.own, self.forms, self.changes)


def _called(scope: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """Return what Dynamo calls a model whose Python, or a method of which, is among the variables of a frame."""
    own = [f"L['{name}']" for name, value in scope.items() if value is model]
    methods = (name for name, value in scope.items() if getattr(value, "__self__", None) is model)
    return (*own, *(f"L['{name}'].__self__" for name in methods))


def _finder(model: nn.Module) -> Callable[[str], nn.Module]:
    """Return what gives the module that is at a path now, KeyError where none is; it keeps no weights alive."""
    root = weakref.ref(model)

    def find(path: str) -> nn.Module:
        found: Any = root()
        for name in path.split(".") if path else ():
            found = found._modules[name]  # noqa: SLF001 - get_submodule asks more
        return cast("nn.Module", found)

    return find


def _seen_through(given: Iterable[Any]) -> bool:
    """Whether somebody traces, transforms or watches this call, who is to see the model's own operators.

    Dynamo itself compiles nothing under a dispatch mode, and would not try again afterwards.
    """
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:  # type: ignore[attr-defined, no-untyped-call]  # noqa: SLF001 - no public name
        return True
    if any(type(each) not in KNOWN for each in given if isinstance(each, Tensor | fx.Proxy)):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001 - no public names
