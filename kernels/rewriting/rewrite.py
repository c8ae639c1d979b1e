"""`rewrite(model)`: a model of the user's own, with convolutions over up-sampled maps at low resolution, exactly.

It is a new module over the same parameters whose forward is compiled by the backend of `torch.compile` that is in
`backend`, so that modes, attributes, replaced blocks and sizes are the model's in each call (docs/rewritten.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.kernels.rewriting.twin import twin
from skipcost.unet_models.network import SkipNet
from skipcost.unet_models.rewriting import flat

# Where PyTorch knows it, each model's graphs count for themselves towards the limit of graphs for one Python function
ISOLATED = {each: True for each in ("isolate_recompiles",) if each in inspect.signature(torch.compile).parameters}

WHY = "in each call for which that counts fewer MACs"
KNOWN = (Tensor, nn.Parameter)


def rewrite(model: nn.Module, *example: Any) -> tuple[nn.Module, list[Change]]:
    """Return a model that computes the same with fewer MACs, and what becomes of each up-sampling in it.

    model: any module of Python; it is not changed. The returned one is of its class, has modules of its own over the
    very same parameters and buffers, under the same names, and a mode, hooks and attributes of its own: what is
    trained or loaded in one is in the other. Copied, pickled and saved it stays rewritten; torch.compile, torch.export,
    torch.jit, torch.fx, torch.func and dispatch modes, such as FlopCounterMode, see the model's own operators.
    example: what the model takes. With one it is compiled at once, in evaluation; else by its first call, which takes
    seconds, as does each that differs in mode or in what Python reads. Only then is the list filled.

    The function is the same in inference and in training, gradients included, differentiable once.
    ValueError for what is no module of Python, or where modules cannot be told apart from the model's (`twin`).
    """
    return _running(model, "low", example)


def _running(model: nn.Module, form: str, example: tuple[Any, ...]) -> tuple[nn.Module, list[Change]]:
    if not isinstance(model, nn.Module):
        message = f"rewrite got a {type(model).__name__}, whose code it cannot follow: give it an nn.Module of Python"
        raise ValueError(message)  # noqa: TRY004 - all input that is refused raises ValueError
    made = twin(model)
    changes = [change for name, each in made.named_modules() if isinstance(each, SkipNet) for change in _on(each, name)]
    if isinstance(made, SkipNet):
        return made, changes
    own = made.__dict__.get("forward")
    running = Running(made, own.own if isinstance(own, Running) else own, form, changes)
    made.__dict__["forward"] = running
    if example:
        _compile(made, example)
    return made, running.changes


def _on(network: SkipNet, name: str) -> Iterator[Change]:
    """Let a network of the suite run the program of the backend `rewritten`, and say what stands for several ops."""
    network.use(RewrittenOps().ops())
    for op in network.program.ops:
        if op.parts:
            parts = list(flat(op))
            where = (".".join(filter(None, (name, each.where, each.part))) for each in parts)
            yield Change(tuple(where), " -> ".join(each.kind for each in parts), op.kind, WHY)


def _compile(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Run a model once in evaluation, which writes no statistics, and leave all modes as they were."""
    modes = {each: each.training for each in model.modules()}
    model.eval()
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

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None, form: str, changes: list[Change]) -> None:
        self.module, self.own, self.form, self.changes = module, own, form, list(changes)
        self._compiled: Callable[..., Any] | None = None
        self._skip_hooks: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's own forward does."""
        if torch.compiler.is_compiling() or _seen_through((*args, *kwargs.values())):
            return self.own(*args, **kwargs) if self.own else type(self.module).forward(self.module, *args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(self.__wrapped__, backend=self._rewrite, **ISOLATED)
        try:
            return self._compiled(*args, **kwargs)
        finally:
            if self._skip_hooks is not None:
                torch._dynamo.config.skip_nnmodule_hook_guards, self._skip_hooks = self._skip_hooks, None

    def _rewrite(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """Be the backend, and have hooks guarded, too, which by default Dynamo ignores if they come later."""
        from skipcost.kernels.rewriting.backend import backend  # noqa: PLC0415 - loads Dynamo and sympy

        run = backend(graph, examples, options={"form": self.form}, tell=self._note)
        if self._skip_hooks is None:
            self._skip_hooks = torch._dynamo.config.skip_nnmodule_hook_guards
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # guards are made next
        return run

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
        return Running, (self.module, self.own, self.form, self.changes)


def _seen_through(given: Iterable[Any]) -> bool:
    """Whether somebody traces, transforms or watches this call, who is to see the model's own operators.

    Dynamo itself compiles nothing under a dispatch mode, and would not try again afterwards.
    """
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:  # type: ignore[attr-defined, no-untyped-call]  # noqa: SLF001 - no public name
        return True
    if any(type(each) not in KNOWN for each in given if isinstance(each, Tensor | fx.Proxy)):
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # noqa: SLF001 - no public names
