"""What stands behind tap-first up-sampling on a GPU: one product over channels, and one kernel that adds up its taps.

The product makes the tap maps T = (N, h, w, kh, kw, O) of the small map, in fp32 also where map and weight have 16
bits. The kernel reads them and writes out[n, y, x, o] = sum over taps and over the two rows and two columns that
up-sampling takes a mean of, borders exact, plus the bias and, with `add`, what `out` holds. Its result may lie in any
strides: channels_last, NCHW, or a slice of the channels of a wider map.

What is fused: up-sampling, crop, shifts, the sum over taps, bias, rounding, and the concatenation or the sum that the
result goes into. A row's two rows and the tile's columns are separable: 6 loads of a tap map per pixel at 16 pixels a
tile and factor 2 in place of 36, and fewer at larger factors (see `device.tap_upsample_add`).

Bytes saved: of the tap maps nothing but themselves is written and read, 4 kh kw O for each small pixel, twice. Against
a kernel per tap that is 9 passes over the result less; against the direct form, the up-sampled map.

When it loses: at factor 2 in 16 bits the tap maps are 4.5 times as many bytes as the result; with few input channels
they are more than the up-sampled map. The sums over columns run in fp32 without tensor cores.

NaN and infinities of the small map reach all pixels of the tiles that read them, also where their weight is 0.

Tried on no GPU yet: checked in Triton's interpreter, and compiled ahead of time for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from skipcost.kernels.low_resolution import parts as tap_parts
from skipcost.kernels.low_resolution.axis import Axis, Integers, Reals
from skipcost.kernels.low_resolution.blocks import precise_type
from skipcost.kernels.low_resolution.parts import DEPTH, TAP_BYTES, band_depth, corners, tile_pixels
from skipcost.kernels.ops.launch import Launch, on_triton, run, span
from skipcost.kernels.ops.tiles import up_to

LIMIT = 2**31 - 1  # the largest 32-bit number
# Read off binaries of Triton 3.7.1: tiles of 32 channels take 40 to 96 registers and spill on no target. With 64 they
# take up to 150, or spill: on sm_80 or sm_100 with more pixels or 64-bit addresses, on sm_120 with the fewest. A loop
# that fetches ahead (3 stages) takes up to 254, and 55 KB of shared memory.
TILE_CHANNELS = 32
STAGES = 1

Tables = tuple[Tensor, Tensor]
Axes = tuple[Axis, Axis]


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def takes(x: Tensor) -> bool:
    """Whether the kernel runs for maps on x's device; elsewhere `blocks` does."""
    return on_triton(x) and _has_triton()


def fill(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, axes: Axes, *, add: bool = False
) -> None:  # fmt: skip
    """Write the convolution of the up-sampled x over `out`, or add it to what is there.

    x: (N, C, h, w); weight: (O, C, kh, kw); bias: (O,) or None; out: (N, O, H, W) of any strides. A part of the images,
    or of one image's rows, at a time, so that their tap maps have TAP_BYTES at most.
    """
    packed = weight.permute(1, 2, 3, 0).reshape(weight.shape[1], -1)  # (C, kh * kw * O)
    sides = (*weight.shape[2:], weight.shape[0])
    for start, stop, (above, below, first, last) in parts(x, out, sides[0] * sides[1], axes[0]):
        pixels = x[start:stop, :, first:last].permute(0, 2, 3, 1)  # (images, rows, w, C)
        taps = _product(pixels.reshape(-1, x.shape[1]), packed).view(*pixels.shape[:3], *sides)
        result = out[start:stop, :, above:below]
        run(launches(taps, bias, result, axes, top=above, first=first, add=add))
        del taps  # before the next ones are made


def _product(pixels: Tensor, packed: Tensor) -> Tensor:
    """Multiply 16 bits into fp32, which CUDA does at their rate; elsewhere they are widened first."""
    precise = precise_type(pixels.dtype)
    if pixels.is_cuda and pixels.dtype != precise and torch.version.hip is None:
        return torch.mm(pixels, packed, out_dtype=precise)
    return pixels.to(precise) @ packed.to(precise)


def parts(x: Tensor, out: Tensor, taps: int, rows: Axis) -> Iterator[tap_parts.Part]:
    """Yield (start, stop) of images, and of rows: (start, stop) of the result, (first, last) of the small map."""
    row = x.shape[3] * taps * out.shape[1] * precise_type(x.dtype).itemsize
    return tap_parts.parts(x.shape[0], rows, row, TAP_BYTES)


def launches(
    taps: Tensor, bias: Tensor | None, out: Tensor, axes: Axes, *, top: int = 0, first: int = 0, add: bool = False
) -> list[Launch]:  # fmt: skip
    """Return the launch that writes `out`, or adds to it; none where it has no element.

    taps: (N, h', w, kh, kw, O) contiguous, fp32, or fp64 beside an `out` of fp64: rows of the small map from `first`
    on. out: (N, O, H', W), rows of the result from `top` on; no two of its elements share their place.
    """
    if not out.numel():
        return []
    batch, rows, low_width, *sides, out_channels = taps.shape
    if low_width * sides[0] * sides[1] * out_channels > LIMIT:
        message = f"tap maps of shape {tuple(taps.shape)}: a row of them has 2**31 elements or more; take fewer outputs"
        raise ValueError(message)
    height, width = out.shape[2:]
    pixels = tile_pixels(axes[1])
    wide = max(span(taps), span(out)) > LIMIT
    tile_channels = up_to(out_channels, TILE_CHANNELS)
    row_pixels, row_weights = _row_tables(axes[0], taps.dtype, taps.device)
    column_pixels, column_weights = _column_tables(axes[1], pixels, taps.dtype, taps.device)
    arguments = {
        "taps": taps,
        "row_pixels": row_pixels[top : top + height],
        "row_weights": row_weights[top : top + height],
        "column_pixels": column_pixels,
        "column_weights": column_weights,
        "bias": None if bias is None else bias.contiguous(),
        "out": out,
        "out_strides": (out.stride(0), out.stride(2), out.stride(3), out.stride(1)),
        "first": first,
        "rows": rows,
        "low_width": low_width,
        "height": height,
        "width": width,
        "out_channels": out_channels,
        "band": column_weights.shape[2],
    }
    constants = {
        "kernel_rows": sides[0],
        "kernel_columns": sides[1],
        "corners": row_pixels.shape[1] // sides[0],
        "add": add,
        "wide": wide,
        "tile_pixels": pixels,
        "tile_channels": tile_channels,
        "tile_depth": DEPTH,
    }
    grid = (batch * height * len(column_pixels) * -(-out_channels // tile_channels),)
    return [Launch("tap_upsample_add.tap_upsample_add", grid, arguments, constants, stages=STAGES)]


@lru_cache(maxsize=512)  # the same few in every step
def _row_tables(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the pixels that each output's taps read, and their weights: (outputs, taps * corners)."""
    pixels, weights = axis.reads
    read, flat = corners(axis), (axis.output, -1)
    return _tensors(pixels[..., :read].reshape(flat), weights[..., :read].reshape(flat), dtype, device)


@lru_cache(maxsize=512)
def _column_tables(axis: Axis, tile: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the first pixel that each tile of outputs reads, and (tiles, tile, pixels * taps) of weights from it on.

    The last dimension is that of the widest tile, up to a multiple of DEPTH, and 0 where there is nothing.
    """
    bands = axis.blocks(tile)
    read = max(band.last - band.first for band in bands) * axis.kernel
    table = np.zeros((len(bands), tile, band_depth(read)))
    for at, band in enumerate(bands):
        flat = band.weights.swapaxes(1, 2).reshape(band.stop - band.start, -1)  # (outputs, pixels * taps)
        table[at, : flat.shape[0], : flat.shape[1]] = flat
    return _tensors(np.array([band.first for band in bands]), table, dtype, device)


def _tensors(pixels: Integers, weights: Reals, dtype: torch.dtype, device: torch.device) -> Tables:
    with torch.inference_mode(mode=False):  # kept for calls outside of it, too
        made = [torch.from_numpy(np.ascontiguousarray(each)) for each in (pixels.astype(np.int32), weights)]
        return made[0].to(device), made[1].to(device=device, dtype=dtype)
