"""What tests of `Recipes` share: small maps, and blocks that keep nothing or write where they may not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.recompute import Recipes

SHAPE = (1, 2, 6, 6)
BYTES = 4 * 72  # of a map of that shape in fp32
FORMATS = (torch.contiguous_format, torch.channels_last)


class Affine(torch.autograd.Function):
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
    """What `Affine` does to the numbers."""
    return y * 2 + 1


def remembered(recipes: Recipes, y: Tensor) -> Tensor:
    """Make a map of y that autograd does not hold by itself, and remember it."""
    z: Tensor = Affine.apply(y)
    recipes.remember(z, affine, y)
    return z


def leaf(*, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Make a map that wants a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


class Overwrites(torch.autograd.Function):
    """A square whose backward writes into what it kept, and passes that on."""

    @staticmethod
    def forward(ctx: Any, each: Tensor) -> Tensor:
        ctx.save_for_backward(each)
        return each.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad: Tensor = ctx.saved_tensors[0].mul_(2 * grads[0])
        return grad
