"""A convolution over an up-sampled map, computed at low resolution; reference: `up_sample`, then `conv2d`.

Both steps are linear and nothing stands between them, so conv(up(x)) = sum over taps of shift(up(W_tap x)): the
products over channels, one for each tap, run on the small map, factor**2 fewer MACs, and what is left is a sum over
taps of shifted means, which is one banded matrix for rows and one for columns (`axis`). Exact at the borders too,
where zeros surround the up-sampled map: a tap outside of it has no entry. docs/rewritten.md derives it.

What is fused: up-sampling, crop, convolution, and in `tap_first_into` the sum or the concatenation that follows.
On a CPU these are products of dense blocks (`blocks`), on a GPU one product and a kernel (`tap_upsample_add`).

Bytes saved: the up-sampled map, forwards and backwards, is never formed and never kept; the tap maps exist for 18 rows
of the small map at a time, on a GPU for up to 256 MiB of them. Backward is in closed form and keeps the small map and
the weight.

When it loses: with few input channels the banded products decide; `rewritten` counts before it chooses. Tap maps stay
in fp32 (in 16 bits they lose 1.2 to 3.8 times as much as the direct form), and on a CPU and backwards so do the
products of fp16 and bf16, so hardware that multiplies 16 bits much faster may be faster the direct way.

`split_concat` is the same over a concatenation whose last map is up-sampled: a convolution is linear in its channels,
so conv(cat(a, up(b))) = conv_a(a) + conv_b(up(b)), and neither the up-sampled map nor the concatenation is formed;
where gradients are asked for the second term is a map of its own, and one more pass adds the terms.

Tried on CPUs only; the kernel in Triton's interpreter, and compiled ahead of time. Backwards a GPU still runs a handful
of matrix products for each image and 16 rows. Not measured there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels.low_resolution import blocks, costs, tap_upsample_add
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.ops.checks import check_result_buffer
from skipcost.unet_models.ops import crop

LAST = torch.channels_last
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tap_first(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    padding: int = 1,
    window: Sequence[int] | None = None,
) -> Tensor:
    """Return conv2d(interpolate(x, scale_factor=factor, mode=mode), weight, bias, padding=padding).

    x: (N, C, h, w); weight: (O, C, kh, kw) and bias: (O,) of x's type and device: fp32, fp64, or fp16 and bf16, which
    are multiplied and added in fp32, also under autocast. mode: bilinear or nearest. padding: less than each side of
    the kernel. window: (top, left, height, width) of the up-sampled map, to which it is cropped, or extended by zeros,
    before it is padded and convolved; all of it where None. The result, (N, O, height + 2 * padding - kh + 1, ...), is
    channels_last where x or the weight is. Differentiable once in x, weight and bias. ValueError with the reason for
    what this does not do.

    On a GPU, and where Triton interprets, `tap_upsample_add` runs; fp32 is multiplied as torch.mm is told to there.
    """
    _check(x, weight, bias)
    seen = _seen(x, factor, window)
    result: Tensor = _tap_first(x, weight, bias, factor, mode, align_corners, padding, seen)
    return result


def tap_first_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    channel: int = 0,
    *,
    add: bool = False,
    factor: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    padding: int = 1,
    window: Sequence[int] | None = None,
) -> None:
    """Write what `tap_first` returns into the channels of `buffer` from `channel` on, or add it to what they hold.

    buffer: (N, at least channel + O, H, W) of the result's size, type and device, in any strides without repetition,
    sharing no memory with x. Sums are rounded once. Inference only: an op that writes into its argument has no gradient
    in PyTorch. The rest as for `tap_first`.
    """
    _check(x, weight, bias)
    seen = _seen(x, factor, window)
    sides = [seen[2 + axis] + 2 * padding - weight.shape[2 + axis] + 1 for axis in (0, 1)]
    check_result_buffer("tap_first_into", (x.shape[0], weight.shape[0], *sides), [x, weight, bias], buffer, channel)
    _tap_first_into(x, weight, bias, buffer, channel, add, factor, mode, align_corners, padding, seen)


def _seen(x: Tensor, factor: int, window: Sequence[int] | None) -> tuple[int, ...]:
    return (0, 0, x.shape[2] * factor, x.shape[3] * factor) if window is None else tuple(window)


def axes(
    size: Sequence[int], kernel: Sequence[int], factor: int, mode: str, align_corners: bool, padding: int,
    window: Sequence[int],
) -> tuple[Axis, Axis]:  # fmt: skip
    """Return rows and columns of the op for a map of `size` = (h, w) and a kernel of (kh, kw)."""
    top, left, height, width = window
    rows = _axis(int(size[0]), factor, mode, align_corners, top, height, int(kernel[0]), padding)
    return rows, _axis(int(size[1]), factor, mode, align_corners, left, width, int(kernel[1]), padding)


@lru_cache(maxsize=512)  # the same few in every step
def _axis(*values: Any) -> Axis:
    return Axis(*values)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:  # noqa: PLR2004 - N, C, H, W
        message = (
            f"tap_first got a map of shape {tuple(x.shape)} and a weight of shape {tuple(weight.shape)}: it takes "
            "(N, C, h, w) and (O, C, kh, kw), so no groups"
        )
        raise ValueError(message)
    given = [x, weight] if bias is None else [x, weight, bias]
    if x.dtype not in DTYPES or len({(each.dtype, each.device) for each in given}) > 1:
        kinds = ", ".join(f"{each.dtype} on {each.device}" for each in given)
        message = f"tap_first got {kinds}: map, weight and bias must be of one floating type and on one device"
        raise ValueError(message)
    if bias is not None and bias.shape != weight.shape[:1]:
        message = f"tap_first got a bias of shape {tuple(bias.shape)} for {weight.shape[0]} output channels"
        raise ValueError(message)


def _empty(x: Tensor, weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    last = any(each.is_contiguous(memory_format=LAST) and not each.is_contiguous() for each in (x, weight))
    shape = (x.shape[0], weight.shape[0], rows.output, columns.output)
    layout = LAST if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.custom_op("skipcost::tap_first", mutates_args=())
def _tap_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, factor: int, mode: str, align_corners: bool, padding: int,
    window: Sequence[int],
) -> Tensor:  # fmt: skip
    made = axes(x.shape[2:], weight.shape[2:], factor, mode, align_corners, padding, window)
    out = _empty(x, weight, *made)
    _fill(out, x, weight, bias, made)
    return out


@torch.library.custom_op("skipcost::tap_first_into", mutates_args=("buffer",))
def _tap_first_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, channel: int, add: bool, factor: int,
    resampling: str, align_corners: bool, padding: int, window: Sequence[int],
) -> None:  # fmt: skip
    # Not `mode`: PyTorch's tracing of ops that write into arguments has one of that name.
    made = axes(x.shape[2:], weight.shape[2:], factor, resampling, align_corners, padding, window)
    _fill(buffer.narrow(1, channel, weight.shape[0]), x, weight, bias, made, add=add)


def _fill(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, made: tuple[Axis, Axis], *, add: bool = False
) -> None:
    way = tap_upsample_add if tap_upsample_add.takes(x) else blocks
    with torch.autocast(x.device.type, enabled=False):  # it would take the products in fp32 apart
        way.fill(out, x, weight, bias, made, add=add)


@torch.library.custom_op("skipcost::tap_first_backward", mutates_args=())
def _tap_first_backward(
    grad: Tensor, x: Tensor, weight: Tensor, factor: int, mode: str, align_corners: bool, padding: int,
    window: Sequence[int], of_map: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = axes(x.shape[2:], weight.shape[2:], factor, mode, align_corners, padding, window)
    with torch.autocast(x.device.type, enabled=False):
        return blocks.gradients(grad, x, weight, made, (of_map, of_weight))


@_tap_first.register_fake
def _(x: Tensor, weight: Tensor, _bias: Any, *settings: Any) -> Tensor:
    return _empty(x, weight, *axes(x.shape[2:], weight.shape[2:], *settings))


@_tap_first_into.register_fake
def _(*_: Any) -> None:
    """Nothing is returned, and nothing about the buffer changes but its values."""


@_tap_first_backward.register_fake
def _(_grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    of_map, of_weight = settings[-2:]
    whole = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(x if of_map else x[:0]), whole if of_weight else weight.new_empty(0)


@register_flop_formula(torch.ops.skipcost.tap_first)
def _flops(x: Any, weight: Any, _bias: Any, *settings: Any, **__: Any) -> int:
    """2 for each MAC of the matrix products, as they are computed in blocks."""
    made = axes(x[2:], weight[2:], *settings)
    return 2 * costs.forward(*made, (weight[1], weight[0]), x[0]).macs


@register_flop_formula(torch.ops.skipcost.tap_first_into)
def _into_flops(
    x: Any, weight: Any, bias: Any, _buffer: Any, _channel: Any, _add: Any, *settings: Any, **__: Any
) -> int:
    """As many as `tap_first`: additions to what is there are not counted, as of a bias."""
    return _flops(x, weight, bias, *settings)


@register_flop_formula(torch.ops.skipcost.tap_first_backward)
def _backward_flops(_grad: Any, x: Any, weight: Any, *settings: Any, **__: Any) -> int:
    *geometry, of_map, of_weight = settings
    made = axes(x[2:], weight[2:], *geometry)
    counted = costs.backward(*made, (weight[1], weight[0]), x[0], of_map=of_map, of_weight=of_weight)
    return 2 * counted.macs


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch calls it by name
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[3:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    of_map, of_weight, of_bias = ctx.needs_input_grad[:3]
    found: list[Tensor | None] = [None, None]
    if of_map or of_weight:
        both = torch.ops.skipcost.tap_first_backward(grad, x, weight, *ctx.settings, of_map, of_weight)
        found = [each if needed else None for each, needed in zip(both, (of_map, of_weight), strict=True)]
    return *found, grad.sum((0, 2, 3)) if of_bias else None, *([None] * len(ctx.settings))


_tap_first.register_autograd(_differentiate, setup_context=_keep)


def split_concat(
    maps: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    padding: int = 1,
) -> Tensor:
    """Return the convolution over the concatenated maps and the up-sampled x, all centre-cropped to the smallest.

    maps: (N, C_i, H_i, W_i), none at all if x is the only input; x: (N, C, h, w); weight: (O, sum of C_i + C, kh, kw).
    The rest as for `tap_first`. Differentiable once.
    """
    window = seen_of((x.shape[2], x.shape[3]), factor, [(each.shape[2], each.shape[3]) for each in maps])
    settings = {"factor": factor, "mode": mode, "align_corners": align_corners, "padding": padding, "window": window}
    if not maps:
        return tap_first(x, weight, bias, **settings)  # type: ignore[arg-type]  # one dict of several types
    cropped = [crop(each, *window[2:]) for each in maps]
    of_maps, of_x = weight.split([weight.shape[1] - x.shape[1], x.shape[1]], 1)
    joined = cropped[0] if len(cropped) == 1 else torch.cat(cropped, 1)
    del cropped
    result = functional.conv2d(joined, of_maps, bias, padding=padding)
    del joined
    if torch.is_grad_enabled() and any(each.requires_grad for each in (result, x, of_x)):
        result += tap_first(x, of_x, **settings)  # type: ignore[arg-type]
    else:
        tap_first_into(x, of_x, None, result, add=True, **settings)  # type: ignore[arg-type]
    return result


def seen_of(
    size: tuple[int, int], factor: int, others: Sequence[tuple[int, int]]
) -> tuple[int, int, int, int]:  # fmt: skip
    """Return (top, left, height, width) of what is left of a map of `size`, up-sampled, beside maps of other sizes."""
    up = size[0] * factor, size[1] * factor
    height, width = (min(up[axis], *(other[axis] for other in others)) if others else up[axis] for axis in (0, 1))
    return (up[0] - height) // 2, (up[1] - width) // 2, height, width
