"""Passes of `Recipes`: within one another, in threads, under autocast and checkpoints, and what is left at the end."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from kernel_checks import assert_same
from recompute_cases import BYTES, SHAPE, affine, leaf, remembered
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skipcost.kernels.recompute import Recipes, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_second_gradients_are_pytorchs() -> None:
    """A map that is made again is still the one that depends on x."""
    recipes, x, w = Recipes(), leaf().detach().double().requires_grad_(), leaf(seed=1)

    def second(z: Tensor) -> Tensor:
        pooled = z[..., 1:].square() * w[..., 1:]
        (first,) = torch.autograd.grad(pooled.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    for inside in (True, False):
        with recipes:
            z = remembered(recipes, x * 3)
            if inside:
                actual = second(z)
        assert torch.equal(actual if inside else second(z), second(affine(x * 3)))


def test_two_backwards_through_one_graph_agree() -> None:
    """The recipe is there as long as the graph is."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)
    with recipes:
        result = (remembered(recipes, x * 3) * w).sum()

    first, second = torch.autograd.grad(result, (x, w), retain_graph=True), torch.autograd.grad(result, (x, w))

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(first[1], affine(x * 3))


def test_a_pass_within_a_pass_knows_the_outer_maps() -> None:
    """The inner end does not end the outer pass."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    def forward() -> Tensor:
        with recipes:
            outer = remembered(recipes, x * 3)
            with recipes:
                inner = (outer * w).sum()
            return inner + (outer.square() * w).sum()

    kept, (grad,) = saved_bytes(forward), torch.autograd.grad(forward(), w)

    z = affine(x * 3)
    assert kept == 2 * BYTES  # y, and the square
    assert_same(grad, z.square() + z)


def test_a_pass_within_that_of_another_object_saves_what_it_does_not_know() -> None:
    """PyTorch asks the innermost hooks only; they do not guess."""
    outer, inner, x, w = Recipes(), Recipes(), leaf(), leaf(seed=1)

    def forward() -> Tensor:
        with outer:
            z = remembered(outer, x * 3)
            with inner:
                return (z * w).sum()

    kept, (grad,) = saved_bytes(forward), torch.autograd.grad(forward(), w)

    assert kept == BYTES  # the map
    assert_same(grad, affine(x * 3))


def test_an_exception_ends_the_pass() -> None:
    """Neither hooks nor maps outlive it."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    def fail(made: list[Tensor]) -> None:
        with recipes:
            made.append(remembered(recipes, x * 3))
            raise KeyError

    def forward() -> Tensor:
        made: list[Tensor] = []
        with pytest.raises(KeyError):
            fail(made)
        return (made[0] * w).sum()

    kept, (grad,) = saved_bytes(forward), torch.autograd.grad(forward(), w)

    assert kept == BYTES  # the map: this is PyTorch without hooks
    assert_same(grad, affine(x * 3))


def test_outside_of_a_pass_nothing_is_remembered() -> None:
    """So ops may always call `remember`, in evaluation and under inference mode too."""
    recipes = Recipes()
    y = torch.randn(SHAPE)
    freed = weakref.ref(y.untyped_storage())

    z = remembered(recipes, y)
    del y
    gone = freed() is None
    with recipes, torch.inference_mode():
        again = remembered(recipes, torch.ones(SHAPE))

    assert gone
    assert z.shape == again.shape


def test_a_dead_map_takes_its_recipe_with_it() -> None:
    """What nobody saved is not kept until the end of the pass, nor until the collector comes by."""
    recipes = Recipes()
    gc.disable()
    try:
        with recipes:
            y = torch.randn(SHAPE)
            freed = weakref.ref(y.untyped_storage())
            z = remembered(recipes, y)
            del y
            held = freed() is not None
            del z
            assert held
            assert freed() is None
    finally:
        gc.enable()


def test_the_end_of_a_pass_forgets_maps_that_live_on() -> None:
    """A result that is kept does not keep what it was made of."""
    recipes, y = Recipes(), torch.randn(SHAPE)
    freed = weakref.ref(y.untyped_storage())

    with recipes:
        z = remembered(recipes, y)
    del y

    assert freed() is None
    assert z.shape == SHAPE


def test_a_graph_without_backward_frees_what_it_holds() -> None:
    """What a node keeps of its own result does not keep the node."""
    x = leaf()
    gc.disable()
    try:
        with Recipes():
            y = x.exp()
        freed = weakref.ref(y.untyped_storage())
        del y
        assert freed() is None
    finally:
        gc.enable()


def test_backward_frees_what_it_has_read() -> None:
    """No circle of references keeps y, the recipe or a map that was made again; the collector has nothing to do."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)
    gc.disable()
    try:
        with recipes:
            y = (x * 3).exp()  # which keeps its own result
            z = remembered(recipes, y)
            alive = [weakref.ref(each.untyped_storage()) for each in (y, z)]
            result = (z * w).sum()
            del y, z
        before = [each() is not None for each in alive]
        result.backward()
        assert before == [True, False]
        assert alive[0]() is None
    finally:
        gc.enable()


def test_recipes_run_under_the_autocast_of_the_forward_pass() -> None:
    """Backward runs outside of it, where the same function would give another type."""
    recipes, x, v = Recipes(), leaf(shape=(5, 6)), leaf(seed=1, shape=(6, 6))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def forward() -> Tensor:
        with recipes, torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = recipes.make(product, x.detach(), v.detach())
            return (z @ v).float().sum()

    kept, (grad,) = saved_bytes(forward), torch.autograd.grad(forward(), v)

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z = x @ v
        expected = (z @ v).float().sum()
    assert z.dtype == torch.bfloat16
    assert kept == 0  # x and v are given
    assert torch.equal(grad, torch.autograd.grad(expected, v)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_read_remembered_maps(reentrant: bool) -> None:  # noqa: FBT001 - a case of the test
    """What a checkpoint keeps is its input, a remembered map; what it remembers itself when it runs again is right."""
    recipes, x, w = Recipes(), leaf(), leaf(seed=1)

    def part(z: Tensor) -> Tensor:
        inner = remembered(recipes, z.square())
        return inner.square() * w

    def forward() -> Tensor:
        with recipes:
            z = remembered(recipes, x * 3)
            result: Tensor = checkpoint(part, z, use_reentrant=reentrant)
            return result.sum()

    kept = saved_bytes(forward)
    forward().backward()

    plain = (affine(affine(x * 3).square()).square() * w).sum()
    assert kept == BYTES
    for each, expected in zip((x, w), torch.autograd.grad(plain, (x, w)), strict=True):
        assert each.grad is not None
        assert torch.equal(each.grad, expected)


def test_threads_have_memories_of_their_own() -> None:
    """One object serves two passes at once, and backward may run in a third thread."""
    recipes, inside = Recipes(), threading.Barrier(2)
    results: list[tuple[Tensor, Tensor, Tensor]] = []

    def work(seed: int) -> None:
        x, w = leaf(seed=seed), leaf(seed=seed + 10)
        with recipes:
            z = remembered(recipes, x * 3)
            inside.wait()
            results.append(((z * w).sum(), w, affine(x * 3)))
            inside.wait()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert len(results) == 2
    for result, w, expected in results:
        assert torch.equal(torch.autograd.grad(result, w)[0], expected.detach())


def test_a_pass_in_another_thread_is_no_pass_here() -> None:
    """Its hooks are not asked for what this thread saves, so nothing is remembered for them."""
    recipes, open_, done = Recipes(), threading.Event(), threading.Event()

    def work() -> None:
        with recipes:
            open_.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    open_.wait()
    y = torch.randn(SHAPE)
    freed = weakref.ref(y.untyped_storage())
    z = remembered(recipes, y)
    del y
    gone = freed() is None
    done.set()
    thread.join()

    assert gone
    assert z.shape == SHAPE
