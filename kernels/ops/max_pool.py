"""Max-pooling that keeps no indices for its backward pass: they are found again in the map that was pooled.

Kept by PyTorch: 8 bytes for each pixel of the result, in 16 bits and by 2 as much as the map itself. Here nothing but
the map, which a recipe may stand for (`recompute`). Values and gradients are PyTorch's to the last bit, ties included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def pool(x: Tensor, factor: int, *, ceil: bool) -> Tensor:
    """Take the place of `Ops.pool`: max-pool (N, C, H, W) by `factor`, the same values and gradients to the last bit.

    Where no gradient is asked for, it is PyTorch's own, without an op's overhead.
    """
    if x.ndim != 4 or not x.is_floating_point():  # noqa: PLR2004 - N, C, H, W
        message = f"pool got a map of shape {tuple(x.shape)} and {x.dtype}: it takes floating point of (N, C, H, W)"
        raise ValueError(message)
    if factor < 1:
        message = f"pool got factor={factor}: a window has one pixel or more a side"
        raise ValueError(message)
    if min(x.shape[2:]) < (1 if ceil else factor):
        size = "x".join(map(str, x.shape[2:]))
        message = f"pool got a {size} map, in which no window of {factor}x{factor} fits: give a larger one"
        raise ValueError(message)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return functional.max_pool2d(x, factor, ceil_mode=ceil)
    result: Tensor = _pool(x, factor, ceil)
    return result


def _pooled(x: Tensor, factor: int, ceil: bool) -> Tensor:
    return functional.max_pool2d(x, factor, ceil_mode=ceil)


def _spread(grad: Tensor, x: Tensor, factor: int, ceil: bool) -> Tensor:
    window, padding, dilation = [factor, factor], [0, 0], [1, 1]
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    result: Tensor = backward(grad, x, window, window, padding, dilation, ceil, _largest(x, factor, ceil))
    return result


def _largest(x: Tensor, factor: int, ceil: bool) -> Tensor:
    """Return where in each plane of x the largest pixel of each window is, the first of equals: (N, C, H', W')."""
    indices: Tensor
    _, indices = functional.max_pool2d_with_indices(x.detach(), (factor, factor), ceil_mode=ceil)
    return indices


_pool = torch.library.custom_op("skipcost::max_pool", _pooled, mutates_args=(), device_types=("cpu", "cuda"))
_pool_backward = torch.library.custom_op(
    "skipcost::max_pool_backward", _spread, mutates_args=(), device_types=("cpu", "cuda")
)
_pool.register_fake(_pooled)
_pool_backward.register_fake(_spread)


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *_, x, ctx.factor, ctx.ceil = inputs
    ctx.save_for_backward(x)


def _pool_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _pool_backward(grad, *ctx.saved_tensors, ctx.factor, ctx.ceil), None, None


def _pool_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Pick the pixels that the gradient went to; x only says which, and gets nothing."""
    (x,) = ctx.saved_tensors
    indices = _largest(x, ctx.factor, ctx.ceil)
    return grad.flatten(2).gather(2, indices.flatten(2)).view_as(indices), None, None, None


_pool.register_autograd(_pool_gradient, setup_context=_keep_input)
_pool_backward.register_autograd(_pool_second_gradient, setup_context=_keep_input)
