"""The gradients of `conv_bn_relu` and its relatives: for networks that are fine-tuned with frozen statistics.

They run on ATen's convolutions, which is cuDNN's on a GPU: once per training step, and never in inference. Nothing but
the inputs and the output is kept for them; the gradient of the scale needs the convolution again. What needs no
gradient costs nothing.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.ops.batch_norm import precise
from skipcost.kernels.ops.conv import ONES, aten_grads, aten_output
from skipcost.kernels.ops.crop_concat import spread


@torch.library.custom_op("skipcost::conv_bn_relu_backward", mutates_args=(), device_types=("cpu", "cuda"))
def backward(
    grad: Tensor,  # (N, O, H', W')
    out: Tensor,  # (N, O, H', W')
    maps: list[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    padding: int,
    relu: bool,
    wanted: list[bool],  # one for each map, then for the weight, the scale and the shift
) -> list[Tensor]:
    """Return the gradients of the maps, the weight, the scale and the shift, in this order: those that are wanted."""
    *maps_wanted, weight_wanted, scale_wanted, shift_wanted = wanted
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    wide = grad.to(precise(grad))
    results: list[Tensor] = []
    if scale is not None:
        grad = (wide * scale.view(-1, 1, 1)).to(grad.dtype)
    joined_grad, weight_grad = aten_grads(maps, weight, grad, padding=padding, wanted=(any(maps_wanted), weight_wanted))
    if joined_grad is not None:
        results += spread(joined_grad, maps, maps_wanted)
    if weight_grad is not None:
        results.append(weight_grad.contiguous())
    if scale_wanted:
        results.append((wide * aten_output(maps, weight, padding=padding)).sum((0, 2, 3)))
    if shift_wanted:
        results.append(wide.sum((0, 2, 3)))
    return results


@backward.register_fake
def _(
    _grad: Tensor, _out: Tensor, maps: list[Tensor], weight: Tensor, _scale: Any, _padding: int, _relu: bool,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    every = [torch.empty_like(each, memory_format=torch.channels_last) for each in maps]
    every.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    every += [weight.new_empty(weight.shape[0], dtype=precise(weight)) for _ in ("scale", "shift")]
    return [each for each, want in zip(every, wanted, strict=True) if want]


@register_flop_formula(torch.ops.skipcost.conv_bn_relu_backward)
def _flops(grad: Any, _out: Any, _maps: Any, weight: Any, *others: Any, **__: Any) -> int:
    """As many as conv2d for each of the gradients of the joined map, the weight and the scale that is wanted."""
    *maps_wanted, weight_wanted, scale_wanted, _ = others[-1]
    convolutions = any(maps_wanted) + weight_wanted + scale_wanted
    return int(2 * convolutions * prod(weight) * grad[0] * prod(grad[2:]))


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    """Keep what `gradients` needs: inputs and output, both of which the network holds anyway."""
    maps, weight, scale, _, ctx.padding, ctx.relu = inputs[:6]
    ctx.single = isinstance(maps, Tensor)
    ctx.has_scale = scale is not None
    full = output if isinstance(output, Tensor) else output[0]
    ctx.save_for_backward(full, weight, *([scale] if ctx.has_scale else []), *([maps] if ctx.single else maps))


def gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return a gradient for each argument of the op that needs one."""
    out, weight, *rest = ctx.saved_tensors
    scale = rest.pop(0) if ctx.has_scale else None
    maps_need, *others_need = ctx.needs_input_grad[:4]
    wanted = [*([maps_need] if ctx.single else maps_need), *others_need]
    found = iter(backward(grad, out, rest, weight, scale, ctx.padding, ctx.relu, wanted))
    *map_grads, weight_grad, scale_grad, shift_grad = (next(found) if want else None for want in wanted)
    return map_grads[0] if ctx.single else map_grads, weight_grad, scale_grad, shift_grad, *[None] * 4


def pooled_gradients(ctx: Any, grad: Tensor | None, pooled_grad: Tensor | None) -> tuple[Any, ...]:
    """Add what comes through the pooled map: to the first largest element of each window, as PyTorch does."""
    out = ctx.saved_tensors[0]
    total = torch.zeros_like(out) if grad is None else grad
    if pooled_grad is not None and pooled_grad.numel():
        _, indices = torch.ops.aten.max_pool2d_with_indices(out, [2, 2])
        window = torch.ops.aten.max_pool2d_with_indices_backward
        total = total + window(pooled_grad, out, [2, 2], [2, 2], [0, 0], ONES, False, indices)
    return gradients(ctx, total)
