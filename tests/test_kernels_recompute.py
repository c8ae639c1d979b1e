"""`Recipes`: the gradients are those of PyTorch to the last bit, the bytes are fewer, and no map is taken for another.

The blocks here are PyTorch's own ops, so that what is compared with is PyTorch itself.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from skipcost.kernels.calls import Call
from skipcost.kernels.fused import FusedOps
from skipcost.kernels.max_pool import pool
from skipcost.kernels.recompute import Recipes, remembering, saved_bytes
from skipcost.unet_models import REFERENCE, ModelSpec, build
from skipcost.unet_models.ops import ConvNormAct, Ops

SHAPE = (1, 2, 6, 6)
BYTES = 4 * 72  # of a map of that shape in fp32
FORMATS = (torch.contiguous_format, torch.channels_last)


class _Affine(torch.autograd.Function):
    """2 y + 1, as a block that keeps neither y nor its result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return affine(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def affine(y: Tensor) -> Tensor:
    """What `_Affine` does to the numbers."""
    return y * 2 + 1


def remembered(recipes: Recipes, y: Tensor) -> Tensor:
    """Make a map of y that autograd does not hold by itself, and remember it."""
    z: Tensor = _Affine.apply(y)
    recipes.remember(z, affine, y)
    return z


def leaf(*, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Make a map that wants a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def normalized(y: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, act: bool) -> Tensor:
    """Batch norm as in training, and ReLU."""
    z = torch.native_batch_norm(y, gamma, beta, None, None, True, 0.0, eps)[0]
    return z.relu_() if act else z


class _NormAct(torch.autograd.Function):
    """`normalized`, which keeps y and not its result: what PyTorch does in two ops, with the same gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, norm: nn.BatchNorm2d, act: bool) -> Tensor:  # noqa: FBT001
        running = norm.running_mean, norm.running_var
        z, mean, rstd = torch.native_batch_norm(y, gamma, beta, *running, True, norm.momentum or 0.0, norm.eps)
        ctx.eps, ctx.act = norm.eps, act
        ctx.save_for_backward(y, gamma, beta, mean, rstd)
        return z.relu_() if act else z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (y, gamma, beta, mean, rstd) = grads, ctx.saved_tensors
        if ctx.act:
            z = normalized(y, gamma, beta, eps=ctx.eps, act=True)
            grad = torch.ops.aten.threshold_backward(grad, z, 0)
        of_norm = torch.ops.aten.native_batch_norm_backward
        return *of_norm(grad, y, gamma, None, None, mean, rstd, True, ctx.eps, [True] * 3), None, None


def lean_ops(recipes: Recipes) -> Ops:
    """Replace what PyTorch keeps too much for, by PyTorch's own ops."""

    def conv_norm_act(layer: ConvNormAct, x: Tensor) -> Tensor:
        y: Tensor = layer.conv(x)
        if not isinstance(norm := layer.norm, nn.BatchNorm2d):
            return y
        z: Tensor = _NormAct.apply(y, norm.weight, norm.bias, norm, layer.act)
        recipes.remember(z, partial(normalized, eps=norm.eps, act=layer.act), y, norm.weight, norm.bias)
        return z

    return remembering(replace(REFERENCE, conv_norm_act=conv_norm_act), recipes)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("label", "ratio"),
    [("unet/d4/w16/concat", 0.47), ("unet++/d3/w16/concat", 0.44), ("unet3+/d3/w16/concat", 0.26)],
)
def test_a_training_step_keeps_less_and_has_the_same_gradients(label: str, ratio: float) -> None:
    """Of what eager PyTorch keeps for backward, at most half is kept, and every gradient equals PyTorch's."""
    spec, recipes = ModelSpec.parse(label), Recipes()
    eager, lean = build(spec), build(spec, lean_ops(recipes))
    lean.load_state_dict(eager.state_dict())
    image, target = torch.randn(2, 1, 128, 128), torch.randint(0, 2, (2, 128, 128))

    def step(net: nn.Module) -> Tensor:
        with recipes:
            return functional.cross_entropy(net(image), target)

    kept, kept_eagerly = saved_bytes(lambda: step(lean)), saved_bytes(lambda: step(eager))
    loss, expected = step(lean), functional.cross_entropy(eager(image), target)
    loss.backward()
    expected.backward()

    assert torch.equal(loss, expected)
    assert kept <= ratio * kept_eagerly
    for actual, wanted in zip(lean.parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert torch.equal(actual.grad, wanted.grad)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "label", ["unet/d2/w4/sum/padding=valid", "unet++/d2/w4/gated", "unet3+/d2/w4/concat/head=deep"]
)
def test_every_way_through_the_executor_keeps_its_gradients(label: str) -> None:
    """Sums, crops, gates and several heads; 45 is no multiple of 4, so that pooling and up-sampling lose pixels."""
    spec, recipes = ModelSpec.parse(label), Recipes()
    eager, lean = build(spec), build(spec, lean_ops(recipes))
    lean.load_state_dict(eager.state_dict())
    image = torch.randn(2, 1, 45, 45)

    def step(net: nn.Module) -> Tensor:
        maps = net(image)
        return sum((each.square().mean() for each in ([maps] if isinstance(maps, Tensor) else maps)), torch.zeros(()))

    with recipes:
        loss = step(lean)
    loss.backward()
    step(eager).backward()

    for actual, wanted in zip(lean.parameters(), eager.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert torch.equal(actual.grad, wanted.grad)


def _on_our_kernels(call: Call, _: Tensor) -> str:
    return "aten" if call.op == "conv_bn_relu_train" else "reference"


class _Forgetful(Recipes):
    """Passes in which nothing is remembered."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("label", "ratio"),
    [("unet/d3/w8/concat", 0.48), ("unet++/d2/w8/concat", 0.47), ("unet3+/d2/w8/concat", 0.33)],
)
def test_the_fused_ops_keep_half_with_the_gradients_they_have_without(label: str, ratio: float, bf16: bool) -> None:  # noqa: FBT001
    """`conv_bn_relu_train` and its relatives, against eager PyTorch in bytes, against themselves in bits."""
    spec = ModelSpec.parse(label)
    eager = build(spec)
    lean, plain = (build(spec, FusedOps(_on_our_kernels, each).ops()) for each in (Recipes(), _Forgetful()))
    for net in (lean, plain):
        net.load_state_dict(eager.state_dict())
    image, target = torch.randn(2, 1, 96, 96), torch.randint(0, 2, (2, 96, 96))

    def step(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return functional.cross_entropy(net(image), target)

    kept, kept_eagerly = saved_bytes(lambda: step(lean)), saved_bytes(lambda: step(eager))
    step(lean).backward()
    step(plain)  # the running statistics of `lean` have seen two batches
    step(plain).backward()

    weights = 2 * sum(each.numel() for each in eager.parameters() if each.ndim == 4) if bf16 else 0  # autocast's copies
    assert kept - weights <= ratio * (kept_eagerly - weights)
    for actual, wanted in zip(lean.parameters(), plain.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert_same(actual.grad, wanted.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_of_a_network_remembers_as_well(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Networks are copied to average their weights, and pickled to save them."""
    net = build(ModelSpec.parse("unet/d2/w4/concat"), FusedOps(_on_our_kernels).ops())
    image = torch.randn(1, 1, 32, 32)

    again = copied(net)

    assert saved_bytes(lambda: again(image)) == saved_bytes(lambda: net(image))


def test_a_deep_copy_is_the_same_object() -> None:
    """Of a network's functions, closures are not copied and methods are: both must talk to one object."""
    recipes = Recipes()

    assert copy.deepcopy([recipes])[0] is recipes


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


class _Overwrites(torch.autograd.Function):
    """A square whose backward writes into what it kept, and passes that on."""

    @staticmethod
    def forward(ctx: Any, each: Tensor) -> Tensor:
        ctx.save_for_backward(each)
        return each.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad: Tensor = ctx.saved_tensors[0].mul_(2 * grads[0])
        return grad


def test_readers_are_not_joined() -> None:
    """A backward may write into its map and pass it on; the others still read what was there."""
    recipes, x = Recipes(), leaf()

    with recipes:
        z = remembered(recipes, x * 3)
        result = z.square() + _Overwrites.apply(z) + z.square()
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
        result = _Overwrites.apply(leaf() * 3).sum()
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


def test_what_has_no_memory_of_its_own_is_saved_as_it_is() -> None:
    """Sparse tensors, and batches that vmap hides."""
    recipes, w = Recipes(), leaf(shape=(3, 3))

    with recipes:
        sparse = recipes.make(torch.clone, torch.eye(3).to_sparse())
        product = torch.sparse.mm(sparse, w).sum()
        batched = torch.vmap(lambda x: remembered(recipes, x * 3).square())(w).sum()

    assert torch.equal(torch.autograd.grad(product, w)[0], torch.ones(3, 3))
    assert torch.equal(torch.autograd.grad(batched, w)[0], 12 * affine(3 * w))


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
        return self.make(lambda *each: REFERENCE.merge(list(each), "concat")[:, -3:].clone(), one, other)

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


@settings(max_examples=100)
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


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("factor", "ceil"), [(2, False), (2, True), (3, True), (4, False), (1, False)])
def test_pool_has_pytorchs_values_and_gradients(
    factor: int,
    ceil: bool,  # noqa: FBT001 - a case of the test
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Few values, so that most windows have ties; NaN, both zeros, infinities; 7 x 9 leaves incomplete windows."""
    torch.manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    x = values[torch.randint(0, 8, (2, 3, 7, 9))].to(memory_format=memory_format).requires_grad_()

    result, expected = pool(x, factor, ceil=ceil), REFERENCE.pool(x, factor, ceil=ceil)
    assert_same(result, expected)
    assert result.stride() == expected.stride()
    grad = torch.randn_like(result)
    for each in (grad, grad.mT.contiguous().mT):
        actual, wanted = (torch.autograd.grad(out, x, each, retain_graph=True)[0] for out in (result, expected))
        assert_same(actual, wanted)
        assert actual.stride() == wanted.stride()


def test_pool_keeps_no_indices() -> None:
    """It keeps its input, which is given here, and nothing else; PyTorch adds 8 bytes for each window."""
    x = leaf()

    ours, theirs = (saved_bytes(partial(op, x * 3, 2, ceil=False)) for op in (pool, REFERENCE.pool))

    assert ours == 0
    assert theirs == 8 * 18


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck_passes(memory_format: torch.memory_format) -> None:
    """Schema, fake tensors, autograd and tracing of both ops are sound."""
    x = torch.randn(2, 3, 7, 9).to(memory_format=memory_format).requires_grad_()
    grad = torch.randn(2, 3, 4, 5, requires_grad=True)

    torch.library.opcheck(torch.ops.skipcost.max_pool.default, (x, 2, True))
    torch.library.opcheck(torch.ops.skipcost.max_pool_backward.default, (grad, x, 2, True))


def test_pool_has_second_gradients() -> None:
    """Against differences; the values lie far enough apart that no step makes another pixel the largest."""
    x = torch.randperm(2 * 5 * 7).view(1, 2, 5, 7).double().requires_grad_()

    assert torch.autograd.gradcheck(lambda each: pool(each, 2, ceil=True).square(), x)
    assert torch.autograd.gradgradcheck(lambda each: pool(each, 2, ceil=True).square(), x)


@pytest.mark.parametrize(
    ("x", "factor", "ceil", "message"),
    [
        (torch.ones(3, 4, 4), 2, False, r"pool got a map of shape \(3, 4, 4\) and torch.float32: it takes floating"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), 2, False, "pool got a map .* and torch.int64: it takes floating"),
        (torch.ones(1, 1, 4, 4), 0, False, "pool got factor=0: a window has one pixel or more a side"),
        (torch.ones(1, 1, 4, 3), 4, False, "pool got a 4x3 map, in which no window of 4x4 fits: give a larger one"),
        (torch.ones(1, 1, 0, 3), 2, True, "pool got a 0x3 map, in which no window of 2x2 fits"),
    ],
    ids=["rank", "type", "factor", "small", "empty"],
)
def test_maps_that_cannot_be_pooled_are_refused(x: Tensor, factor: int, ceil: bool, message: str) -> None:  # noqa: FBT001 - a case of the test
    """One sentence says what was received and what is needed."""
    with pytest.raises(ValueError, match=message):
        pool(x, factor, ceil=ceil)


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


def test_saved_bytes_needs_no_memory_to_count() -> None:
    """Networks on the meta device and of fake tensors say what a real one would keep, recipes included, every time."""
    kept = []

    for device, mode in (("cpu", nullcontext()), ("meta", nullcontext()), ("cpu", FakeTensorMode())):
        recipes = Recipes()
        with torch.device(device), mode:
            net, image = build(ModelSpec.parse("unet/d2/w4/concat"), lean_ops(recipes)), torch.ones(1, 1, 32, 32)

            def forward(recipes: Recipes = recipes, net: nn.Module = net, image: Tensor = image) -> Any:
                with recipes:
                    return net(image)

            kept += [saved_bytes(forward), saved_bytes(forward)]

    outputs = 4 * (2 * 4 * 32**2 + 2 * 8 * 16**2 + 2 * 16 * 8**2)  # of the encoder's convolutions
    outputs += 4 * (3 * 8 * 16**2 + 3 * 4 * 32**2)  # of the decoder's, transposed ones included
    assert kept == [outputs + 4 * 2 * 2 * (4 + 8 + 16 + 8 + 4)] * 6  # mean and deviation of each norm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_has_the_same_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Pooled, up-sampled, joined and cropped maps are made again to the bit, on shapes that no tile divides."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 131, 77, device="cuda", dtype=dtype).to(memory_format=memory_format).requires_grad_()
    ops = remembering(REFERENCE, recipes := Recipes())

    def forward(table: Ops) -> Tensor:
        z = x * 3
        low = table.pool(z, 2, ceil=False)
        up = table.up_sample(low.relu(), 2, "nearest")
        joined = table.merge([z, up, z], "concat")
        return (joined * joined.sin()).float().mean() + (low * low).float().mean()

    with recipes:
        result = forward(ops)
    (grad,) = torch.autograd.grad(result, x)

    assert_same(grad, torch.autograd.grad(forward(REFERENCE), x)[0])
