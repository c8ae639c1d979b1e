"""Where the pixels of a tile lie, for every kernel: device code that counts pixels, channels and offsets.

Pixels are counted through columns, then rows, then images. What is computed with them is the business of the kernels.
"""
# ruff: noqa: ANN001, ANN201 - Triton reads the annotation of a function's argument as its type
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position(pixel, height, width):
    """Return image, row and column of pixels by their number in maps of `height` x `width`."""
    return pixel // width // height, (pixel // width) % height, pixel % width


@triton.jit
def pixels_of(tile, batch, height, width, wide: tl.constexpr, tile_pixels: tl.constexpr):
    """Return image, row and column of each pixel of a tile, and whether it exists; all [tile_pixels]."""
    if wide:  # all addresses are computed from this one, so all of them become 64 bits wide
        tile = tile.to(tl.int64)
    n, i, j = position(tile * tile_pixels + tl.arange(0, tile_pixels), height, width)
    return n, i, j, n < batch


@triton.jit
def channels_of(block, channels, tile_channels: tl.constexpr):
    """Return the channels of a block, and whether each exists; both [tile_channels]."""
    c = block * tile_channels + tl.arange(0, tile_channels)
    return c, c < channels


@triton.jit
def offsets(n, i, j, strides):
    """Return where the pixels of a map start, in elements."""
    return n * strides[0] + i * strides[1] + j * strides[2]


@triton.jit
def zeros(out, tile_pixels: tl.constexpr, tile_channels: tl.constexpr):
    """Sums start as zeros of 32 bits, or of 64 where the results have them."""
    if out.dtype.element_ty == tl.float64:
        total = tl.zeros((tile_pixels, tile_channels), dtype=tl.float64)
    else:
        total = tl.zeros((tile_pixels, tile_channels), dtype=tl.float32)
    return total
