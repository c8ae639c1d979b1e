"""The gradients of `conv_bn_relu` and its relatives: for networks that are fine-tuned with frozen statistics.

They run on ATen's convolutions, which is cuDNN's on a GPU: once per training step, and never in inference. Nothing but
the inputs and the output is kept for them; the gradient of the scale needs the convolution again.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.conv import dense
from skipcost.kernels.crop_concat import spread
from skipcost.unet_models.ops import crop_all

ONES = [1, 1]


@torch.library.custom_op("skipcost::conv_bn_relu_backward", mutates_args=(), device_types=("cpu", "cuda"))
def backward(
    grad: Tensor,  # (N, O, H', W')
    out: Tensor,  # (N, O, H', W')
    maps: list[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    padding: int,
    relu: bool,
) -> list[Tensor]:
    """Return the gradients of the maps, the weight, the scale and the shift, in this order."""
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    windows = crop_all(maps)
    joined = torch.cat(windows, 1) if len(windows) > 1 else windows[0]
    precise = _precise(weight)
    geometry = (ONES, [padding] * 2, ONES, False, [0, 0], 1)
    raw = torch.ops.aten.convolution(joined, weight, None, *geometry)
    wide = grad.to(precise)
    d_scale, d_shift = (wide * raw).sum((0, 2, 3)), wide.sum((0, 2, 3))
    if scale is not None:
        grad = (wide * scale.view(-1, 1, 1)).to(grad.dtype)
    d_joined, d_weight, _ = torch.ops.aten.convolution_backward(
        grad, joined, weight, None, *geometry, [True, True, False]
    )
    return [*spread(dense(d_joined), maps), d_weight.contiguous(), d_scale, d_shift]


@backward.register_fake
def _(
    _grad: Tensor, _out: Tensor, maps: list[Tensor], weight: Tensor, _scale: Tensor | None, _padding: int, _relu: Any
) -> list[Tensor]:
    vector = weight.new_empty(weight.shape[0], dtype=_precise(weight))
    d_maps = [torch.empty_like(each, memory_format=torch.channels_last) for each in maps]
    return [*d_maps, torch.empty_like(weight, memory_format=torch.contiguous_format), vector, vector.clone()]


@register_flop_formula(torch.ops.skipcost.conv_bn_relu_backward)
def _flops(grad: Any, _out: Any, _maps: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Three convolutions: of the maps again, of their gradients, of the weight's."""
    return int(6 * prod(weight) * grad[0] * prod(grad[2:]))


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    """Keep what `gradients` needs: inputs and output, both of which the network holds anyway."""
    maps, weight, scale, shift, ctx.padding, ctx.relu = inputs[:6]
    ctx.single = isinstance(maps, Tensor)
    ctx.has_scale, ctx.has_shift = scale is not None, shift is not None
    full = output if isinstance(output, Tensor) else output[0]
    ctx.save_for_backward(full, weight, *([scale] if ctx.has_scale else []), *([maps] if ctx.single else maps))


def gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return a gradient for each argument of the op; those that are no tensors have none."""
    out, weight, *rest = ctx.saved_tensors
    scale = rest.pop(0) if ctx.has_scale else None
    *d_maps, d_weight, d_scale, d_shift = backward(grad, out, rest, weight, scale, ctx.padding, ctx.relu)
    first = d_maps[0] if ctx.single else d_maps
    return first, d_weight, d_scale if ctx.has_scale else None, d_shift if ctx.has_shift else None, *[None] * 4


def pooled_gradients(ctx: Any, grad: Tensor | None, pooled_grad: Tensor | None) -> tuple[Any, ...]:
    """Add what comes through the pooled map: to the first largest element of each window, as PyTorch does."""
    out = ctx.saved_tensors[0]
    total = torch.zeros_like(out) if grad is None else grad
    if pooled_grad is not None and pooled_grad.numel():
        _, indices = torch.ops.aten.max_pool2d_with_indices(out, [2, 2])
        window = torch.ops.aten.max_pool2d_with_indices_backward
        total = total + window(pooled_grad, out, [2, 2], [2, 2], [0, 0], ONES, False, indices)
    return gradients(ctx, total)


def _precise(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
