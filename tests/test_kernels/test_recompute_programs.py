"""`Recipes` and whatever a program does to maps: at random, compiled, and exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same
from recompute_cases import SHAPE, affine, leaf, remembered
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.ops.max_pool import pool
from skipcost.kernels.recompute import Recipes
from skipcost.unet_models import ops as reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
@pytest.mark.parametrize("around", [True, False])
def test_compiled_code_remembers_nothing_and_is_right(around: bool) -> None:  # noqa: FBT001 - a case of the test
    """A compiled function may be called in a pass, and may contain one, outside of its graphs."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    def block(y: Tensor, w: Tensor) -> Tensor:
        z = recipes.make(affine, y * 3)
        return (recipes.make(partial(pool, factor=2, ceil=False), z) * w[..., ::2, ::2]).sum()

    def whole(y: Tensor, w: Tensor) -> Tensor:
        with recipes:
            return block(y, w)

    compiled = torch.compile(block if around else whole, backend="aot_eager", fullgraph=around)
    with recipes:
        result = compiled(remembered(recipes, x), w)

    expected = block(affine(x), w)
    for actual, wanted in zip(torch.autograd.grad(result, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        assert torch.equal(actual, wanted)


class _Program:
    """Maps that are made, viewed, joined, written to, dropped and read, at random."""

    def __init__(self, x: Tensor, recipes: Recipes | None) -> None:
        self.maps, self.read, self.recipes = [x * 1.5], [torch.zeros(())], recipes

    def make(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return self.recipes.make(function, *tensors) if self.recipes else function(*tensors)

    def affine(self, one: Tensor, _: Tensor) -> Tensor:
        return remembered(self.recipes or Recipes(), one)

    def pooled(self, one: Tensor, _: Tensor) -> Tensor:
        return self.make(partial(pool, factor=2, ceil=True), one)

    def enlarged(self, one: Tensor, _: Tensor) -> Tensor:
        return self.make(lambda y: functional.interpolate(y, scale_factor=2.0)[..., :9, :9].clone(), one)

    def joined(self, one: Tensor, other: Tensor) -> Tensor:
        return self.make(lambda *each: reference.merge(list(each), "concat")[:, -3:].clone(), one, other)

    def cropped(self, one: Tensor, _: Tensor) -> Tensor:
        return one[..., one.shape[-2] // 3 :, :]

    def squared(self, one: Tensor, other: Tensor) -> Tensor:
        self.read.append((other * other.sin()).mean())
        return one * one

    def written(self, one: Tensor, _: Tensor) -> Tensor:
        return one.add_(0.5)

    def partly_written(self, one: Tensor, _: Tensor) -> Tensor:
        return one[..., :1].mul_(0.5)

    def only(self, one: Tensor, _: Tensor) -> Tensor:
        self.maps.clear()
        return one

    def run(self, steps: list[tuple[str, int, int]]) -> Tensor:
        for step, first, second in steps:
            one, other = (self.maps[number % len(self.maps)] for number in (first, second))
            self.maps.append(getattr(self, step)(one, other))
        return torch.stack([*self.read, *((each * each).mean() for each in self.maps)]).sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_the_compiler_stays_out_of_the_hooks() -> None:
    """A function that it cannot compile runs as it is, and does not have every saved tensor's shape compiled for it."""
    recipes, compiled = Recipes(), []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    def whole(x: Tensor) -> Tensor:
        with recipes:
            return (x * x).sum()

    torch.compile(whole, backend=backend)(leaf()).backward()

    assert not compiled


def test_a_pass_can_be_exported() -> None:
    """Nothing of it is in the graph but what computes; without gradients the pool is PyTorch's own."""
    recipes = Recipes()

    class Block(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            with recipes:
                return recipes.make(partial(pool, factor=2, ceil=False), y * 3)

    program = torch.export.export(Block(), (torch.ones(SHAPE),))

    names = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["mul", "max_pool2d"]
    assert torch.equal(program.module()(torch.ones(SHAPE)), torch.full((1, 2, 3, 3), 3.0))


STEPS = [name for name in vars(_Program) if not name.startswith("_") and name not in ("make", "run")]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=14))
def test_whatever_is_done_to_maps_gradients_are_pytorchs(steps: list[tuple[str, int, int]]) -> None:
    """Any program of maps; one that writes over what backward needs may be refused, but never comes out wrong."""
    x, recipes = leaf(), Recipes()

    with recipes:
        result = _Program(x, recipes).run(steps)
    plain = _Program(x, None).run(steps)
    try:
        (expected,) = torch.autograd.grad(plain, x)
        (actual,) = torch.autograd.grad(result, x)
    except RuntimeError as error:
        assume("modified by an inplace operation" not in str(error) or not any("written" in step for step, *_ in steps))
        raise

    assert_same(actual, expected)
