"""ReLU of several maps and their concatenation in one buffer; reference: ReLU of each in place, then `torch.cat`.

Bytes saved: autograd keeps ReLU's result, and the convolution behind keeps what it reads, the same numbers in a copy.
Here one buffer is both, for backward too. Without gradients a map is dropped as soon as it is in its place, before the
next one is made: beside the concatenation there is one of them, not all.

The copy is saved as well, so it never loses where ReLU's input is kept by nobody, as a norm's result is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.unet_models.ops import crop


def relu_concat(maps: Iterable[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Return ReLU of the maps, centre-cropped and concatenated.

    maps: at least one, (N, C_i, H_i, W_i), all of one type, taken one after the other. shape: (sum of C_i, smallest
    H_i, smallest W_i) of the result, whose layout is that of the first map. Differentiable.
    """
    if not torch.is_grad_enabled():
        return _fill(maps, shape)
    result: Tensor = _ReluConcat.apply(shape, *maps)  # type: ignore[no-untyped-call]
    return result


def _fill(maps: Iterable[Tensor], shape: tuple[int, int, int]) -> Tensor:
    result, start = None, 0
    for each in maps:
        if result is None:
            result = _room(each, shape)
        torch.clamp_min(crop(each, *shape[1:]), 0, out=result.narrow(1, start, each.shape[1]))
        start += each.shape[1]
        del each  # else it would live until the next one is there
    if result is None or start != shape[0]:
        message = f"relu_concat got maps of {start} channels in all for a result of {shape[0]}: give all that it is of"
        raise ValueError(message)
    return result


def _room(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    last = x.stride(1) == 1 and not x.is_contiguous()  # of a crop too, which no layout's own question says yes to
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((x.shape[0], *shape), dtype=x.dtype, device=x.device, memory_format=layout)


class _ReluConcat(torch.autograd.Function):
    """As an autograd function whose only saved tensor is its result."""

    @staticmethod
    def forward(shape: tuple[int, int, int], *maps: Tensor) -> Tensor:
        return _fill(maps, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.sizes = [tuple(each.shape[1:]) for each in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given: list[Tensor | None] = [None]
        start = 0
        for (channels, *size), needed in zip(ctx.sizes, ctx.needs_input_grad[1:], strict=True):
            above, below = (each.narrow(1, start, channels) for each in (*grads, *ctx.saved_tensors))
            start += channels
            given.append(_uncropped(torch.ops.aten.threshold_backward(above, below, 0), *size) if needed else None)
        return tuple(given)


def _uncropped(x: Tensor, height: int, width: int) -> Tensor:
    """Surround a map by zeros where `crop` took its rim away, in the map's layout."""
    (more, top), (further, left) = (
        (side - seen, (side - seen) // 2) for side, seen in zip((height, width), x.shape[2:], strict=True)
    )
    return functional.pad(x, (left, further - left, top, more - top)) if more or further else x
