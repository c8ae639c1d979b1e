"""The device code of `skipcost.kernels.ops.crop_concat`; the one module of the two that needs triton to be imported.

Triton reads the annotation of a kernel's argument as its type, so arguments are described in comments.
"""
# ruff: noqa: ANN001 - see above
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from skipcost.kernels.device.pixels import offsets, position


@triton.jit
def place(
    sources,  # one per move: [N, S1, S2, S3]
    targets,  # one per move: [N, T1, T2, T3]
    source_strides,  # one per move: N's, S1's, S2's, S3's
    target_strides,  # one per move: N's, T1's, T2's, T3's
    source_sizes,  # one per move: S1, S2, S3
    target_sizes,  # one per move: N * T1 * T2, T1, T2, T3
    shifts,  # one per move: along dimension 1, 2, 3
    tile_rows: tl.constexpr,
    tile_run: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Do all moves: target[n, i, j, k] = source[n, i + shift1, j + shift2, k + shift3], and 0 where that is outside.

    A program owns a tile of tile_rows x tile_run elements of one target. The launcher orders the dimensions so that
    elements adjacent in the target are adjacent in k; a row's number gives its n, i and j. The grid holds the tiles
    of all moves, one move after the other, so a program first finds its move: some comparisons, one branch taken.
    """
    tile = tl.program_id(0)
    if wide:  # all indices are computed from this one, so all of them become 64 bits wide
        tile = tile.to(tl.int64)
    for move in tl.static_range(len(sources)):
        rows, _, _, run = target_sizes[move]
        tiles = tl.cdiv(rows, tile_rows) * tl.cdiv(run, tile_run)
        if (tile >= 0) & (tile < tiles):
            _place_tile(
                tile,
                sources[move],
                targets[move],
                source_strides[move],
                target_strides[move],
                source_sizes[move],
                target_sizes[move],
                shifts[move],
                tile_rows,
                tile_run,
            )
        tile -= tiles


@triton.jit
def _place_tile(
    tile,
    source,
    target,
    source_strides,
    target_strides,
    source_sizes,
    target_sizes,
    shifts,
    tile_rows: tl.constexpr,
    tile_run: tl.constexpr,
) -> None:
    rows, t1, t2, run = target_sizes
    run_tiles = tl.cdiv(run, tile_run)
    row = (tile // run_tiles) * tile_rows + tl.arange(0, tile_rows)  # [tile_rows]
    k = (tile % run_tiles) * tile_run + tl.arange(0, tile_run)  # [tile_run]
    n, i, j = position(row, t1, t2)
    in_target = (row < rows)[:, None] & (k < run)[None, :]  # [tile_rows, tile_run]
    destination = offsets(n, i, j, target_strides)[:, None] + (k * target_strides[3])[None, :]

    i += shifts[0]
    j += shifts[1]
    k += shifts[2]
    row_in_source = (i >= 0) & (i < source_sizes[0]) & (j >= 0) & (j < source_sizes[1])
    in_source = row_in_source[:, None] & ((k >= 0) & (k < source_sizes[2]))[None, :]  # [tile_rows, tile_run]
    origin = offsets(n, i, j, source_strides)[:, None] + (k * source_strides[3])[None, :]
    values = tl.load(source + origin, mask=in_target & in_source, other=0)
    tl.store(target + destination, values, mask=in_target)
