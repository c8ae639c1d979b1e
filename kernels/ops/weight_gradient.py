"""How the gradient of a convolution's weight is launched: over windows of maps, as if their channels were one map's.

A weight has few elements, each a sum over all pixels of a batch. So the pixels are split among programs, and the sums
of the splits are added afterwards; how many splits there are follows from the shapes alone, so that the same input
gives the same bits in every run.

When it loses: with tf32 on sm_90, whose tensor cores want both operands along the pixels; they lie along the channels,
and are copied 4 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.ops.batch_norm import add_launch, precise, strides
from skipcost.kernels.ops.launch import Launch, span
from skipcost.kernels.ops.tiles import FEW_CHANNELS, up_to

PROGRAMS = 1024  # several for each multiprocessor of a large GPU; with more, there would be more sums to add up


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work is cut: a program takes outputs x inputs channels over `steps` tiles of pixels, one of `splits`."""

    few: bool
    pixels: int
    outputs: int
    inputs: int
    splits: int
    steps: int


def weight_gradient_launches(
    sources: Sequence[Tensor], grad: Tensor, total: Tensor, *, padding: int, tf32: bool = False
) -> list[Launch]:
    """Write the gradient of the weight to total (O, side, side, sum of C_i), contiguous, of any floating type.

    sources: (N, C_i, H, W) of equal N, H and W, channel stride 1; a crop is a view; a single map of few channels may
    have any strides. grad: (N, O, H', W') of the same type and channel stride 1. tf32: round 32-bit operands to 10
    bits, as tensor cores do. The sums are kept in fp32 (fp64 for fp64).
    """
    partials = grad.new_empty((cut_of(sources, grad, total.shape[1]).splits, *total.shape), dtype=precise(grad))
    return [_products(sources, grad, partials, padding=padding, tf32=tf32), add_launch(partials, total)]


def _products(sources: Sequence[Tensor], grad: Tensor, partials: Tensor, *, padding: int, tf32: bool) -> Launch:
    """Write each split's sum to partials (splits, O, side, side, sum of C_i)."""
    side = partials.shape[2]
    cut = cut_of(sources, grad, side)
    batch, _, height, width = sources[0].shape
    pixels = _pixels(grad) + (cut.steps + 1) * cut.pixels  # the last split's tiles may lie beyond the last pixel
    constants: dict[str, Any] = {
        "side": side,
        "padding": padding,
        "precision": "tf32" if tf32 and grad.dtype == torch.float32 else "ieee",
        "wide": max(pixels, *(span(each) for each in (*sources, grad))) >= 2**31,
        "tile_pixels": cut.pixels,
        "tile_outputs": cut.outputs,
        "tile_inputs": cut.inputs,
    }
    arguments: dict[str, Any] = {"grad": grad, "partials": partials, "grad_strides": strides(grad)}
    arguments |= {"batch": batch, "height": height, "width": width, "out_height": grad.shape[2]}
    arguments |= {"out_width": grad.shape[3], "out_channels": grad.shape[1], "steps": cut.steps}
    across = -(-grad.shape[1] // cut.outputs)
    warps = 8 if cut.outputs >= 64 else 4  # noqa: PLR2004 - as many blocks fit sm_90 as of 4 warps, with half the work
    if cut.few:
        (source,) = sources
        arguments |= {"source": source, "source_strides": (*strides(source), source.stride(1))}
        constants["in_channels"] = source.shape[1]
        return Launch("weight_gradient.weight_gradient_few", (cut.splits, across), arguments, constants, warps)
    arguments |= {
        "sources": tuple(sources),
        "source_channels": tuple(each.shape[1] for each in sources),
        "source_strides": tuple(strides(each) for each in sources),
        "in_channels": partials.shape[4],
    }
    grid = (cut.splits * side**2, across, sum(-(-each.shape[1] // cut.inputs) for each in sources))
    return Launch("weight_gradient.weight_gradient", grid, arguments, constants, warps)


def cut_of(sources: Sequence[Tensor], grad: Tensor, side: int) -> Cut:
    """Cut by rules: enough programs to fill a GPU, but no split of less than a tile of pixels."""
    channels = [each.shape[1] for each in sources]
    few = len(channels) == 1 and channels[0] <= FEW_CHANNELS
    outputs = up_to(grad.shape[1], 128)
    inputs = up_to(side**2 * channels[0], 64) if few else up_to(max(channels), 64)
    pixels = 64 if grad.itemsize == 2 else 32  # noqa: PLR2004 - so that a tile takes the same memory in 32 bits
    blocks = -(-grad.shape[1] // outputs)
    blocks *= 1 if few else side**2 * sum(-(-each // inputs) for each in channels)
    tiles = max(1, -(-_pixels(grad) // pixels))
    steps = min(tiles, -(-tiles * blocks // PROGRAMS))
    return Cut(few, pixels, outputs, inputs, -(-tiles // steps), steps)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]
