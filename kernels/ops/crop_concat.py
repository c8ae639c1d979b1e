"""Centre-crop maps to the smallest of them and concatenate their channels; the reference is `unet_models.ops.merge`.

What is fused: the crops and the concatenation, one launch for all maps; and backwards, for all cropped maps in one
launch, the zero frame and the window of each gradient. A map that was not cropped gets a view, as in the reference.
Bit-exact: values are copied, never computed with.

Bytes saved: forwards none, torch.cat already reads the windows through views. Backwards autograd fills and copies
twice per cropped map, once for each sliced dimension: for a map H x W cut to h x w it moves HW + 3hW + 2hw elements
per channel, this kernel HW + hw. Over the four skips of the 2015 U-Net at 572 in 16 bits that is 314 MB against
114 MB per image. Autograd's gradient is NCHW whatever the map was, this one keeps the map's memory format, which
saves the convolution behind it a conversion.

When it loses: with padding=same nothing is cropped, and it is torch.cat at best, plus the cost of calling a Python op.
In NCHW with a width that 16 does not divide, it reads and writes one element per instruction. The tile is not tuned.

Tried on no GPU yet: checked in Triton's interpreter, and compiled ahead of time for sm_80 and sm_90.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.ops.checks import check_maps
from skipcost.kernels.ops.launch import Launch, on_triton, run, span
from skipcost.unet_models.ops import crop, crop_all
from skipcost.unet_models.ops import merge as reference_merge

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
TILE = 2048  # elements per program: in 16 bits, two 16-byte loads in flight for each of 128 threads
MAX_RUN = 128  # of them in a row


@dataclass(frozen=True, slots=True)
class Move:
    """One map to write: target[n, c, y, x] = source[n, c, y + down, x + right], and 0 where that is outside.

    source and target have the same N and C and any strides; no two elements of the target share their place.
    """

    source: Tensor  # (N, C, H, W)
    target: Tensor  # (N, C, H', W')
    down: int
    right: int


def merge(maps: list[Tensor], how: str) -> Tensor:
    """Take the place of `Ops.merge`: "concat" through the kernel, the rest through the reference.

    So are maps of different types, which autocast leaves behind group norm: the kernel copies and does not convert.
    """
    if how != "concat":
        return reference_merge(maps, how)
    if len({each.dtype for each in maps}) > 1:
        message = "merging maps of different types runs as the PyTorch reference: the crop_concat kernel converts none"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return reference_merge(maps, how)
    return crop_concat(maps)


def crop_concat(maps: Sequence[Tensor]) -> Tensor:
    """Centre-crop maps (N, C_i, H_i, W_i) to the smallest height and width: (N, sum of C_i, min H_i, min W_i).

    The result has the memory format that torch.cat would give it; a single map is returned as it is. CPU tensors take
    the reference unless TRITON_INTERPRET=1, which must then be set before triton is first imported.
    """
    check_maps("crop_concat", maps, DTYPES)
    result: Tensor = maps[0] if len(maps) == 1 else _forward(list(maps))
    return result


@torch.library.custom_op("skipcost::crop_concat", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(maps: list[Tensor]) -> Tensor:
    windows = crop_all(maps)
    if not on_triton(maps[0]):
        return torch.cat(windows, 1)
    batch, _, height, width = windows[0].shape
    channels = [each.shape[1] for each in maps]
    out = _empty(maps[0], (batch, sum(channels), height, width), all(like_channels_last(each) for each in windows))
    run(launches([centred(*pair) for pair in zip(maps, out.split(channels, 1), strict=True)]))
    return out


@_forward.register_fake
def _(maps: list[Tensor]) -> Tensor:
    return torch.cat(crop_all(maps), 1)


@torch.library.custom_op("skipcost::crop_concat_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    grad: Tensor,  # (N, all channels, h, w)
    starts: list[int],  # of the cropped maps, one number each: the first of its channels in `grad`
    channels: list[int],
    heights: list[int],
    widths: list[int],
    channels_last: list[bool],
) -> list[Tensor]:
    """Return, for each cropped map, its gradient (N, C_i, H_i, W_i): a window of `grad` in a frame of zeros."""
    windows = [grad.narrow(1, start, count) for start, count in zip(starts, channels, strict=True)]
    return _framed(windows, _empty_grads(grad, channels, heights, widths, channels_last))


def spread(grad: Tensor, maps: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Give each map (N, C_i, H_i, W_i) that is wanted its part of the gradient of them all, cropped and side by side.

    grad: (N, sum of C_i, h, w). What was cropped away gets zeros; the results are channels_last and share no memory.
    """
    if len(maps) == 1 and maps[0].shape == grad.shape:
        return [grad]
    parts = zip(grad.split([each.shape[1] for each in maps], 1), maps, wanted, strict=True)
    pairs = [(window, _empty(grad, tuple(each.shape), channels_last=True)) for window, each, want in parts if want]
    windows, grads = zip(*pairs, strict=True)
    return _framed(windows, list(grads))


def _framed(windows: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Fill each gradient with its window, in a frame of zeros."""
    if on_triton(grads[0]):
        run(launches([centred(*pair) for pair in zip(windows, grads, strict=True)]))
        return grads
    for window, each in zip(windows, grads, strict=True):
        crop(each.zero_(), *window.shape[-2:]).copy_(window)
    return grads


@_backward.register_fake
def _(grad: Tensor, _starts: list[int], *shapes: Any) -> list[Tensor]:
    return _empty_grads(grad, *shapes)


def _empty_grads(
    grad: Tensor, channels: list[int], heights: list[int], widths: list[int], channels_last: list[bool]
) -> list[Tensor]:
    sizes = zip(channels, heights, widths, strict=True)
    return [_empty(grad, (grad.shape[0], *size), last) for size, last in zip(sizes, channels_last, strict=True)]


def keep_shapes(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    """Keep what `gradients` needs: no map, only what shape and layout each has."""
    ctx.shapes = [each.shape for each in inputs[0]]
    ctx.channels_last = [like_channels_last(each) for each in inputs[0]]
    ctx.size = output.shape[-2:]


def gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Write the gradients of the cropped maps that need one; the others' are views of `grad`, or nothing."""
    needed: list[bool] = ctx.needs_input_grad[0]
    counts = [shape[1] for shape in ctx.shapes]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    cropped = [index for index, shape in enumerate(ctx.shapes) if needed[index] and shape[-2:] != ctx.size]
    grads = [grad.narrow(1, *span) if need else None for need, *span in zip(needed, starts, counts, strict=True)]
    if cropped:
        _, channels, heights, widths = zip(*(ctx.shapes[index] for index in cropped), strict=True)
        formats = [ctx.channels_last[index] for index in cropped]
        written = _backward(grad, [starts[index] for index in cropped], channels, heights, widths, formats)
        for index, each in zip(cropped, written, strict=True):
            grads[index] = each
    return grads


_forward.register_autograd(gradients, setup_context=keep_shapes)


def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def like_channels_last(x: Tensor) -> bool:
    """Whether torch.cat takes (N, C, H, W) for channels_last, gaps allowed; PyTorch has no public name for it.

    Strides must not fall in the order C, W, H, N. Where sizes of 1 leave that open, it is contiguous.
    """
    shape, strides = x.shape, x.stride()
    if 0 in shape or strides[1] == 0:
        return False
    least = 0
    for dimension in (1, 3, 2):
        if strides[dimension] < least:
            return False
        least = strides[dimension] * shape[dimension]
    return strides[0] >= least and least != strides[1]


def centred(source: Tensor, target: Tensor) -> Move:
    """Lay the smaller of the two maps on the middle of the larger, at offset (H - h) // 2 in both directions."""
    down, right = (math.trunc((source.shape[axis] - target.shape[axis]) / 2) for axis in (2, 3))
    return Move(source, target, down, right)


def launches(moves: Sequence[Move]) -> list[Launch]:
    """One launch that does all moves whose targets have elements; none if there is nothing to write."""
    moves = [move for move in moves if move.target.numel()]
    if not moves:
        return []
    source_strides, target_strides, source_sizes, target_sizes, shifts = zip(*map(_numbers, moves), strict=True)
    tile_run = min(1 << (max(sizes[3] for sizes in target_sizes) - 1).bit_length(), MAX_RUN, TILE)
    rows = TILE // tile_run
    programs = sum(-(-sizes[0] // rows) * -(-sizes[3] // tile_run) for sizes in target_sizes)
    wide = any(span(each) >= 2**31 - TILE for move in moves for each in (move.source, move.target))
    arguments = {
        "sources": tuple(move.source for move in moves),
        "targets": tuple(move.target for move in moves),
        "source_strides": source_strides,
        "target_strides": target_strides,
        "source_sizes": source_sizes,
        "target_sizes": target_sizes,
        "shifts": shifts,
    }
    constants = {"tile_rows": rows, "tile_run": tile_run, "wide": wide}
    return [Launch("crop_concat.place", (programs,), arguments, constants)]


def _numbers(move: Move) -> tuple[tuple[int, ...], ...]:
    """Strides, sizes and shifts as `place` wants them: what is adjacent in the target comes last."""
    source, target, away = move.source.shape, move.target.shape, (0, 0, move.down, move.right)
    from_strides, to_strides = move.source.stride(), move.target.stride()
    a, b, c = (2, 3, 1) if to_strides[1] < to_strides[3] else (1, 2, 3)
    return (
        (from_strides[0], from_strides[a], from_strides[b], from_strides[c]),
        (to_strides[0], to_strides[a], to_strides[b], to_strides[c]),
        (source[a], source[b], source[c]),
        (target[0] * target[a] * target[b], target[a], target[b], target[c]),
        (away[a], away[b], away[c]),
    )
