"""A convolution over an up-sampled map, computed at low resolution; reference: `up_sample`, then `conv2d`.

Both steps are linear and nothing stands between them, so conv(up(x)) = sum over taps of shift(up(W_tap x)): the
products over channels, one for each tap, run on the small map, factor**2 fewer MACs, and what is left is a sum over
taps of shifted means, which is one banded matrix for rows and one for columns (`tap_axis`). Exact at the borders too,
where zeros surround the up-sampled map: a tap outside of it has no entry. docs/rewritten.md derives it.

Bytes saved: the up-sampled map, forwards and backwards, is never formed and never kept; the tap maps exist for 18 rows
of the small map at a time. Backward is in closed form and keeps the small map and the weight.

When it loses: with few input channels the banded products decide; `rewritten` counts before it chooses. fp16 and bf16
are multiplied in fp32 (tap maps kept in 16 bits lose 1.2 to 3.8 times as much as the direct form), so hardware that
multiplies 16 bits much faster may be faster the direct way.

Tried on CPUs only. On a GPU it is a handful of matrix products for each image and 16 rows; not measured there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from skipcost.kernels import tap_costs
from skipcost.kernels.tap_axis import Axis

LAST = torch.channels_last
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Blocks = tuple[tuple[int, int, int, int, Tensor], ...]


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
    the kernel. window: (top, left, height, width) of the up-sampled map, to which it is cropped before it is padded and
    convolved; all of it where None. The result, (N, O, height + 2 * padding - kh + 1, ...), is channels_last where x or
    the weight is. Differentiable once in x, weight and bias. ValueError with the reason for what this does not do.
    """
    _check(x, weight, bias)
    height, width = x.shape[2] * factor, x.shape[3] * factor
    seen = (0, 0, height, width) if window is None else tuple(window)
    result: Tensor = _tap_first(x, weight, bias, factor, mode, align_corners, padding, seen)
    return result


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


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=512)
def _row_blocks(axis: Axis, adjoint: bool, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Return an axis's bands as (start, stop, first, last, matrix); the small map's side is (taps, pixels), flat."""
    return _blocks(axis, adjoint, dtype, device, pixels_first=False)


@lru_cache(maxsize=512)
def _column_blocks(axis: Axis, adjoint: bool, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Return the same with the small map's side as (pixels, taps), flat."""
    return _blocks(axis, adjoint, dtype, device, pixels_first=True)


def _blocks(axis: Axis, adjoint: bool, dtype: torch.dtype, device: torch.device, *, pixels_first: bool) -> Blocks:
    made = []
    for band in axis.adjoint_bands if adjoint else axis.bands:
        weights = band.weights  # (outputs, taps, pixels), or of an adjoint (pixels, taps, outputs)
        if adjoint:
            order = (0, 1, 2) if pixels_first else (1, 0, 2)
            flat = weights.transpose(order).reshape((band.stop - band.start) * axis.kernel, band.last - band.first)
        else:
            order = (0, 2, 1) if pixels_first else (0, 1, 2)
            flat = weights.transpose(order).reshape(band.stop - band.start, (band.last - band.first) * axis.kernel)
        with torch.inference_mode(mode=False):
            matrix = torch.from_numpy(flat).to(device=device, dtype=dtype)
        made.append((band.start, band.stop, band.first, band.last, matrix))
    return tuple(made)


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay (O, C, kh, kw) out as (kh, C, kw * O): one product over channels for each row of taps."""
    return weight.to(dtype).permute(2, 1, 3, 0).flatten(2)


def _empty(x: Tensor, weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    last = any(each.is_contiguous(memory_format=LAST) and not each.is_contiguous() for each in (x, weight))
    shape = (x.shape[0], weight.shape[0], rows.output, columns.output)
    layout = LAST if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fill(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, axes: tuple[Axis, Axis]) -> None:
    """Write the result, 16 rows of one image's small map at a time."""
    (rows, columns), precise = axes, _precise(x.dtype)
    kernel, width, out_channels = rows.kernel, columns.extent, weight.shape[0]
    packed = _pack(weight, precise)
    for image, result in zip(x, out, strict=True):
        for start, stop, first, last, down in _row_blocks(rows, False, precise, x.device):
            pixels = image[:, first:last].flatten(1).t().to(precise)  # (rows * w, C)
            taps = torch.bmm(pixels.expand(kernel, -1, -1), packed)  # (kh, rows * w, kw * O)
            half = down @ taps.view(kernel * (last - first), -1)  # (stop - start, w * kw * O)
            target = result[:, start:stop]  # (O, stop - start, W)
            sums = target if target.dtype == precise else torch.empty_like(target, dtype=precise)
            _spread(half.view(stop - start, width * columns.kernel, out_channels), sums, bias, columns)
            if sums is not target:
                target.copy_(sums)


def _spread(half: Tensor, sums: Tensor, bias: Tensor | None, columns: Axis) -> None:
    """Sum the taps along rows: half (rows, w * kw, O) into sums (O, rows, W), on top of the bias."""
    kernel, count = columns.kernel, half.shape[0]
    last = sums.stride(0) == 1
    if bias is not None:
        sums.copy_(bias.view(-1, 1, 1).expand_as(sums))
    for start, stop, first, end, along in _column_blocks(columns, False, half.dtype, half.device):
        read = half[:, kernel * first : kernel * end]  # (rows, pixels * kw, O)
        target = sums[:, :, start:stop]
        beta = 0 if bias is None else 1
        if last:
            target.permute(1, 2, 0).baddbmm_(along.expand(count, -1, -1), read, beta=beta)
        else:
            target.permute(1, 0, 2).baddbmm_(read.transpose(1, 2), along.t().expand(count, -1, -1), beta=beta)


def _gather(grad: Tensor, columns: Axis) -> Tensor:
    """The adjoint of `_spread`: grad (O, rows, W) to (rows, w * kw, O)."""
    kernel, (out_channels, count, _) = columns.kernel, grad.shape
    half = grad.new_empty(count, columns.extent * kernel, out_channels)
    for start, stop, first, last, along in _column_blocks(columns, True, grad.dtype, grad.device):
        read = grad[:, :, first:last].permute(1, 2, 0)  # (rows, outputs, O)
        half[:, kernel * start : kernel * stop].baddbmm_(along.expand(count, -1, -1), read, beta=0)
    return half


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, axes: tuple[Axis, Axis], needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and weight, those that are needed; the others are empty."""
    (rows, columns), precise, kernel = axes, _precise(x.dtype), axes[0].kernel
    packed = _pack(weight, precise)
    of_map = torch.empty_like(x if needed[0] else x[:0])
    of_packed = torch.zeros_like(packed)
    for index, image in enumerate(x):
        for start, stop, first, last, up in _row_blocks(rows, True, precise, x.device):
            half = _gather(grad[index, :, first:last].to(precise), columns)
            taps = (up @ half.flatten(1)).view(kernel, (stop - start) * columns.extent, -1)  # (kh, rows * w, kw * O)
            if needed[1]:
                pixels = image[:, start:stop].flatten(1).to(precise)  # (C, rows * w)
                of_packed.baddbmm_(pixels.expand(kernel, -1, -1), taps)
            if needed[0]:
                sums = packed[0] @ taps[0].t()  # (C, rows * w)
                for tap in range(1, kernel):
                    sums.addmm_(packed[tap], taps[tap].t())
                of_map[index, :, start:stop] = sums.view(-1, stop - start, columns.extent)
    if not needed[1]:
        return of_map, weight.new_empty(0)
    shape = (kernel, weight.shape[1], columns.kernel, weight.shape[0])
    return of_map, of_packed.view(shape).permute(3, 1, 0, 2).to(weight.dtype).contiguous()


@torch.library.custom_op("skipcost::tap_first", mutates_args=())
def _tap_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, factor: int, mode: str, align_corners: bool, padding: int,
    window: Sequence[int],
) -> Tensor:  # fmt: skip
    made = axes(x.shape[2:], weight.shape[2:], factor, mode, align_corners, padding, window)
    out = _empty(x, weight, *made)
    with torch.autocast(x.device.type, enabled=False):  # it would take the products in fp32 apart
        _fill(out, x, weight, bias, made)
    return out


@torch.library.custom_op("skipcost::tap_first_backward", mutates_args=())
def _tap_first_backward(
    grad: Tensor, x: Tensor, weight: Tensor, factor: int, mode: str, align_corners: bool, padding: int,
    window: Sequence[int], of_map: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = axes(x.shape[2:], weight.shape[2:], factor, mode, align_corners, padding, window)
    with torch.autocast(x.device.type, enabled=False):
        return _gradients(grad, x, weight, made, (of_map, of_weight))


@_tap_first.register_fake
def _(x: Tensor, weight: Tensor, _bias: Any, *settings: Any) -> Tensor:
    return _empty(x, weight, *axes(x.shape[2:], weight.shape[2:], *settings))


@_tap_first_backward.register_fake
def _(_grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    of_map, of_weight = settings[-2:]
    whole = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(x if of_map else x[:0]), whole if of_weight else weight.new_empty(0)


@register_flop_formula(torch.ops.skipcost.tap_first)
def _flops(x: Any, weight: Any, _bias: Any, *settings: Any, **__: Any) -> int:
    """2 for each MAC of the matrix products, as they are computed."""
    made = axes(x[2:], weight[2:], *settings)
    return 2 * tap_costs.forward(*made, (weight[1], weight[0]), x[0]).macs


@register_flop_formula(torch.ops.skipcost.tap_first_backward)
def _backward_flops(_grad: Any, x: Any, weight: Any, *settings: Any, **__: Any) -> int:
    *geometry, of_map, of_weight = settings
    made = axes(x[2:], weight[2:], *geometry)
    counted = tap_costs.backward(*made, (weight[1], weight[0]), x[0], of_map=of_map, of_weight=of_weight)
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
