"""The device code of `low_resolution.tap_upsample_add`: tap maps of a small map, gathered into the large result.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments.

What a tap adds to a pixel is a mean of at most two rows and two columns of its tap map, and the means are separable:
first two rows of each row of taps are added up, for all columns that the tile reads; then one small product with the
tile's columns of weights does the rest. A tile of 8 columns of the small map reads each of its values from 6 rows
instead of 36 values per pixel, however large the factor.
"""
# ruff: noqa: ANN001 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.pixels import channels_of, zeros


@triton.jit(do_not_specialize=["first", "rows", "low_width", "height", "width", "band"])
def tap_upsample_add(
    taps,  # [N, rows, low_width, kernel rows, kernel columns, O], contiguous
    row_pixels,  # [height, kernel rows * corners]: rows of the small map
    row_weights,  # the same: their weights
    column_pixels,  # [tiles]: the first column of the small map that a tile of outputs reads
    column_weights,  # [tiles, tile_pixels, band]: of the columns from there on, each with its kernel columns
    bias,  # [O] or None
    out,  # [N, height, width, O]
    out_strides,  # N's, height's, width's, O's
    first,  # row of the small map that `taps` begins with
    rows,
    low_width,
    height,
    width,
    out_channels,
    band,  # a multiple of tile_depth
    kernel_rows: tl.constexpr,
    kernel_columns: tl.constexpr,
    corners: tl.constexpr,  # rows that a tap is a mean of: 2, or 1 where it is a copy
    add: tl.constexpr,  # to what `out` holds
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_depth: tl.constexpr,
) -> None:
    """Compute a tile of one row of the result: [tile_pixels, tile_channels].

    Programs that run at the same time take all channels and columns of a few rows, which read the same tap maps.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(out_channels, tile_channels)
    tiles = tl.cdiv(width, tile_pixels)
    o, in_o = channels_of(program % blocks, out_channels, tile_channels)
    tile = program // blocks % tiles
    y = program // (blocks * tiles) % height
    n = program // (blocks * tiles) // height
    x = tile * tile_pixels + tl.arange(0, tile_pixels)  # [tile_pixels]
    reads: tl.constexpr = kernel_rows * corners
    tap_row = kernel_columns * out_channels
    pixel = kernel_rows * tap_row
    begin = tl.load(column_pixels + tile)
    line = (tile * tile_pixels + tl.arange(0, tile_pixels)) * band
    if wide:  # where a row starts is computed from this; within a row of tap maps 32 bits suffice
        n = n.to(tl.int64)

    total = zeros(out, tile_pixels, tile_channels)
    for step in range(0, band, tile_depth):
        k = step + tl.arange(0, tile_depth)  # [tile_depth]
        column = begin + k // kernel_columns
        place = (column * pixel + k % kernel_columns * out_channels)[:, None] + o[None, :]
        half = tl.zeros((tile_depth, tile_channels), dtype=total.dtype)
        for read in tl.static_range(reads):
            weight = tl.load(row_weights + y * reads + read)
            row = tl.load(row_pixels + y * reads + read) - first
            above = (n * rows + row) * low_width * pixel + read // corners * tap_row
            end = tl.where(weight != 0, low_width, 0)  # a row of no weight lies outside, and `taps` may not have it
            inside = (column < end)[:, None] & in_o[None, :]
            half += weight * tl.load(taps + above + place, mask=inside, other=0.0).to(total.dtype)
        along = tl.load(column_weights + line[:, None] + k[None, :])
        total = tl.dot(along, half, total, input_precision="ieee", out_dtype=total.dtype)

    if bias is not None:
        total += tl.load(bias + o, mask=in_o, other=0.0).to(total.dtype)[None, :]
    if wide:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        o = o.to(tl.int64)
    target = n * out_strides[0] + y * out_strides[1] + (x * out_strides[2])[:, None] + (o * out_strides[3])[None, :]
    keep = (x < width)[:, None] & in_o[None, :]
    if add:
        total += tl.load(out + target, mask=keep, other=0.0).to(total.dtype)
    tl.store(out + target, total.to(out.dtype.element_ty), mask=keep)
