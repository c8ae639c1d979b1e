"""Tap-first up-sampling in dense blocks: matrix products of PyTorch's for 16 rows of one image at a time, any device.

The rows of an `Axis` are multiplied with the tap maps of the pixels that they read, then the columns; backward
multiplies with the transposes. This is what runs on a CPU, and backwards everywhere; forwards on a GPU one product and
one kernel take its place (`tap_upsample_add`). Checks and the ops themselves are in `tap_first`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from skipcost.kernels.tap_axis import Axis

Blocks = tuple[tuple[int, int, int, int, Tensor], ...]


def precise_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which maps of `dtype` are multiplied and added here: fp32, or fp64 for fp64."""
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


def fill(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, axes: tuple[Axis, Axis], *, add: bool = False
) -> None:
    """Write the result over `out`, or add it to what is there, 16 rows of one image's small map at a time."""
    (rows, columns), precise = axes, precise_type(x.dtype)
    kernel, width, out_channels = rows.kernel, columns.extent, weight.shape[0]
    packed = _pack(weight, precise)
    for image, result in zip(x, out, strict=True):
        for start, stop, first, last, down in _row_blocks(rows, False, precise, x.device):
            pixels = image[:, first:last].flatten(1).t().to(precise)  # (rows * w, C)
            taps = pixels.new_empty(kernel, len(pixels), packed.shape[2])  # (kh, rows * w, kw * O)
            for tap in range(kernel):  # one product after the other: two threads share three of a batch badly
                torch.mm(pixels, packed[tap], out=taps[tap])
            half = down @ taps.view(kernel * (last - first), -1)  # (stop - start, w * kw * O)
            target = result[:, start:stop]  # (O, stop - start, W)
            sums = target if target.dtype == precise else torch.empty_like(target, dtype=precise)
            if add and sums is not target:
                sums.copy_(target)
            _spread(half.view(stop - start, width * columns.kernel, out_channels), sums, bias, columns, add=add)
            if sums is not target:
                target.copy_(sums)


def _spread(half: Tensor, sums: Tensor, bias: Tensor | None, columns: Axis, *, add: bool) -> None:
    """Sum the taps along rows: half (rows, w * kw, O) into sums (O, rows, W), on top of the bias and what is there."""
    kernel, count = columns.kernel, half.shape[0]
    last = sums.stride(0) == 1
    if bias is not None:
        everywhere = bias.view(-1, 1, 1).expand_as(sums)
        sums.add_(everywhere) if add else sums.copy_(everywhere)
    beta = int(add or bias is not None)
    for start, stop, first, end, along in _column_blocks(columns, False, half.dtype, half.device):
        read = half[:, kernel * first : kernel * end]  # (rows, pixels * kw, O)
        target = sums[:, :, start:stop]
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


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, axes: tuple[Axis, Axis], needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and weight, those that are needed; the others are empty."""
    (rows, columns), precise, kernel = axes, precise_type(x.dtype), axes[0].kernel
    packed = _pack(weight, precise)
    of_map = torch.empty_like(x if needed[0] else x[:0])
    of_packed = torch.zeros_like(packed)
    for index, image in enumerate(x):
        for start, stop, first, last, up in _row_blocks(rows, True, precise, x.device):
            half = _gather(grad[index, :, first:last].to(precise), columns)
            taps = (up @ half.flatten(1)).view(kernel, (stop - start) * columns.extent, -1)  # (kh, rows * w, kw * O)
            if needed[1]:
                pixels = image[:, start:stop].flatten(1).to(precise)  # (C, rows * w)
                for tap in range(kernel):
                    of_packed[tap].addmm_(pixels, taps[tap])
            if needed[0]:
                sums = packed[0] @ taps[0].t()  # (C, rows * w)
                for tap in range(1, kernel):
                    sums.addmm_(packed[tap], taps[tap].t())
                of_map[index, :, start:stop] = sums.view(-1, stop - start, columns.extent)
    if not needed[1]:
        return of_map, weight.new_empty(0)
    shape = (kernel, weight.shape[1], columns.kernel, weight.shape[0])
    return of_map, of_packed.view(shape).permute(3, 1, 0, 2).to(weight.dtype).contiguous()
