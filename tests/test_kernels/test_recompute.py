"""`Recipes`: a map is made again bit by bit, the bytes are fewer, and no map is taken for another.

The blocks here are PyTorch's own ops, so that what is compared with is PyTorch itself. Whole networks, passes and their
ends, and what compilers see are in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import assert_same
from recompute_cases import BYTES, FORMATS, SHAPE, Overwrites, affine, leaf, remembered
from torch import Tensor, nn

from skipcost.kernels.ops.max_pool import pool
from skipcost.kernels.recompute import Recipes, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_map_and_its_views_are_made_again() -> None:
    """Crops, transposes and the map itself come out of one recipe: y is kept, and nothing else."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    def forward() -> Tensor:
        with recipes:
            z = remembered(recipes, x * 3)
            return (z * w).sum() + (z[..., 1:4, 2:].mT * w[..., 1:4, 2:].mT).sum() + z[0, 1].square().sum()

    kept, grads = saved_bytes(forward), torch.autograd.grad(forward(), (x, w))

    z = affine(x * 3)
    plain = (z * w).sum() + (z[..., 1:4, 2:].mT * w[..., 1:4, 2:].mT).sum() + z[0, 1].square().sum()
    assert kept == BYTES
    for actual, expected in zip(grads, torch.autograd.grad(plain, (x, w)), strict=True):
        assert_same(actual, expected)


class _Look(torch.autograd.Function):
    """A copy that says what it kept."""

    seen: Tensor

    @staticmethod
    def forward(ctx: Any, each: Tensor) -> Tensor:
        ctx.save_for_backward(each)
        return each.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (_Look.seen,) = ctx.saved_tensors
        return grads[0]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_recipes_stack_up(memory_format: torch.memory_format) -> None:
    """A map made of a map made of a map costs only what the first is made of, and comes out with the same strides."""
    recipes, w = Recipes(), leaf(seed=1, shape=(1, 4, 3, 3))
    x = torch.randn(SHAPE).to(memory_format=memory_format).requires_grad_()

    def joined() -> Tensor:
        z = remembered(recipes, x * 3)
        pooled = recipes.make(partial(pool, factor=2, ceil=False), z)
        return recipes.make(lambda *each: torch.cat(each, 1), pooled, pooled)

    def forward() -> Tensor:
        with recipes:
            return (joined() * w).sum()

    kept = saved_bytes(forward)
    with recipes:
        expected = joined()
        _Look.apply(expected).sum().backward()

    assert kept == BYTES
    assert _Look.seen is not expected
    assert _Look.seen.stride() == expected.stride()
    assert_same(_Look.seen, expected)


def test_readers_are_not_joined() -> None:
    """A backward may write into its map and pass it on; the others still read what was there."""
    recipes, x = Recipes(), leaf()

    with recipes:
        z = remembered(recipes, x * 3)
        result = z.square() + Overwrites.apply(z) + z.square()
    (grad,) = torch.autograd.grad(result.sum(), x)

    z = affine(x * 3)
    assert torch.equal(grad, torch.autograd.grad((z.square() + z.square() + z.square()).sum(), x)[0])


def test_a_reused_address_is_no_map() -> None:
    """Another tensor where a remembered map has been is another tensor."""
    recipes, y, w = Recipes(), torch.randn(SHAPE), leaf(seed=1)
    memory = np.empty(SHAPE, np.float32)

    with recipes:
        z = torch.from_numpy(memory).copy_(affine(y))
        recipes.remember(z, affine, y)
        address = z.data_ptr()
        del z
        other = torch.from_numpy(memory)
        other.data.fill_(5.0)  # at version 0, like the map
        result = (other * w).sum()

    assert (other.data_ptr(), other._version) == (address, 0)
    assert torch.equal(torch.autograd.grad(result, w)[0], torch.full(SHAPE, 5.0))


@pytest.mark.parametrize("through", ["map", "view", "detached"])
def test_a_map_changed_since_is_saved_as_it_is(through: str) -> None:
    """Whoever wrote to it, the recipe no longer holds."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    with recipes, torch.no_grad():
        z = remembered(recipes, x * 3)
        {"map": z, "view": z[..., 1:], "detached": z.detach()}[through].add_(1)
    with recipes:
        z = remembered(recipes, x * 3)
        {"map": z, "view": z[..., 1:], "detached": z.detach()}[through].add_(1)
        expected = z.detach().clone()
        result = (z * w).sum()

    assert torch.equal(torch.autograd.grad(result, w)[0], expected)


def test_a_map_with_other_memory_is_another_map() -> None:
    """A tensor that was given new memory has nothing to do with the recipe, nor has a copy in another type."""
    recipes, w = Recipes(), leaf(seed=1)

    with recipes:
        z = remembered(recipes, torch.randn(SHAPE))
        z.data = torch.full(SHAPE, 7.0)
        swapped = (z * w).sum()
        copied = (remembered(recipes, torch.ones(SHAPE)).bfloat16() * w.bfloat16()).sum()

    assert torch.equal(torch.autograd.grad(swapped, w)[0], torch.full(SHAPE, 7.0))
    assert torch.equal(torch.autograd.grad(copied, w)[0], torch.full(SHAPE, 3.0))


def test_a_map_read_as_another_type_is_saved_as_it_is() -> None:
    """The elements of a view as complex numbers are not those of the map, though the memory is."""
    recipes, y = Recipes(), leaf()
    w = torch.randn(1, 2, 6, 3, dtype=torch.cfloat, requires_grad=True)

    with recipes:
        z = remembered(recipes, y)
        result = torch.view_as_real(torch.view_as_complex(z.view(1, 2, 6, 3, 2)) * w).sum()

    expected = torch.view_as_real(torch.view_as_complex(affine(y).view(1, 2, 6, 3, 2)) * w).sum()
    assert torch.equal(torch.autograd.grad(result, w)[0], torch.autograd.grad(expected, w)[0])


@pytest.mark.parametrize("kind", ["slice", "gaps", "in place", "itself"])
def test_a_map_that_is_not_all_of_a_storage_of_its_own_is_saved_as_it_is(kind: str) -> None:
    """What lies beside its elements is no recipe's business; nor can a map be made of what it has been written over."""
    recipes, y, w = Recipes(), torch.randn(SHAPE), leaf(seed=1)
    strides = (72, 30, 5, 1)  # on 61 places, some of them twice
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "slice": lambda y: torch.cat([affine(y), y], 1)[:, :2],
        "gaps": lambda y: torch.rand(72).as_strided(SHAPE, strides).copy_(y[0, 0, 0, 0].expand(SHAPE)),
        "in place": lambda y: y.mul_(2),
        "itself": lambda y: y,
    }

    with recipes:
        z = functions[kind](y)
        recipes.remember(z, affine if kind == "slice" else functions[kind], y)
        everything = torch.empty(0).set_(z.untyped_storage())  # type: ignore[call-overload]  # not in torch's stubs
        expected = z.clone()
        expected[0, 0, 0] += everything[-6:]
        result = (z * w).sum() + (everything[-6:] * w[0, 0, 0]).sum()

    assert_same(torch.autograd.grad(result, w)[0], expected)


def test_a_map_changed_after_it_was_read_is_made_again_as_it_was() -> None:
    """PyTorch, which has nothing but the map, refuses such a backward; a recipe knows what had been read."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    with recipes:
        z = remembered(recipes, x * 3)
        result = (z * w).sum()
        z.detach().zero_()

    assert torch.equal(torch.autograd.grad(result, w)[0], affine(x * 3))


def test_what_a_recipe_needs_may_not_change() -> None:
    """One sentence says so, where the map could only come out wrong."""
    recipes, w = Recipes(), leaf(seed=1)

    with recipes:
        y = torch.randn(SHAPE)
        result = (remembered(recipes, y) * w).sum()
    y.add_(1)

    with pytest.raises(RuntimeError, match=r"\(1, 2, 6, 6\) that backward needs has been modified by an inplace opera"):
        result.backward()


def test_what_is_simply_saved_may_not_change_either() -> None:
    """PyTorch's own check, which it leaves to hooks."""
    x, w = leaf(), leaf(seed=1)

    with Recipes():
        y = x * 3
        result = (y * w).sum()
    y.detach().add_(1)

    with pytest.raises(RuntimeError, match="was kept at version 0 and is at version 1; change a clone of it instead"):
        result.backward()


def test_a_backward_that_writes_to_what_it_kept_is_found_out() -> None:
    """The second backward through the same graph would read what the first one wrote."""
    with Recipes():
        result = Overwrites.apply(leaf() * 3).sum()
    result.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: affine(y).to(memory_format=torch.channels_last), "a recipe made a map of .* where it had been"),
        (lambda y: affine(y)[..., :3], "a recipe made a map of .* where it had been"),
        (lambda y: affine(y).double(), "a recipe made a map of .*float64.* where it had been .*float32"),
        (lambda y: affine(y.add_(1)), "the function of a recipe changed a tensor that it was given"),
    ],
    ids=["strides", "shape", "type", "in place"],
)
def test_a_recipe_that_does_something_else_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    """A map that cannot be the one that was remembered never reaches backward."""
    recipes, w, y = Recipes(), leaf(seed=1), torch.randn(SHAPE)

    with recipes:
        z = affine(y)
        recipes.remember(z, function, y)
        result = (z * w).sum()

    with pytest.raises(RuntimeError, match=message):
        result.backward()


def test_what_has_no_memory_of_its_own_is_saved_as_it_is() -> None:
    """Sparse tensors, and batches that vmap hides."""
    recipes, w = Recipes(), leaf(shape=(3, 3))

    with recipes:
        sparse = recipes.make(torch.clone, torch.eye(3).to_sparse())
        product = torch.sparse.mm(sparse, w).sum()
        batched = torch.vmap(lambda x: remembered(recipes, x * 3).square())(w).sum()

    assert torch.equal(torch.autograd.grad(product, w)[0], torch.ones(3, 3))
    assert torch.equal(torch.autograd.grad(batched, w)[0], 12 * affine(3 * w))


def test_saved_bytes_counts_each_storage_once_and_only_what_the_call_made() -> None:
    """Parameters, inputs and what nobody keeps are not counted; results only if backward needs them."""
    x, layer = leaf(), nn.Conv2d(2, 5, 3, padding=1)

    def twice() -> Tensor:
        y = x * 2
        return (y * y[..., :6]).sum() + y.square().sum()

    assert saved_bytes(lambda: (layer(x), x[..., 1:] * x[..., 1:], x * 2)) == 0
    assert saved_bytes(x.exp) == BYTES
    assert saved_bytes(lambda: {"a": [x.exp()], "b": (x * x).sum()}) == BYTES
    assert saved_bytes(twice) == BYTES
    assert saved_bytes(lambda: torch.ones(1000)) == 0
