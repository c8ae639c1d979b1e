"""2x2 transposed convolution, stride 2, straight into its part of a concatenated map; reference: `unet_models.ops`.

What is fused: `up_conv_concat` is `up_conv`, then `merge`: the crop-concat kernel copies the other maps, and the
up-sampled one is computed where it belongs, bias included, and never copied. `up_conv` is the convolution alone;
`up_conv_into` writes it into a buffer that the caller holds.

Bytes saved: the up-sampled map's copy, and eager PyTorch's pass that adds the bias behind cuDNN, twice its bytes each.
A U-Net of width 64 at 512x512 in 16 bits up-samples to 62.9 MB per image over its four levels: of the 472 MB of maps
that these convolutions and concatenations move eagerly, 220 MB are left. The other maps' copies are among them, 126 MB.

When it loses: where the product decides, from 512 channels on, it is as good as Triton's matrix product is. Channels
that 16 does not divide are read element by element. fp32 without tf32 uses no tensor cores. If the next convolution
reads its maps apart (`concat_conv_bn_relu`), nothing is concatenated, and there is only the bias to save. The weight is
laid out anew in every call, unless its memory has that order already, see `pack_weight`.

Structure: one product of pixels x channels with channels x (2 * 2 * O). Compiled for sm_90, a program for each of the
four positions takes the same registers, shared memory and 16-byte stores as one whose tile runs across them; so tiles
do, and with 64 output channels the input is read into tiles of 128 columns half as often.

Gradients are ATen's convolution_backward: nothing is left to fuse there, compilers and counters know the op, and it
has a gradient itself.

Tried on no GPU yet: checked in Triton's interpreter, and compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.ops.checks import check_buffer, check_encoder_maps, check_up_conv
from skipcost.kernels.ops.conv import need_of
from skipcost.kernels.ops.crop_concat import centred, keep_shapes
from skipcost.kernels.ops.crop_concat import gradients as gradients_of_maps
from skipcost.kernels.ops.crop_concat import launches as moving
from skipcost.kernels.ops.launch import Launch, architecture_of, on_triton, run, span
from skipcost.kernels.ops.tiles import Tile, tile_for
from skipcost.kernels.precision import tf32_allowed
from skipcost.unet_models.ops import crop

LAST = torch.channels_last
LIMIT = 2**31 - 1  # the largest 32-bit number


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the 2x2 transposed convolution of stride 2, (N, O, 2H, 2W) in channels_last.

    x: (N, C, H, W); weight: (C, O, 2, 2) and bias: (O,), as of nn.ConvTranspose2d, of x's type and device. CPU tensors
    take the reference unless TRITON_INTERPRET=1, which must then be set before triton is first imported. fp32 is
    multiplied as PyTorch's convolutions are told to: tf32 where allowed.
    """
    check_up_conv("up_conv", [], x, weight, bias)
    result: Tensor = _up_conv(x, weight, bias, tf32_allowed())
    return result


def up_conv_concat(maps: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Up-sample x, centre-crop the maps to its size or the smallest of theirs, and concatenate: the maps, then x.

    maps: (N, C_i, H_i, W_i), of x's type and device, none smaller than (2H, 2W); the rest as for `up_conv`. The result
    is (N, sum of C_i + O, 2H, 2W) in channels_last.
    """
    check_up_conv("up_conv_concat", maps, x, weight, bias)
    check_encoder_maps(maps, x)
    result: Tensor = _concat(list(maps), x, weight, bias, tf32_allowed())
    return result


def up_conv_into(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, channel: int) -> None:
    """Write the up-sampled map into the channels of `buffer` from `channel` on, and nothing else of it.

    buffer: (N, at least channel + O, h, w) with channels adjacent in memory, as in channels_last, and sharing no
    memory with x; if smaller than 2H x 2W, it gets the centre. The rest as for `up_conv`. Inference only: an op that
    writes into its argument has no gradient in PyTorch; in training, use `up_conv_concat`.
    """
    check_up_conv("up_conv_into", [], x, weight, bias)
    check_buffer(x, weight, bias, buffer, channel)
    _into(x, weight, bias, buffer, channel, tf32_allowed())


def pack_weight(weight: Tensor) -> Tensor:
    """Lay (C, O, 2, 2) out as (2, 2, O, C): the reduction runs along memory.

    No copy for a weight that lies in memory that way, such as `pack_weight(weight).permute(3, 2, 0, 1)`.
    """
    return weight.permute(2, 3, 1, 0).contiguous()


def launches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    maps: Sequence[Tensor] = (),
    tf32: bool = False,
    tile: Tile | None = None,
) -> list[Launch]:
    """Return the launches that fill `out` with the maps and the up-sampled x, each cropped to its size.

    out: (N, sum of C_i + O, h, w) of channel stride 1; it may be a slice of a wider map. tile.channels counts columns
    of the product, 4 * O in all. Nothing is checked of the tensors: ops do.
    """
    if tile and tile.form != "pointer":
        message = f"up_conv cannot run in form {tile.form}: its kernel reads by address; take a tile of form pointer"
        raise ValueError(message)
    *targets, last = out.split([*(each.shape[1] for each in maps), weight.shape[1]], 1)
    moves = [centred(*pair) for pair in zip(maps, targets, strict=True)]
    return [*moving(moves), *_product(x, weight, bias, last, tf32, tile)]


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tf32: bool, tile: Tile | None
) -> list[Launch]:  # fmt: skip
    if not out.numel():
        return []
    x, window = _seen(x, out)
    batch, in_channels, height, width = x.shape
    packed, columns = pack_weight(weight), 4 * weight.shape[1]
    need = need_of([x], packed.view(columns, 1, 1, in_channels), x, tf32=tf32, op="up_conv")
    tile = tile or tile_for(need, "pointer", architecture_of(x.device))
    if need.pixels + tile.pixels > LIMIT:
        message = f"x of up_conv has shape {tuple(x.shape)}: the kernel counts 2**31 pixels at most; split the batch"
        raise ValueError(message)
    arguments = {
        "x": x,
        "weight": packed,
        "bias": None if bias is None else bias.contiguous(),
        "out": out,
        "x_strides": (x.stride(0), x.stride(2), x.stride(3)),
        "out_strides": (out.stride(0), out.stride(2), out.stride(3)),
        "window": window,
        "batch": batch,
        "height": height,
        "width": width,
        "in_channels": in_channels,
    }
    constants = {
        "out_channels": weight.shape[1],
        "precision": "tf32" if tf32 and x.dtype == torch.float32 else "ieee",
        "wide": max(span(x), span(out), packed.numel()) > LIMIT,
        "tile_pixels": tile.pixels,
        "tile_channels": tile.channels,
        "tile_depth": tile.depth,
    }
    grid = (-(-need.pixels // tile.pixels) * -(-columns // tile.channels),)
    return [Launch("up_conv.up_conv", grid, arguments, constants, tile.warps, tile.stages)]


def _seen(x: Tensor, out: Tensor) -> tuple[Tensor, tuple[int, int, int, int] | None]:
    """Return the part of x that `out` sees, and which window `out` is of that part up-sampled; None for all of it."""
    rows, columns = _margins(x, out)
    height, width = out.shape[2:]
    if any(rows + columns):
        x = x[:, :, rows[0] // 2 : (rows[0] + height + 1) // 2, columns[0] // 2 : (columns[0] + width + 1) // 2]
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous(memory_format=LAST)
    whole = (height, width) == (2 * x.shape[2], 2 * x.shape[3])
    return x, None if whole else (rows[0] % 2, columns[0] % 2, height, width)


def _margins(x: Tensor, out: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how many rows of the up-sampled x are cropped before `out` (N, O, h, w) and behind it; then columns."""
    above, left = ((2 * x.shape[axis] - out.shape[axis]) // 2 for axis in (2, 3))
    return (above, 2 * x.shape[2] - out.shape[2] - above), (left, 2 * x.shape[3] - out.shape[3] - left)


def _fill(out: Tensor, maps: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> None:
    if on_triton(x):
        run(launches(x, weight, bias, out, maps=maps, tf32=tf32))
    else:
        up = functional.conv_transpose2d(x, weight, bias, stride=2)
        out.copy_(torch.cat([crop(each, *out.shape[2:]) for each in (*maps, up)], 1))


def _empty(maps: Sequence[Tensor], x: Tensor, weight: Tensor) -> Tensor:
    sizes = [*(each.shape[2:] for each in maps), (2 * x.shape[2], 2 * x.shape[3])]
    channels = sum(each.shape[1] for each in maps) + weight.shape[1]
    shape = (x.shape[0], channels, min(size[0] for size in sizes), min(size[1] for size in sizes))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


@torch.library.custom_op("skipcost::up_conv", mutates_args=(), device_types=("cpu", "cuda"))
def _up_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    out = _empty([], x, weight)
    _fill(out, [], x, weight, bias, tf32)
    return out


@torch.library.custom_op("skipcost::up_conv_concat", mutates_args=(), device_types=("cpu", "cuda"))
def _concat(maps: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    out = _empty(maps, x, weight)
    _fill(out, maps, x, weight, bias, tf32)
    return out


@torch.library.custom_op("skipcost::up_conv_into", mutates_args=("buffer",), device_types=("cpu", "cuda"))
def _into(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, channel: int, tf32: bool) -> None:
    _fill(buffer.narrow(1, channel, weight.shape[1]), [], x, weight, bias, tf32)


@_up_conv.register_fake
def _(x: Tensor, weight: Tensor, _bias: Any, _tf32: Any) -> Tensor:
    return _empty([], x, weight)


@_concat.register_fake
def _(maps: list[Tensor], x: Tensor, weight: Tensor, _bias: Any, _tf32: Any) -> Tensor:
    return _empty(maps, x, weight)


@_into.register_fake
def _(*_: Any) -> None:
    """Nothing is returned, and nothing about the buffer changes but its values."""


@register_flop_formula([torch.ops.skipcost.up_conv, torch.ops.skipcost.up_conv_into])
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """As many as conv_transpose2d, cropped or not: 2 per element of the weight and input pixel."""
    return int(2 * prod(weight) * x[0] * prod(x[2:]))


@register_flop_formula(torch.ops.skipcost.up_conv_concat)
def _concat_flops(_maps: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Copying is no arithmetic."""
    return _flops(x, weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch calls it by name
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    return *_up_gradients(grad, x, weight, ctx.needs_input_grad[:3]), None


def _keep_concat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep_shapes(ctx, inputs[:1], output)
    ctx.save_for_backward(*inputs[1:3])


def _concat_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Give the maps what crop_concat gives them, and the up-sampled x the last channels of `grad`."""
    x, weight = ctx.saved_tensors
    window = grad.narrow(1, grad.shape[1] - weight.shape[1], weight.shape[1])
    of_maps = gradients_of_maps(ctx, grad)
    return of_maps, *_up_gradients(window, x, weight, ctx.needs_input_grad[1:4]), None


def _up_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> Sequence[Tensor | None]:  # fmt: skip
    """Return the gradients of x, weight and bias, where needed; what was cropped away has none."""
    if not any(needed):
        return None, None, None
    rows, columns = _margins(x, grad)
    if any(rows + columns):
        grad = functional.pad(grad, columns + rows)
    geometry = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[1]], *geometry, list(needed)
    )
    return found


_up_conv.register_autograd(_gradients, setup_context=_keep)
_concat.register_autograd(_concat_gradients, setup_context=_keep_concat)
