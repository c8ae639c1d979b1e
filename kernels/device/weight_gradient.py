"""The device code of `skipcost.kernels.ops.weight_gradient`: the gradient of a convolution's weight, without atomics.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments. Each program
sums, over its own pixels, products of the output's gradient with the input: a product of matrices, [outputs, pixels] x
[pixels, inputs]. It writes the sum to a place of its own; what the splits of the pixels gave is added up afterwards.
"""
# ruff: noqa: ANN001 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.pixels import channels_of, offsets, pixels_of


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width", "steps"])
def weight_gradient(
    sources,  # one per map: [N, H, W, C_i], windows of equal size
    grad,  # [N, H', W', O], of what the convolution wrote
    partials,  # [splits, O, taps, sum of C_i]
    source_channels,  # one per map: C_i
    source_strides,  # one per map: N's, H's, W's
    grad_strides,  # N's, H's, W's
    batch,
    height,
    width,
    out_height,
    out_width,
    in_channels,  # of all maps
    out_channels,
    steps,  # tiles of pixels in each split
    side: tl.constexpr,  # 3 or 1: taps = side * side
    padding: tl.constexpr,
    precision: tl.constexpr,  # of the product: "ieee" or "tf32"
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
) -> None:
    """Sum the products of one tap, for a tile of output and input channels, over the pixels of one split.

    The grid holds the tiles of input channels of all maps, one map after the other: a program first finds its map. The
    taps of a split run next to each other, so that what they read is still in the L2 cache.
    """
    block = tl.program_id(2)
    first = 0
    for source in tl.static_range(len(sources)):
        blocks = tl.cdiv(source_channels[source], tile_inputs)
        if (block >= 0) & (block < blocks):
            _sum_products(
                sources[source], grad, partials, source_channels[source], source_strides[source], grad_strides,
                batch, height, width, out_height, out_width, first, block, in_channels, out_channels, steps,
                side, padding, precision, wide, tile_pixels, tile_outputs, tile_inputs,
            )  # fmt: skip
        block -= blocks
        first += source_channels[source]


@triton.jit
def _sum_products(
    source, grad, partials, channels, source_strides, grad_strides,
    batch, height, width, out_height, out_width, first, block, in_channels, out_channels, steps,
    side: tl.constexpr, padding: tl.constexpr, precision: tl.constexpr, wide: tl.constexpr,
    tile_pixels: tl.constexpr, tile_outputs: tl.constexpr, tile_inputs: tl.constexpr,
) -> None:  # fmt: skip
    tap = tl.program_id(0) % (side * side)
    split = tl.program_id(0) // (side * side)
    o, in_o = channels_of(tl.program_id(1), out_channels, tile_outputs)
    c, in_c = channels_of(block, channels, tile_inputs)
    total = tl.zeros((tile_outputs, tile_inputs), dtype=partials.dtype.element_ty)
    for step in range(steps):
        n, y, x, inside = pixels_of(split * steps + step, batch, out_height, out_width, wide, tile_pixels)
        place = offsets(n, y, x, grad_strides)[None, :] + o[:, None]
        a = tl.load(grad + place, mask=inside[None, :] & in_o[:, None], other=0.0)  # [tile_outputs, tile_pixels]
        y += tap // side - padding
        x += tap % side - padding
        in_map = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = offsets(n, y, x, source_strides)[:, None] + c[None, :]
        b = tl.load(source + place, mask=in_map[:, None] & in_c[None, :], other=0.0)  # [tile_pixels, tile_inputs]
        total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)
    row = ((split * out_channels + o) * (side * side) + tap) * in_channels + first
    tl.store(partials + row[:, None] + c[None, :], total, mask=in_o[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width", "steps"])
def weight_gradient_few(
    source,  # [N, H, W, C]
    grad,  # [N, H', W', O], of what the convolution wrote
    partials,  # [splits, O, taps, C]
    source_strides,  # N's, H's, W's, C's: an image may come as it is, channels first
    grad_strides,  # N's, H's, W's
    batch,
    height,
    width,
    out_height,
    out_width,
    out_channels,
    steps,  # tiles of pixels in each split
    in_channels: tl.constexpr,
    side: tl.constexpr,
    padding: tl.constexpr,
    precision: tl.constexpr,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,  # at least taps * C
) -> None:
    """Sum the products of all taps of a map of few channels: the output's gradient, which is large, is read once."""
    split = tl.program_id(0)
    o, in_o = channels_of(tl.program_id(1), out_channels, tile_outputs)
    k, in_k = channels_of(0, side * side * in_channels, tile_inputs)
    tap = k // in_channels
    total = tl.zeros((tile_outputs, tile_inputs), dtype=partials.dtype.element_ty)
    for step in range(steps):
        n, y, x, inside = pixels_of(split * steps + step, batch, out_height, out_width, wide, tile_pixels)
        place = offsets(n, y, x, grad_strides)[None, :] + o[:, None]
        a = tl.load(grad + place, mask=inside[None, :] & in_o[:, None], other=0.0)  # [tile_outputs, tile_pixels]
        sy = y[:, None] + (tap // side)[None, :] - padding  # [tile_pixels, tile_inputs]
        sx = x[:, None] + (tap % side)[None, :] - padding
        in_map = inside[:, None] & in_k[None, :] & (sy >= 0) & (sy < height) & (sx >= 0) & (sx < width)
        place = offsets(n[:, None], sy, sx, source_strides) + (k % in_channels * source_strides[3])[None, :]
        b = tl.load(source + place, mask=in_map, other=0.0)
        total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)
    row = (split * out_channels + o) * (side * side * in_channels)
    tl.store(partials + row[:, None] + k[None, :], total, mask=in_o[:, None] & in_k[None, :])
