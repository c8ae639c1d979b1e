"""Keep raw convolution outputs for backward; make the maps that follow from them again when backward reads them.

A training step keeps for backward the output y of each convolution, the map z = relu(a * y + b) made of it, the
concatenated copy of z, the pooled one, and 64-bit indices of the pooled pixels. All of them follow from y. Within
`Recipes`, autograd holds for such a map its recipe: a function and the tensors it takes, which are kept anyway.

    recipes = Recipes()
    with recipes:  # one forward pass
        z, y, mean, variance = conv_bn_relu(x)
        recipes.remember(z, normalize, y, mean, variance)  # z equals normalize(y, mean, variance), bit for bit
        p = recipes.make(partial(pool, factor=2, ceil=False), z)  # calls it and remembers it: recipes stack up

Bytes saved, gradients unchanged to the last bit: at 512 x 512 under autocast to bf16, U-Net (depth 4, width 64) keeps
45 % of what it kept, UNet++ (4, 32) 41 %, UNet 3+ (4, 64) 20 %. Autocast's copies of the weights are part of that: they
stay, so that small maps of wide networks gain less.

What it costs: each reader of a map makes it again, one pass over memory for each recipe on the way, and on the host 3
microseconds for each tensor that is saved. On a CPU that is 11 to 14 % of a training step of the fused ops. Readers
share nothing. In the three networks no two of them ever held the same map at the same time; and one whose backward
wrote into its map, or passed it on as a gradient that others are added to, would change what the next one reads.

Why no tensor is taken for another: a recipe is filed, by weak reference, under the storage object of its map and never
under an address. PyTorch has one such object for as long as a storage lives; with it goes the entry. If the map has
been written to since (but through `.data`, of which autograd does not learn either), or is read as another type, or
does not fill its storage alone, then it is saved as ever.

Left out: code within torch.compile, where nothing is remembered and the compiler itself chooses what to keep; other
hooks on saved tensors, of which PyTorch calls the innermost only; and tensors that an op keeps outside of autograd.

Tried on no GPU yet.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, UntypedStorage
from torch._compile import _disable_dynamo as not_compiled  # torch.compiler.disable imports Dynamo here and now
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipcost.kernels.ops.max_pool import pool
from skipcost.unet_models.ops import Function, Ops, Step


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A tensor that is simply kept. PyTorch leaves it to hooks to notice that it was changed in place since."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        """Return the tensor; RuntimeError if it has been changed."""
        if self.tensor._version != self.version:  # noqa: SLF001 - PyTorch documents it, see its notes on autograd
            message = (
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs has been modified by an inplace "
                f"operation: it was kept at version {self.version} and is at version {self.tensor._version}; "  # noqa: SLF001
                "change a clone of it instead, or change it after backward"
            )
            raise RuntimeError(message)
        return self.tensor


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How to make a map again: the function that made it, what that takes, and the autocast it ran under."""

    function: Callable[..., Tensor]
    held: tuple[Kept | Window, ...]
    autocast: Callable[[], AbstractContextManager[Any]]
    layout: tuple[Any, ...]  # of the map, see `_layout`

    def make(self) -> Tensor:
        """Return a new map of the same bits; RuntimeError if the function does not do what it did before."""
        tensors = [each.get() for each in self.held]
        versions = [each._version for each in tensors]  # noqa: SLF001
        with torch.no_grad(), self.autocast():
            made = self.function(*tensors)
        if [each._version for each in tensors] != versions:  # noqa: SLF001
            message = "the function of a recipe changed a tensor that it was given: it must only read them"
            raise RuntimeError(message)
        if _layout(made) != self.layout:
            message = (
                f"a recipe made a map of {_layout(made)} where it had been {self.layout}: "
                "remember a map together with the function that made it"
            )
            raise RuntimeError(message)
        return made


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A view of a map that is made again; strides and offset in elements, from the start of the map."""

    recipe: Recipe
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        """Make the map and look at it in the same way."""
        return self.recipe.make().as_strided(self.shape, self.strides, self.offset)


class _Passes(threading.local):
    """The forward passes under way in this thread, the innermost last, and what they remember."""

    def __init__(self) -> None:
        self.hooks: list[saved_tensors_hooks] = []
        self.known: WeakKeyDictionary[UntypedStorage, tuple[Recipe, int]] = WeakKeyDictionary()


class Recipes:
    """What the maps of a forward pass are made of: `with recipes:` round the pass; backward may be in it or after it.

    One object can serve pass after pass, passes in several threads at once, each with memories of its own, and one
    within another. Outside of any, `remember` does nothing, so that ops may hold on to the object. A pass may call
    compiled functions; a compiled function cannot contain `with recipes:` in one graph.
    """

    def __init__(self) -> None:
        self._passes = _Passes()

    @not_compiled
    def __enter__(self) -> Self:
        hooks = saved_tensors_hooks(self._hold, _get)
        hooks.__enter__()
        self._passes.hooks.append(hooks)
        return self

    @not_compiled
    def __exit__(self, *error: object) -> None:
        self._passes.hooks.pop().__exit__(*error)
        if not self._passes.hooks:
            self._passes.known.clear()

    def __deepcopy__(self, memo: object) -> Self:
        """Stay the same object, since functions that remember, and hold on to it, stay the same in a copy too."""
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def make(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Call the function and remember its result; see `remember`."""
        made = function(*tensors)
        self.remember(made, function, *tensors)
        return made

    def remember(self, made: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Note that the map `made` equals `function(*tensors)`, layout and bits, whenever it is called.

        So it is for copies and for what is computed element by element, and for nothing that draws random numbers. The
        tensors are kept until backward has read the map: give what is kept anyway, or what is small. They must not be
        written to before that, so leave running statistics out. One that is a remembered map is kept as its recipe.
        A map that shares its storage, with its own tensors or with anything else, is not worth a note.
        """
        if torch.compiler.is_compiling() or not self._passes.hooks or made.is_inference() or not _fills(made):
            return
        storage = made.untyped_storage()
        if any(_storage(each) is storage for each in tensors):
            return
        held = tuple(self._hold(each) for each in tensors)
        recipe = Recipe(function, held, _autocast(made.device.type), _layout(made))
        self._passes.known[storage] = recipe, made._version  # noqa: SLF001

    @not_compiled
    def _hold(self, tensor: Tensor) -> Kept | Window:
        """Return what to keep in place of a tensor that autograd saves."""
        version = tensor._version  # noqa: SLF001
        storage = _storage(tensor)
        recipe, made_at = (None if storage is None else self._passes.known.get(storage)) or (None, version)
        if recipe is None or made_at != version or tensor.dtype not in recipe.layout:
            return Kept(tensor.detach(), version)  # itself, it could be what its own node saves: a circle
        return Window(recipe, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def remembering(ops: Ops, recipes: Recipes) -> Ops:
    """Return the ops with every pooled, up-sampled and joined map remembered, and without indices kept for pooling.

    What the convolutions of `ops` give, they have to remember themselves.
    """
    copied = {kind: _Remembering(ops.functions[kind], recipes) for kind in ("up_sample", "join")}
    return ops.replacing(pool=_Pooling(recipes), **copied)


@dataclass(frozen=True, slots=True)
class _Remembering:
    """A function of an `Ops` that calls another, and remembers. An object, which a network can be pickled with."""

    function: Function
    recipes: Recipes

    def __call__(self, step: Step, layers: list[Any], maps: list[Any]) -> Tensor:
        return self.recipes.make(lambda *each: self.function(step, layers, list(each)), *maps)


@dataclass(frozen=True, slots=True)
class _Pooling:
    """Max-pooling that keeps no indices, remembered."""

    recipes: Recipes

    def __call__(self, step: Step, _: list[Any], maps: list[Any]) -> Tensor:
        return self.recipes.make(partial(pool, factor=step.op.factor, ceil=step.op.how == "ceil"), maps.pop())


def saved_bytes(function: Callable[[], Any]) -> int:
    """Call the function and return the bytes that autograd then holds for backward, recipes included.

    function: runs a forward pass and returns a tensor, or a nest of them, which is dropped before counting. Counted is
    each storage once, and only those that the call made: no parameters, buffers or inputs. Works on meta and fake
    tensors too. Code under torch.compile is not seen into.
    """
    with _Storages() as storages:
        results = function()
    tensors = [each for each in tree_leaves(results) if isinstance(each, Tensor) and each.requires_grad]
    edges = [get_gradient_edge(each) for each in tensors]
    del results, tensors
    gc.collect()  # what merely awaits collection is not held by autograd
    total = sum(int(each.nbytes()) for each in storages.made)
    del edges  # they held the graph until here
    return total


class _Storages(TorchDispatchMode):
    """The storages that ops made, as opposed to those that came to them from outside; weakly, so the dead go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.given: WeakSet[UntypedStorage] = WeakSet()
        self.made: WeakSet[UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.given.update(_all_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self.made.update(each for each in _all_storages(result) if each not in self.given)
        return result


def _all_storages(nest: Any) -> Iterator[UntypedStorage]:
    found = (_storage(each) for each in tree_leaves(nest) if isinstance(each, Tensor))
    return (each for each in found if each is not None)


def _get(held: Kept | Window) -> Tensor:
    return held.get()


def _storage(x: Tensor) -> UntypedStorage | None:
    """Return the object that stands for x's memory; None where there is not one, as for a sparse tensor or in vmap."""
    try:
        return x.untyped_storage()
    except NotImplementedError:
        return None


def _layout(x: Tensor) -> tuple[Any, ...]:
    """Return all that two maps of the same values can differ in: shape, strides, type and device."""
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _fills(x: Tensor) -> bool:
    """Whether x is all of its storage, each element at a place of its own."""
    storage = _storage(x)
    if storage is None or storage.nbytes() != x.numel() * x.itemsize:
        return False
    step = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Make contexts with the autocast that is now in force: backward runs outside of it."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
