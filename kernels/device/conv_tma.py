"""The device code of the convolutions for sm_90 and newer: the copy engine (TMA) fetches whole blocks of the maps.

A descriptor covers exactly the window of a map that is convolved; what a block reads outside of it is zero, which is
the padding. So no address and no mask is computed in the loop, and five maps cost the registers of one.

Each map's descriptor is an argument of its own: the launchers of Triton 3.6 and 3.7 find none inside of tuples.
"""
# ruff: noqa: ANN001 - Triton reads the annotation of a kernel's argument as its type
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.conv import finished, largest_of, summarize
from skipcost.kernels.device.pixels import position


@triton.jit(do_not_specialize=["out_height", "out_width"])
def conv(
    map_0,  # of each map: descriptor of [N, H, W, C_i], windows of equal size; block [1, rows, columns, depth]; or None
    map_1,
    map_2,
    map_3,
    map_4,
    map_5,
    map_6,
    map_7,
    source_channels,  # one per map: C_i
    weight,  # descriptor of [O, taps * sum of C_i]; block [channels, depth]
    scale,  # [O] or None
    shift,  # [O] or None
    out,  # descriptor of [N, H', W', O]; block [1, rows, columns, channels]
    pooled,  # descriptor of [N, H' // 2, W' // 2, O]; block [1, rows / 2, columns / 2, channels]; or None
    partials,  # [tiles, 3, O] or None
    out_height,
    out_width,
    in_channels,  # of all maps
    out_channels,
    side: tl.constexpr,  # 3 or 1: taps = side * side
    padding: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,  # of the product: "ieee" or "tf32"
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_depth: tl.constexpr,
) -> None:
    """Convolve the maps as if they were one, their channels side by side; the joined map is never formed.

    A block that reaches past a map's last channel reads zeros of the map beside weights of the next one: their
    product is zero, unless such a weight is not finite; the launcher lets depth divide the channels of all maps.
    """
    across = tl.cdiv(out_channels, tile_channels)
    program = tl.program_id(0)
    first_channel = (program % across) * tile_channels
    tile = program // across
    tiles_across = tl.cdiv(out_width, tile_columns)
    tiles_down = tl.cdiv(out_height, tile_rows)
    n, down, right = position(tile, tiles_down, tiles_across)
    top = down * tile_rows
    left = right * tile_columns
    pixels: tl.constexpr = tile_rows * tile_columns
    total = tl.zeros((pixels, tile_channels), dtype=tl.float32)
    first = 0
    sources = (map_0, map_1, map_2, map_3, map_4, map_5, map_6, map_7)
    for source in tl.static_range(len(source_channels)):
        count = source_channels[source]
        blocks = tl.cdiv(count, tile_depth)
        for step in range(side * side * blocks):
            tap = step // blocks
            c = (step - tap * blocks) * tile_depth
            a = sources[source].load([n, top + tap // side - padding, left + tap % side - padding, c])
            b = weight.load([first_channel, tap * in_channels + first + c])
            total = tl.dot(tl.reshape(a, (pixels, tile_depth)), b.T, total, input_precision=precision)
        first += count
    o = first_channel + tl.arange(0, tile_channels)  # [tile_channels]
    in_o = o < out_channels
    stored = finished(total, o, in_o, scale, shift, relu).to(out.dtype)
    out.store([n, top, left, first_channel], tl.reshape(stored, (1, tile_rows, tile_columns, tile_channels)))
    if partials is not None:
        m = tl.arange(0, pixels)
        inside = (top + m // tile_columns < out_height) & (left + m % tile_columns < out_width)
        summarize(stored.to(tl.float32), inside, tile, o, in_o, partials, out_channels)
    if pooled is not None:
        squares = tl.reshape(stored.to(tl.float32), (tile_rows // 2, 2, tile_columns // 2, 2, tile_channels))
        best = largest_of(tl.permute(squares, (0, 2, 4, 1, 3))).to(pooled.dtype)
        best = tl.reshape(best, (1, tile_rows // 2, tile_columns // 2, tile_channels))
        pooled.store([n, top // 2, left // 2, first_channel], best)
