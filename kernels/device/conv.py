"""The device code of the convolutions: stride 1, 3x3 or 1x1, over one map or several side by side, by addresses.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments. Every kernel
computes a tile of `pixels` x `channels` outputs as a product of matrices, [pixels, depth] x [depth, channels], summed
over taps and input channels; all operands are channels-last. `_finish` is the common end: scale, shift, ReLU, and what
else is wanted of the tile while it is in registers.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.pixels import offsets, position, zeros


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def conv(
    sources,  # one per map: [N, H, W, C_i], windows of equal size
    source_channels,  # one per map: C_i
    source_strides,  # one per map: N's, H's, W's
    weight,  # [O, taps, sum of C_i]
    scale,  # [O] or None
    shift,  # [O] or None
    out,  # [N, H', W', O]
    pooled,  # [N, H' // 2, W' // 2, O] or None
    partials,  # [tiles, 3, O] or None
    out_strides,  # N's, H's, W's
    pooled_strides,  # N's, H's, W's, or None
    batch,
    height,
    width,
    out_height,
    out_width,
    in_channels,  # of all maps
    out_channels,
    side: tl.constexpr,  # 3 or 1: taps = side * side
    padding: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,  # of the product: "ieee" or "tf32"
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_depth: tl.constexpr,
    group: tl.constexpr,
) -> None:
    """Convolve the maps as if they were one, their channels side by side; the joined map is never formed."""
    tile, first_channel = _place(
        batch, out_height, out_width, out_channels, pooled, wide, tile_pixels, tile_channels, group
    )
    n, y, x, inside = _pixels(tile, batch, out_height, out_width, pooled, tile_pixels)
    o = first_channel + tl.arange(0, tile_channels)  # [tile_channels]
    in_o = o < out_channels
    total = zeros(out, tile_pixels, tile_channels)
    first = 0
    for source in tl.static_range(len(sources)):
        count = source_channels[source]
        pixel = offsets(n, y, x, source_strides[source])
        blocks = tl.cdiv(count, tile_depth)
        for step in range(side * side * blocks):
            tap = step // blocks
            c = (step - tap * blocks) * tile_depth + tl.arange(0, tile_depth)  # [tile_depth]
            in_c = c < count
            down = tap // side - padding
            right = tap % side - padding
            sy = y + down
            sx = x + right
            in_map = inside & (sy >= 0) & (sy < height) & (sx >= 0) & (sx < width)
            away = down * source_strides[source][1] + right * source_strides[source][2]
            place = (pixel + away)[:, None] + c[None, :]
            a = tl.load(sources[source] + place, mask=in_map[:, None] & in_c[None, :], other=0.0)
            row = o * (side * side * in_channels) + tap * in_channels + first
            b = tl.load(weight + row[None, :] + c[:, None], mask=in_o[None, :] & in_c[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)
        first += count
    _finish(
        total, tile, n, y, x, inside, o, in_o, scale, shift, out, pooled, partials, out_strides, pooled_strides,
        batch, out_height, out_width, out_channels, relu, tile_pixels, tile_channels,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def conv_few(
    source,  # [N, H, W, C]
    source_strides,  # N's, H's, W's, C's: an image may come as it is, channels first
    weight,  # [O, taps, C]
    scale,  # [O] or None
    shift,  # [O] or None
    out,  # [N, H', W', O]
    pooled,  # [N, H' // 2, W' // 2, O] or None
    partials,  # [tiles, 3, O] or None
    out_strides,  # N's, H's, W's
    pooled_strides,  # N's, H's, W's, or None
    batch,
    height,
    width,
    out_height,
    out_width,
    out_channels,
    in_channels: tl.constexpr,
    side: tl.constexpr,
    padding: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_depth: tl.constexpr,  # at least taps * C
    group: tl.constexpr,
) -> None:
    """Convolve a map of so few channels that all taps of all of them are one step of the product."""
    tl.static_assert(side * side * in_channels <= tile_depth)
    tile, first_channel = _place(
        batch, out_height, out_width, out_channels, pooled, wide, tile_pixels, tile_channels, group
    )
    n, y, x, inside = _pixels(tile, batch, out_height, out_width, pooled, tile_pixels)
    o = first_channel + tl.arange(0, tile_channels)  # [tile_channels]
    in_o = o < out_channels
    k = tl.arange(0, tile_depth)  # [tile_depth]
    in_k = k < side * side * in_channels
    tap = k // in_channels
    c = k % in_channels
    sy = y[:, None] + (tap // side)[None, :] - padding  # [tile_pixels, tile_depth]
    sx = x[:, None] + (tap % side)[None, :] - padding
    in_map = inside[:, None] & in_k[None, :] & (sy >= 0) & (sy < height) & (sx >= 0) & (sx < width)
    address = offsets(n[:, None], sy, sx, source_strides) + (c * source_strides[3])[None, :]
    a = tl.load(source + address, mask=in_map, other=0.0)
    row = o * (side * side * in_channels)
    b = tl.load(weight + row[None, :] + k[:, None], mask=in_o[None, :] & in_k[:, None], other=0.0)
    total = zeros(out, tile_pixels, tile_channels)
    total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)
    _finish(
        total, tile, n, y, x, inside, o, in_o, scale, shift, out, pooled, partials, out_strides, pooled_strides,
        batch, out_height, out_width, out_channels, relu, tile_pixels, tile_channels,
    )  # fmt: skip


@triton.jit
def _place(
    batch, out_height, out_width, out_channels, pooled, wide: tl.constexpr,
    tile_pixels: tl.constexpr, tile_channels: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """Return which tile of pixels, and from which output channel on, this program computes.

    Programs that run at the same time take `group` neighbouring tiles and all channels of them, so that the weights
    and the rows that tiles share are still in the L2 cache.
    """
    if wide:  # the tile's number and all that is computed from it, the addresses, become 64 bits wide
        batch = batch.to(tl.int64)
    if pooled is None:
        pixels = batch * out_height * out_width
    else:
        pixels = batch * ((out_height + 1) // 2) * ((out_width + 1) // 2) * 4
    tiles = tl.cdiv(pixels, tile_pixels)
    across = tl.cdiv(out_channels, tile_channels)
    program = tl.program_id(0)
    first = program // (group * across) * group
    rows = tl.minimum(tiles - first, group)
    within = program % (group * across)
    return first + within % rows, (within // rows) * tile_channels


@triton.jit
def _pixels(tile, batch, out_height, out_width, pooled, tile_pixels: tl.constexpr):
    """Return image, row and column of each output pixel of a tile, and whether it exists.

    Where the map is also pooled, four pixels in a row of the tile are one 2x2 window of the map; windows that hang
    over its edge are computed, for the sake of their pixels, and not pooled.
    """
    m = tile * tile_pixels + tl.arange(0, tile_pixels)  # [tile_pixels]
    if pooled is None:
        n, y, x = position(m, out_height, out_width)
    else:
        n, y, x = position(m // 4, (out_height + 1) // 2, (out_width + 1) // 2)
        y = y * 2 + (m % 4) // 2
        x = x * 2 + m % 2
    return n, y, x, (n < batch) & (y < out_height) & (x < out_width)


@triton.jit
def _finish(
    total, tile, n, y, x, inside, o, in_o, scale, shift, out, pooled, partials, out_strides, pooled_strides,
    batch, out_height, out_width, out_channels, relu: tl.constexpr,
    tile_pixels: tl.constexpr, tile_channels: tl.constexpr,
):  # fmt: skip
    """Scale, shift and clip the sums, store them, and derive the pooled map and the statistics from what was stored."""
    stored = finished(total, o, in_o, scale, shift, relu).to(out.dtype.element_ty)
    keep = inside[:, None] & in_o[None, :]
    tl.store(out + offsets(n, y, x, out_strides)[:, None] + o[None, :], stored, mask=keep)
    if partials is not None:
        summarize(stored.to(total.dtype), inside, tile, o, in_o, partials, out_channels)
    if pooled is not None:
        windows: tl.constexpr = tile_pixels // 4
        squares = tl.reshape(stored.to(total.dtype), (windows, 2, 2, tile_channels))
        best = largest_of(tl.permute(squares, (0, 3, 1, 2)))
        m = tile * windows + tl.arange(0, windows)
        pn, py, px = position(m, (out_height + 1) // 2, (out_width + 1) // 2)
        whole = (pn < batch) & (py < out_height // 2) & (px < out_width // 2)
        tl.store(
            pooled + offsets(pn, py, px, pooled_strides)[:, None] + o[None, :],
            best.to(pooled.dtype.element_ty),
            mask=whole[:, None] & in_o[None, :],
        )


@triton.jit
def finished(total, o, in_o, scale, shift, relu: tl.constexpr):
    """Scale and shift the sums per output channel, where asked; ReLU lets NaN through, as PyTorch's does."""
    if scale is not None:
        total = total * tl.load(scale + o, mask=in_o, other=0.0)[None, :]
    if shift is not None:
        total = total + tl.load(shift + o, mask=in_o, other=0.0)[None, :]
    if relu:
        total = tl.where(total <= 0.0, 0.0, total)
    return total


@triton.jit
def summarize(values, inside, tile, o, in_o, partials, out_channels):
    """Write count, mean and summed squared deviations of a tile, per channel; no atomics, so runs are repeatable.

    Masked by pixel alone: what channels past the last one come to is not stored, and a mask of both takes 90 registers.
    """
    count = tl.sum(inside.to(values.dtype), axis=0)
    size = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(inside[:, None], values, 0.0), axis=0) / size  # [tile_channels]
    away = tl.where(inside[:, None], values - mean[None, :], 0.0)
    rest = tl.sum(away, axis=0) / size  # what rounding left of the mean; of values of 1000 +- 1 it shows
    row = partials + tile * 3 * out_channels + o
    tl.store(row, tl.zeros_like(mean) + count, mask=in_o)
    tl.store(row + out_channels, mean + rest, mask=in_o)
    tl.store(row + 2 * out_channels, tl.sum(away * away, axis=0) - rest * rest * size, mask=in_o)


@triton.jit
def largest_of(windows):
    """Maximum over the last two dimensions, 2 x 2; NaN if there is one, as PyTorch's max-pool has it."""
    left, right = tl.split(windows)
    upper, lower = tl.split(_larger(left, right))
    return _larger(upper, lower)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
