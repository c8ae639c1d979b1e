"""What the tests of `fuse` share: models with inputs, comparison by float64, what was changed, which ops ran."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from user_models import MODELS, trained

from skipcost.kernels import Change, fuse
from skipcost.kernels.rewriting.rewrite import Running

JOINED = "up_conv, concat_conv_bn_relu"
FOLDED = "convolution of PyTorch with the norm folded in"


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model by its name, and an input."""
    factory, shape = MODELS[name]
    torch.manual_seed(1)
    return trained(factory()), torch.randn(shape)


def small(*layers: nn.Module) -> nn.Sequential:
    """Return layers for maps of 3 channels as a model in evaluation."""
    torch.manual_seed(2)
    model = nn.Sequential(*layers)
    trained(model)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all maps that a model gives."""
    return tree_leaves(model(x))


def assert_as_good(
    fused: nn.Module, model: nn.Module, x: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> None:  # fmt: skip
    """Compare both with the model in float64; the fused one reads its input in `layout`.

    The rule: the fused model's largest error is at most twice that of the original, plus 4 units in the last place of
    the largest number, which is there for models whose own error is 0 by luck, and for CPUs that start a convolution's
    sum with the shift folded into it: every addition then rounds a number about that much larger.
    """
    exact = outputs(copy.deepcopy(model).double(), x.double())
    for ours, its, truth in zip(
        outputs(fused, x.contiguous(memory_format=layout)), outputs(model, x), exact, strict=True
    ):  # fmt: skip
        floor = 4 * torch.finfo(x.dtype).eps * truth.abs().max()
        assert ours.dtype == its.dtype
        assert (ours - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


def ours(changes: list[Change]) -> list[str]:
    """Return what runs now, place by place."""
    return [change.after for change in changes if change.after]


def refused(changes: list[Change]) -> str:
    """Return why the only place that stays as it is does so."""
    (change,) = (each for each in changes if not each.after)
    return change.why


class Called:
    """Lists the names of our ops as they run in graphs that are compiled within."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> Self:
        self._within = within(_Listing(self.names))
        self._within.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._within.__exit__(*error)


class _Listing(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "skipcost":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def within(
    mode: AbstractContextManager[object], after: Callable[[Callable[[], Any]], object] = lambda _: None
) -> Iterator[None]:  # fmt: skip
    """Let graphs of rewritten and fused models that are compiled now run in a mode, and give each to `after`.

    Dynamo compiles nothing under a dispatch mode, and calls nothing that it compiled.
    """
    rewrite = Running._rewrite

    def watched(running: Running, *args: Any) -> Callable[..., Any]:
        graph = rewrite(running, *args)

        def call(*given: Any) -> Any:
            with mode:
                result = graph(*given)
            after(partial(graph, *given))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Running, "_rewrite", watched)
        yield


@torch.no_grad()
def graph_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return what runs the graph of a rewritten or fused model; the first call is done."""
    found: list[Any] = []
    with within(nullcontext(), found.append):
        model(x)
    (graph,) = found
    return torch.no_grad()(graph)


@torch.no_grad()
def fuse_at(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, list[Change]]:
    """Fuse a model, compiled for an input without gradients."""
    return fuse(model, x, **options)


def total(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss to ask gradients of: the sum of squares of all maps that a model gives."""
    return sum((each.square().sum() for each in tree_leaves(model(x))), torch.zeros(()))
