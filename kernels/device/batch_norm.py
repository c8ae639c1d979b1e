"""Device code of `skipcost.kernels.ops.batch_norm`: statistics, normalisation and ReLU of a map, and their gradients.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments. Maps are read
and written through the strides of N, H and W, with channels next to each other. Whatever is summed is summed in
float32, or float64 for float64 maps, in an order that the launch fixes: there are no atomics.
"""
# ruff: noqa: ANN001, ANN202 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.conv import summarize
from skipcost.kernels.device.pixels import channels_of, offsets, pixels_of


@triton.jit(do_not_specialize=["batch", "height", "width"])
def tile_statistics(
    y,  # [N, H, W, C]
    y_strides,  # N's, H's, W's
    partials,  # [tiles, 3, C]
    batch,
    height,
    width,
    channels,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Write count, mean and summed squared deviations of a tile of pixels, as the convolution's own kernel does."""
    tile = tl.program_id(0)
    n, i, j, inside = pixels_of(tile, batch, height, width, wide, tile_pixels)
    c, in_c = channels_of(tl.program_id(1), channels, tile_channels)
    keep = inside[:, None] & in_c[None, :]
    values = tl.load(y + offsets(n, i, j, y_strides)[:, None] + c[None, :], mask=keep, other=0.0)
    summarize(values.to(partials.dtype.element_ty), inside, tile, c, in_c, partials, channels)


@triton.jit(do_not_specialize=["tiles"])
def combine(
    partials,  # [tiles, 3, C]
    combined,  # [groups, 3, C]
    tiles,
    channels,
    group: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Combine `group` tiles after another into count, mean and summed squared deviations of all their pixels."""
    c, in_c = channels_of(tl.program_id(1), channels, tile_channels)
    count, mean, spread = _combined(partials, tl.program_id(0), tiles, channels, c, in_c, group)
    row = combined + tl.program_id(0) * 3 * channels + c
    tl.store(row, count, mask=in_c)
    tl.store(row + channels, mean, mask=in_c)
    tl.store(row + 2 * channels, spread, mask=in_c)


@triton.jit(do_not_specialize=["tiles"])
def finish(
    partials,  # [tiles, 3, C], no more than `group` of them
    mean,  # [C]
    variance,  # [C]
    tiles,
    channels,
    group: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Combine the last tiles into the mean and the biased variance; both are 0 where there is no pixel."""
    c, in_c = channels_of(tl.program_id(0), channels, tile_channels)
    count, middle, spread = _combined(partials, 0, tiles, channels, c, in_c, group)
    tl.store(mean + c, middle, mask=in_c)
    tl.store(variance + c, spread / tl.maximum(count, 1.0), mask=in_c)


@triton.jit
def _combined(partials, number, tiles, channels, c, in_c, group: tl.constexpr):
    """Chan, Golub and LeVeque (1983), for many parts at once and in two passes: first the mean, then what is about it.

    Means are averaged as distances from the first of them: where all are large and alike, the average is as exact as
    one of them.
    """
    tile = number * group + tl.arange(0, group)  # [group]
    keep = (tile < tiles)[:, None] & in_c[None, :]
    row = partials + (tile * 3 * channels)[:, None] + c[None, :]  # [group, tile_channels]
    counts = tl.load(row, mask=keep, other=0.0)
    means = tl.load(row + channels, mask=keep, other=0.0)
    spreads = tl.load(row + 2 * channels, mask=keep, other=0.0)
    count = tl.sum(counts, axis=0)
    pivot = tl.load(partials + (number * group * 3 + 1) * channels + c, mask=in_c & (count > 0.0), other=0.0)
    shifts = tl.where(keep, (means - pivot[None, :]) * counts, 0.0)
    mean = pivot + tl.sum(shifts, axis=0) / tl.maximum(count, 1.0)
    away = tl.where(keep, means - mean[None, :], 0.0)
    return count, mean, tl.sum(spreads + away * away * counts, axis=0)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def normalize(
    y,  # [N, H, W, C]
    mean,  # [C]
    variance,  # [C]
    gamma,  # [C]
    beta,  # [C]
    out,  # [N, H, W, C]
    y_strides,  # N's, H's, W's
    out_strides,  # N's, H's, W's
    batch,
    height,
    width,
    channels,
    eps: tl.constexpr,
    relu: tl.constexpr,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Normalise a tile, scale and shift it, and clip it at 0 where asked; ReLU lets NaN through, as PyTorch's does."""
    n, i, j, inside = pixels_of(tl.program_id(0), batch, height, width, wide, tile_pixels)
    c, in_c = channels_of(tl.program_id(1), channels, tile_channels)
    keep = inside[:, None] & in_c[None, :]
    values = tl.load(y + offsets(n, i, j, y_strides)[:, None] + c[None, :], mask=keep, other=0.0)
    _, _, result = _normalized(values, c, in_c, mean, variance, gamma, beta, eps)
    if relu:
        result = tl.where(result <= 0.0, 0.0, result)
    address = offsets(n, i, j, out_strides)[:, None] + c[None, :]
    tl.store(out + address, result.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["batch", "height", "width", "steps"])
def backward_reduce(
    y,  # [N, H, W, C]
    grad,  # [N, H, W, C], of what `normalize` wrote
    mean,  # [C]
    variance,  # [C]
    gamma,  # [C]
    beta,  # [C]
    partials,  # [programs, 2, C]
    y_strides,  # N's, H's, W's
    grad_strides,  # N's, H's, W's
    batch,
    height,
    width,
    channels,
    steps,  # tiles of each program
    eps: tl.constexpr,
    relu: tl.constexpr,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Sum, over the pixels of `steps` tiles, the gradient before ReLU, and its product with the normalised value."""
    c, in_c = channels_of(tl.program_id(1), channels, tile_channels)
    total = tl.zeros((tile_pixels, tile_channels), dtype=partials.dtype.element_ty)
    total_product = tl.zeros((tile_pixels, tile_channels), dtype=partials.dtype.element_ty)
    for step in range(steps):
        tile = tl.program_id(0) * steps + step
        n, i, j, inside = pixels_of(tile, batch, height, width, wide, tile_pixels)
        keep = inside[:, None] & in_c[None, :]
        values = tl.load(y + offsets(n, i, j, y_strides)[:, None] + c[None, :], mask=keep, other=0.0)
        through = tl.load(grad + offsets(n, i, j, grad_strides)[:, None] + c[None, :], mask=keep, other=0.0)
        unit, _, result = _normalized(values, c, in_c, mean, variance, gamma, beta, eps)
        through = through.to(unit.dtype)
        if relu:
            through = tl.where(result <= 0.0, 0.0, through)
        total += through
        total_product += tl.where(keep, through * unit, 0.0)
    row = partials + tl.program_id(0) * 2 * channels + c
    tl.store(row, tl.sum(total, axis=0), mask=in_c)
    tl.store(row + channels, tl.sum(total_product, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def backward_apply(
    y,  # [N, H, W, C]
    grad,  # [N, H, W, C], of what `normalize` wrote
    mean,  # [C]
    variance,  # [C]
    gamma,  # [C]
    beta,  # [C]
    sums,  # [2, C]: what `backward_reduce` sums, over all pixels
    y_grad,  # [N, H, W, C]
    y_strides,  # N's, H's, W's
    grad_strides,  # N's, H's, W's
    y_grad_strides,  # N's, H's, W's
    batch,
    height,
    width,
    channels,
    eps: tl.constexpr,
    relu: tl.constexpr,
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
) -> None:
    """Write gamma / sqrt(variance + eps) * (g - mean(g) - unit * mean(g * unit)), g the gradient before ReLU."""
    n, i, j, inside = pixels_of(tl.program_id(0), batch, height, width, wide, tile_pixels)
    c, in_c = channels_of(tl.program_id(1), channels, tile_channels)
    keep = inside[:, None] & in_c[None, :]
    values = tl.load(y + offsets(n, i, j, y_strides)[:, None] + c[None, :], mask=keep, other=0.0)
    through = tl.load(grad + offsets(n, i, j, grad_strides)[:, None] + c[None, :], mask=keep, other=0.0)
    unit, scale, result = _normalized(values, c, in_c, mean, variance, gamma, beta, eps)
    through = through.to(unit.dtype)
    if relu:
        through = tl.where(result <= 0.0, 0.0, through)
    if wide:
        batch = batch.to(tl.int64)
    count = (batch * height * width).to(unit.dtype)
    mean_grad = tl.load(sums + c, mask=in_c, other=0.0) / count
    mean_product = tl.load(sums + channels + c, mask=in_c, other=0.0) / count
    result = scale[None, :] * (through - mean_grad[None, :] - unit * mean_product[None, :])
    address = offsets(n, i, j, y_grad_strides)[:, None] + c[None, :]
    tl.store(y_grad + address, result.to(y_grad.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def add(
    partials,  # [rows, size]
    total,  # [size]
    rows,
    size,
    tile_rows: tl.constexpr,
    tile_size: tl.constexpr,
) -> None:
    """Add up the rows, always in the same order."""
    i, in_size = channels_of(tl.program_id(0), size, tile_size)
    sums = tl.zeros((tile_rows, tile_size), dtype=partials.dtype.element_ty)
    for first in range(0, rows, tile_rows):
        row = first + tl.arange(0, tile_rows)
        place = (row * size)[:, None] + i[None, :]
        sums += tl.load(partials + place, mask=(row < rows)[:, None] & in_size[None, :], other=0.0)
    tl.store(total + i, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=in_size)


@triton.jit
def _normalized(values, c, in_c, mean, variance, gamma, beta, eps: tl.constexpr):
    """Return (y - mean) / sqrt(variance + eps), the factor of y in the result, and the result before ReLU.

    The product and the sum are one explicit multiply-add, so that forwards and backwards round alike and agree on
    where ReLU clipped.
    """
    middle = tl.load(mean + c, mask=in_c, other=0.0)
    inverse = tl.rsqrt(tl.load(variance + c, mask=in_c, other=1.0) + eps)
    scale = inverse * tl.load(gamma + c, mask=in_c, other=0.0)
    shift = tl.load(beta + c, mask=in_c, other=0.0)
    away = values.to(inverse.dtype) - middle[None, :]
    scales = tl.broadcast_to(scale[None, :], away.shape)
    shifts = tl.broadcast_to(shift[None, :], away.shape)
    return away * inverse[None, :], scale, tl.fma(away, scales, shifts)
