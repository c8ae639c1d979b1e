"""Tap-first up-sampling in dense blocks: matrix products of PyTorch's for 16 rows of one image at a time, any device.

The rows of an `Axis` are multiplied with the tap maps of the pixels that they read, then the columns; backward
multiplies with the transposes. This is what runs on a CPU, and backwards everywhere; forwards on a GPU one product and
one kernel take its place (`tap_upsample_add`). Checks and the ops themselves are in `tap_first`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.costs import spans

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
    packed = _pack(weight, precise)
    taps = packed.new_empty(rows.kernel, 0, packed.shape[2])
    for image, result in zip(x, out, strict=True):
        blocks = zip(_row_blocks(rows, False, precise, x.device), rows.shared, strict=True)
        for (start, stop, first, last, down), shared in blocks:
            done = taps.shape[1] - shared * x.shape[3]
            taps = _tap_maps(image[:, first + shared : last], packed, taps[:, done:])
            half = down @ taps.view(rows.kernel * (last - first), -1)  # (stop - start, w * kw * O)
            half = half.view(stop - start, columns.extent * columns.kernel, -1)
            _spread(half, result[:, start:stop], bias, columns, add=add)


def _tap_maps(image: Tensor, packed: Tensor, before: Tensor) -> Tensor:
    """Append the tap maps of an image's rows, (C, rows, w), to those `before` them: (kh, all rows * w, kw * O)."""
    pixels = image.flatten(1).t().to(packed.dtype)  # (rows * w, C)
    there = before.shape[1]
    taps = packed.new_empty(before.shape[0], there + len(pixels), before.shape[2])
    taps[:, :there] = before
    for tap in range(len(taps)):  # one product after the other: two threads share three of a batch badly
        torch.mm(pixels, packed[tap], out=taps[tap, there:])
    return taps


def _spread(half: Tensor, out: Tensor, bias: Tensor | None, columns: Axis, *, add: bool) -> None:
    """Sum the taps along rows: half (rows, w * kw, O) into out (O, rows, W), on top of the bias and what is there.

    A part of the rows at a time, so that its sums, SUMS bytes, are in the cache when they go to where they belong: a
    product straight into a slice of the result would be one product for each row.
    """
    kernel, out_channels = columns.kernel, half.shape[2]
    last = out.stride(0) == 1
    order, of_bias = ((1, 2, 0), (1, 1, -1)) if last else ((1, 0, 2), (1, -1, 1))
    for start, stop, first, end, along in _column_blocks(columns, False, half.dtype, half.device):
        for rows in spans(half.shape[0], (stop - start) * out_channels):
            read = half[rows, kernel * first : kernel * end]  # (rows, pixels * kw, O)
            band = along.expand(len(read), -1, -1)
            pair = (band, read) if last else (read.transpose(1, 2), band.transpose(1, 2))
            sums = torch.bmm(*pair)
            if bias is not None:
                sums += bias.view(of_bias)
            target = out[:, rows, start:stop].permute(order)
            target.add_(sums) if add else target.copy_(sums)


def _gather(grad: Tensor, columns: Axis) -> Tensor:
    """The adjoint of `_spread`: grad (O, rows, W) to (rows, w * kw, O)."""
    kernel, (out_channels, count, _) = columns.kernel, grad.shape
    half = grad.new_empty(count, columns.extent * kernel, out_channels)
    for start, stop, first, last, along in _column_blocks(columns, True, grad.dtype, grad.device):
        for rows in spans(count, (stop - start) * kernel * out_channels):
            read = grad[:, rows, first:last].permute(1, 2, 0)  # (rows, outputs, O)
            half[rows, kernel * start : kernel * stop] = torch.bmm(along.expand(len(read), -1, -1), read)
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
            taps = up @ _gather(grad[index, :, first:last].to(precise), columns).flatten(1)
            taps = taps.view(kernel, (stop - start) * columns.extent, -1)  # (kh, rows * w, kw * O)
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
