"""The device code of `skipcost.kernels.ops.up_conv`: a 2x2 transposed convolution of stride 2, written into any window.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments.

Strides of 2 and sides of 2 make the four output pixels of an input pixel four products of its channels with four
matrices, and nobody else's. Side by side these matrices are one, [C, 4 * O], whose columns are counted through rows of
the 2x2 block, then its columns, then output channels; so one product of matrices is all there is.
"""
# ruff: noqa: ANN001 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.pixels import offsets, position, zeros


@triton.jit(do_not_specialize=["batch", "height", "width"])
def up_conv(
    x,  # [N, H, W, C]
    weight,  # [2, 2, O, C], contiguous
    bias,  # [O] or None
    out,  # [N, 2H, 2W, O], or a window of it
    x_strides,  # N's, H's, W's
    out_strides,  # N's, H's, W's
    window,  # of [2H, 2W], where `out` is that only: first row, first column, rows, columns; or None
    batch,
    height,
    width,
    in_channels,
    out_channels: tl.constexpr,  # known to the compiler, it divides column numbers without dividing
    precision: tl.constexpr,  # of the product: "ieee" or "tf32"
    wide: tl.constexpr,
    tile_pixels: tl.constexpr,
    tile_channels: tl.constexpr,  # of 4 * O
    tile_depth: tl.constexpr,
) -> None:
    """Multiply a tile of input pixels with a tile of columns, and store each column into its pixel of the 2x2 block.

    Programs that run at the same time take all columns of their pixels, so that these are read from memory once.
    """
    across: tl.constexpr = (4 * out_channels + tile_channels - 1) // tile_channels
    tile = tl.program_id(0)
    m = (tile // across) * tile_pixels + tl.arange(0, tile_pixels)  # [tile_pixels]
    column = (tile % across) * tile_channels + tl.arange(0, tile_channels)  # [tile_channels]
    in_columns = column < 4 * out_channels
    n, py, px = position(m, height, width)
    inside = n < batch
    if wide:  # addresses are computed from these; pixels are counted in 32 bits, dividing 64 takes 50 registers more
        n = n.to(tl.int64)
        py = py.to(tl.int64)
        px = px.to(tl.int64)
        column = column.to(tl.int64)

    pixel = offsets(n, py, px, x_strides)
    total = zeros(out, tile_pixels, tile_channels)
    for first in range(0, in_channels, tile_depth):
        c = first + tl.arange(0, tile_depth)  # [tile_depth]
        in_c = c < in_channels
        a = tl.load(x + pixel[:, None] + c[None, :], mask=inside[:, None] & in_c[None, :], other=0.0)
        b = tl.load(
            weight + (column * in_channels)[None, :] + c[:, None], mask=in_columns[None, :] & in_c[:, None], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)

    o = column % out_channels
    down = column // (2 * out_channels)
    right = column // out_channels - 2 * down
    if bias is not None:
        total += tl.load(bias + o, mask=in_columns, other=0.0).to(total.dtype)[None, :]
    target = offsets(n, 2 * py, 2 * px, out_strides)
    shift = down * out_strides[1] + right * out_strides[2] + o
    keep = inside[:, None] & in_columns[None, :]
    if window is not None:
        row = (2 * py)[:, None] + down[None, :] - window[0]  # [tile_pixels, tile_channels]
        place = (2 * px)[:, None] + right[None, :] - window[1]
        keep = keep & (row >= 0) & (row < window[2]) & (place >= 0) & (place < window[3])
        target -= window[0] * out_strides[1] + window[1] * out_strides[2]
    tl.store(out + target[:, None] + shift[None, :], total.to(out.dtype.element_ty), mask=keep)
