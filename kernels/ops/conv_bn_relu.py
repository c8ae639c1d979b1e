"""Convolution, batch norm with known statistics and ReLU in one kernel; the reference is `unet_models.ops`.

What is fused: relu(conv(maps) * scale + shift), 3x3 or 1x1, stride 1. `concat_conv_bn_relu` reads several maps, each
centre-cropped, as if they were concatenated: the joined map is never formed. `conv_bn_relu_pool` also writes the 2x2
maximum of what it stores, while that is in registers.

Bytes saved: per convolution the norm's and the ReLU's pass over the output, four times its bytes in eager PyTorch (two
after folding the norm into cuDNN's fused kernel: none); per joined map its copy, twice its bytes; per pooled map one
read. A U-Net of width 64 at 512x512 in 16 bits moves 2.07 GB per image eagerly, 1.05 GB with the norm folded, 0.73 GB
here (each tensor read and written once per kernel).

When it loses: wherever the product itself decides, which is from 512 channels or below 32x32 pixels on; published
Triton convolutions reach three quarters of cuDNN's speed. Channels that 16 does not divide are read element by element.

Tried on no GPU yet: checked in Triton's interpreter, and compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.devices import has_copy_engine
from skipcost.kernels.ops.checks import check_maps, check_weight, output_size
from skipcost.kernels.ops.conv import (
    NHWC,
    channels_last,
    conv_launch,
    dense,
    need_of,
    pack_weight,
    why_not_few,
    why_not_tma,
)
from skipcost.kernels.ops.conv_bn_relu_gradients import gradients, keep, pooled_gradients
from skipcost.kernels.ops.launch import Launch, architecture_of, on_triton, run
from skipcost.kernels.ops.tiles import FORMS, Tile, tile_for
from skipcost.kernels.precision import tf32_allowed
from skipcost.unet_models.ops import crop_all

LAST = torch.channels_last


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    padding: int,
    relu: bool = True,
    form: str = "auto",
) -> Tensor:
    """Return relu(conv(x, weight) * scale + shift), (N, O, H', W') in channels_last.

    x: (N, C, H, W); weight: (O, C, k, k) with k 1 or 3, of x's type; scale, shift: (O,) in fp32 (fp64 for fp64), or
    None for 1 and 0; padding: 0 or 1. form: which kernel, "pointer", "tma" or "few"; "auto" takes what the GPU and the
    shape allow. A CPU runs the reference. fp32 is multiplied as PyTorch's convolutions are told to: tf32 where allowed.
    """
    return concat_conv_bn_relu([x], weight, scale, shift, padding=padding, relu=relu, form=form)


def concat_conv_bn_relu(
    maps: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    padding: int,
    relu: bool = True,
    form: str = "auto",
) -> Tensor:
    """Like `conv_bn_relu` over maps (N, C_i, H_i, W_i), centre-cropped to the smallest, channels side by side."""
    _check("concat_conv_bn_relu", maps, weight, scale, shift, padding, form)
    result: Tensor = _forward(list(maps), weight, scale, shift, padding, relu, tf32_allowed(), form)
    return result


def conv_bn_relu_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    padding: int,
    relu: bool = True,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what `conv_bn_relu` does, and its 2x2 maximum (N, O, H'//2, W'//2); NaN wins, as in PyTorch."""
    _check("conv_bn_relu_pool", [x], weight, scale, shift, padding, form)
    height, width = output_size([x], weight.shape[2], padding)
    if min(height, width) < 2:  # noqa: PLR2004 - of a 2x2 window
        message = f"conv_bn_relu_pool would pool a result of {height}x{width}: 2x2 is the least; give it a larger map"
        raise ValueError(message)
    result: tuple[Tensor, Tensor] = _forward_pool(x, weight, scale, shift, padding, relu, tf32_allowed(), form)
    return result


def _check(
    op: str,
    maps: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    padding: int,
    form: str,
) -> None:
    check_maps(op, maps)
    check_weight(op, maps, weight, padding, {"scale": scale, "shift": shift})
    if form not in ("auto", *FORMS):
        message = f"form={form!r} of {op} is unknown; accepted: auto, {', '.join(FORMS)}"
        raise ValueError(message)
    if form == "few" and (reason := why_not_few(maps, weight.permute(NHWC))):
        message = f"{op} cannot run in form few: {reason}; take form auto or pointer"
        raise ValueError(message)


def launches(
    maps: Sequence[Tensor],
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    *,
    padding: int,
    relu: bool,
    pooled: Tensor | None = None,
    tf32: bool = False,
    form: str = "auto",
    tile: Tile | None = None,
) -> list[Launch]:
    """Return the launch that computes `out`, and `pooled` where given, from maps that may differ in size."""
    windows = crop_all(maps)
    packed = pack_weight(weight)
    need = need_of(windows, packed, out, tf32=tf32)
    architecture = architecture_of(out.device)
    form = tile.form if tile else form
    if form == "auto":
        form = pick_form(windows, packed, out, architecture, tf32=tf32)
    if form != "few":
        windows = [each if each.stride(1) == 1 or each.shape[1] == 1 else channels_last(each) for each in windows]
    chosen = tile or tile_for(need, form, architecture)
    outputs = [out] if pooled is None else [out, pooled]
    if reason := _why_not(windows, outputs, packed, chosen):
        message = f"the convolution cannot run in form {form}: {reason}; take form auto or pointer"
        raise ValueError(message)
    # The kernels read numbers side by side: a vector may come as a column of a table, or as one number expanded.
    vectors = {"scale": scale, "shift": shift}
    vectors = {name: None if each is None else each.contiguous() for name, each in vectors.items()}
    options: dict[str, Any] = {"relu": relu, "pooled": pooled, "tf32": tf32, **vectors}
    return [conv_launch(windows, packed, out, padding=padding, tile=chosen, **options)]


def _why_not(windows: Sequence[Tensor], outputs: Sequence[Tensor], packed: Tensor, tile: Tile) -> str:
    """Say why the kernel of a tile's form cannot read or write these maps; empty where it can."""
    if tile.form == "few":
        terms = prod(packed.shape[1:])
        shallow = f"a tile of depth {tile.depth} does not hold {terms} products" if terms > tile.depth else ""
        return why_not_few(windows, packed) or shallow
    if tile.form == "tma" and outputs[0].numel():  # nothing is launched for an empty batch
        return why_not_tma(windows, outputs, packed, tile.depth)
    return ""


def pick_form(
    windows: Sequence[Tensor], packed: Tensor, out: Tensor, architecture: str, *, tf32: bool = False
) -> str:  # fmt: skip
    """Return the kernel that suits the maps: few channels at once, by descriptor from sm_90 on, else by address."""
    if not why_not_few(windows, packed):
        return "few"
    depth = tile_for(need_of(windows, packed, out, tf32=tf32), "tma", architecture).depth
    if has_copy_engine(architecture) and not why_not_tma(windows, [out], packed, depth):
        return "tma"
    return "pointer"


def empty_results(
    maps: Sequence[Tensor], weight: Tensor, padding: int, pooled: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return room for the result, channels_last, and for its pooled map where that is wanted."""
    return _empty(maps, weight, padding), _empty(maps, weight, padding, halved=2) if pooled else None


def _empty(maps: Sequence[Tensor], weight: Tensor, padding: int, halved: int = 1) -> Tensor:
    height, width = output_size(maps, weight.shape[2], padding)
    shape = (maps[0].shape[0], weight.shape[0], height // halved, width // halved)
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=LAST)


def _reference(
    maps: Sequence[Tensor], weight: Tensor, scale: Tensor | None, shift: Tensor | None, padding: int, relu: bool
) -> Tensor:  # fmt: skip
    """The reference op by op; statistics and affine maps in fp32, as PyTorch's batch norm has them."""
    x = torch.cat(crop_all(maps), 1) if len(maps) > 1 else maps[0]
    total = torch.ops.aten.convolution(x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)
    if scale is not None:
        total = total * scale.view(-1, 1, 1)
    if shift is not None:
        total = total + shift.view(-1, 1, 1)
    total = total.to(x.dtype)
    return dense(total.relu() if relu else total)


@torch.library.custom_op("skipcost::conv_bn_relu", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    maps: list[Tensor], weight: Tensor, scale: Tensor | None, shift: Tensor | None,
    padding: int, relu: bool, tf32: bool, form: str,
) -> Tensor:  # fmt: skip
    if not on_triton(weight):
        return _reference(maps, weight, scale, shift, padding, relu)
    out = _empty(maps, weight, padding)
    run(launches(maps, weight, scale, shift, out, padding=padding, relu=relu, tf32=tf32, form=form))
    return out


@torch.library.custom_op("skipcost::conv_bn_relu_pool", mutates_args=(), device_types=("cpu", "cuda"))
def _forward_pool(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None,
    padding: int, relu: bool, tf32: bool, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not on_triton(weight):
        full = _reference([x], weight, scale, shift, padding, relu)
        return full, dense(torch.nn.functional.max_pool2d(full, 2))
    out, pooled = _empty([x], weight, padding), _empty([x], weight, padding, halved=2)
    run(launches([x], weight, scale, shift, out, padding=padding, relu=relu, pooled=pooled, tf32=tf32, form=form))
    return out, pooled


@_forward.register_fake
def _(maps: list[Tensor], weight: Tensor, _scale: Any, _shift: Any, padding: int, *_: Any) -> Tensor:
    return _empty(maps, weight, padding)


@_forward_pool.register_fake
def _(x: Tensor, weight: Tensor, _scale: Any, _shift: Any, padding: int, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty([x], weight, padding), _empty([x], weight, padding, halved=2)


@register_flop_formula([torch.ops.skipcost.conv_bn_relu, torch.ops.skipcost.conv_bn_relu_pool])
def _flops(_maps: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """As many as conv2d over the joined maps: 2 per element of the weight and output pixel."""
    full = out_shape[0] if isinstance(out_shape[0], tuple | list | torch.Size) else out_shape
    return int(2 * prod(weight) * full[0] * prod(full[2:]))


_forward.register_autograd(gradients, setup_context=keep)
_forward_pool.register_autograd(pooled_gradients, setup_context=keep)
