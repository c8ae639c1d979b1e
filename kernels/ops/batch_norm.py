"""Batch norm with the statistics of the batch, and ReLU: how its kernels are launched, and the formulas they follow.

The passes of `conv_bn_relu_train` that are no convolution. Forwards, statistics of tiles (none where the convolution's
kernel has written them), their combination, and one pass that normalises and clips. Backwards, one pass that sums and
one that writes; what ReLU clipped is computed again, so that no map but the convolution's output is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.ops.launch import Launch, on_triton, run, span
from skipcost.kernels.ops.tiles import up_to

TILE = 4096  # elements per program: in 16 bits, two 16-byte loads in flight for each of 256 threads and each map
STATISTICS_TILE = 8192  # larger, for fewer of them: at 64 channels in 16 bits, their statistics are 5 % of the map
MAX_CHANNELS = 64  # of them next to each other: in 16 bits, a whole 128-byte line
GROUP = 256  # tiles whose statistics are combined at a time: 65536 take two launches
GROUP_CHANNELS = 16
PROGRAMS = 1024  # that sum gradients: more than a GPU runs at a time, few enough to add up in one step
WARPS = 8  # with 4, the gradients take up to 128 registers, and a multiprocessor of sm_90 holds a quarter of its warps
ADDED = 2048  # elements at a time of those who add up


@dataclass(frozen=True, slots=True)
class Norm:
    """What is done to a map: relu((y - mean) / sqrt(variance + eps) * gamma + beta), without ReLU where relu is false.

    mean, variance (biased), gamma and beta: (C,) in fp32, fp64 for maps in fp64.
    """

    mean: Tensor
    variance: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    relu: bool

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What there is one number of for each channel, by the names that the kernels have for it."""
        return {"mean": self.mean, "variance": self.variance, "gamma": self.gamma, "beta": self.beta}

    def unit(self, y: Tensor) -> Tensor:
        """(y - mean) / sqrt(variance + eps), (N, C, H, W), as a formula in PyTorch."""
        return (y.to(self.mean.dtype) - _column(self.mean)) * _column((self.variance + self.eps).rsqrt())

    def linear(self, unit: Tensor) -> Tensor:
        """The result before ReLU, (N, C, H, W), as a formula in PyTorch."""
        return unit * _column(self.gamma) + _column(self.beta)


def precise(x: Tensor) -> torch.dtype:
    """Return the type in which a map's statistics are kept: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalized(y: Tensor, norm: Norm) -> Tensor:
    """Return what `norm` makes of y (N, C, H, W) of channel stride 1: of y's type, in channels_last."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    if on_triton(y):
        run([normalize_launch(y, norm, out)])
        return out
    result = norm.linear(norm.unit(y))
    return out.copy_(result.relu() if norm.relu else result)


def write_statistics(y: Tensor, mean: Tensor, variance: Tensor) -> None:
    """The formula behind `statistics_launches`, for devices without Triton."""
    found = torch.var_mean(y.to(mean.dtype), (0, 2, 3), correction=0) if y.numel() else (0.0, 0.0)
    for each, value in zip((variance, mean), found, strict=True):
        each.copy_(torch.as_tensor(value))


def write_gradients(y: Tensor, grad: Tensor, norm: Norm, sums: Tensor, y_grad: Tensor) -> None:
    """The formula behind `gradient_launches`."""
    unit, count = norm.unit(y), max(_pixels(y), 1)
    through = grad.to(unit.dtype)
    if norm.relu:
        through = torch.where(norm.linear(unit) <= 0, 0, through)
    sums[0], sums[1] = through.sum((0, 2, 3)), (through * unit).sum((0, 2, 3))
    factor = norm.gamma * (norm.variance + norm.eps).rsqrt()
    y_grad.copy_(_column(factor) * (through - _column(sums[0] / count) - unit * _column(sums[1] / count)))


def statistics_launches(y: Tensor, mean: Tensor, variance: Tensor, partials: Tensor | None = None) -> list[Launch]:
    """Write mean and biased variance, (C,) in fp32 (fp64 for fp64), of each channel of y (N, C, H, W).

    partials: (tiles, 3, C), count, mean and summed squared deviations of tiles of y, where they are known already; y is
    not read then. Without a pixel, both results are 0. No difference of squares is taken, so the variance is as good
    for a large mean.
    """
    launches = []
    if partials is None:
        tiles = -(-_pixels(y) // (STATISTICS_TILE // _across(y)))
        partials = y.new_empty((tiles, 3, y.shape[1]), dtype=precise(y))
        arguments = {"y": y, "partials": partials, "y_strides": strides(y)}
        launches.append(_launch("tile_statistics", y, arguments, tile=STATISTICS_TILE))
    blocks = -(-partials.shape[2] // GROUP_CHANNELS)
    while len(partials) > GROUP:
        combined = partials.new_empty((-(-len(partials) // GROUP), *partials.shape[1:]))
        launches.append(_combining("combine", (len(combined), blocks), partials, combined=combined))
        partials = combined
    return [*launches, _combining("finish", (blocks,), partials, mean=mean, variance=variance)]


def normalize_launch(y: Tensor, norm: Norm, out: Tensor) -> Launch:
    """Normalise y into `out`, both (N, C, H, W) of channel stride 1; `out` may be a slice of a wider map."""
    arguments = {"y": y, **norm.vectors, "out": out, "y_strides": strides(y), "out_strides": strides(out)}
    return _launch("normalize", y, arguments, out, tile=TILE, norm=norm)


def gradient_launches(y: Tensor, grad: Tensor, norm: Norm, sums: Tensor, y_grad: Tensor) -> list[Launch]:
    """Write the gradients of beta and gamma to sums (2, C), that of y to y_grad, given that of the result.

    y, grad and y_grad: (N, C, H, W) of channel stride 1. Mean and variance are taken for what they are, functions of
    y. Where the result before ReLU is 0 or less nothing passes; where it is NaN everything does, as in PyTorch.
    """
    steps = _steps(y)
    programs = -(-_pixels(y) // (TILE // _across(y) * steps))
    partials = y.new_empty((programs, 2, y.shape[1]), dtype=precise(y))
    common = {"y": y, "grad": grad, **norm.vectors, "y_strides": strides(y), "grad_strides": strides(grad)}
    reduce = {**common, "partials": partials, "steps": steps}
    apply = {**common, "sums": sums, "y_grad": y_grad, "y_grad_strides": strides(y_grad)}
    return [
        _launch("backward_reduce", y, reduce, grad, tile=TILE, norm=norm, steps=steps),
        add_launch(partials, sums),
        _launch("backward_apply", y, apply, grad, y_grad, tile=TILE, norm=norm),
    ]


def add_launch(partials: Tensor, total: Tensor) -> Launch:
    """Add up partials over their first dimension, in a fixed order, into `total`, which has the others; contiguous."""
    tile_rows = min(1 << max(len(partials) - 1, 0).bit_length(), ADDED // 16)
    tile_size = ADDED // tile_rows
    arguments = {"partials": partials, "total": total, "rows": len(partials), "size": total.numel()}
    constants = {"tile_rows": tile_rows, "tile_size": tile_size}
    return Launch("batch_norm.add", (-(-total.numel() // tile_size),), arguments, constants)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return N's, H's and W's: what a kernel needs to know of a map whose channels are next to each other."""
    n, _, i, j = x.stride()
    return n, i, j


def _combining(kernel: str, grid: tuple[int, ...], partials: Tensor, **outputs: Tensor) -> Launch:
    arguments = {"partials": partials, **outputs, "tiles": len(partials), "channels": partials.shape[2]}
    constants = {"group": GROUP, "tile_channels": GROUP_CHANNELS}
    return Launch(f"batch_norm.{kernel}", grid, arguments, constants, WARPS)


def _launch(
    kernel: str, y: Tensor, arguments: dict[str, Any], *others: Tensor,
    tile: int, norm: Norm | None = None, steps: int = 1,
) -> Launch:  # fmt: skip
    """Go over y in tiles of so many elements, `steps` of them per program; `others` are maps read or written with it.

    Where an address, or the number of a pixel in the last program's tiles, needs 64 bits, the kernel is told so.
    """
    batch, channels, height, width = y.shape
    across = _across(y)
    tile_pixels = tile // across
    pixels = steps * tile_pixels
    wide = max(_pixels(y) + pixels, *(span(each) for each in (y, *others))) >= 2**31
    constants: dict[str, Any] = {"wide": wide, "tile_pixels": tile_pixels, "tile_channels": across}
    if norm is not None:
        constants |= {"eps": norm.eps, "relu": norm.relu}
    arguments = {**arguments, "batch": batch, "height": height, "width": width, "channels": channels}
    grid = (-(-_pixels(y) // pixels), -(-channels // across))
    return Launch(f"batch_norm.{kernel}", grid, arguments, constants, WARPS)


def _pixels(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


def _across(y: Tensor) -> int:
    return up_to(y.shape[1], MAX_CHANNELS)


def _steps(y: Tensor) -> int:
    """Return how many tiles one program of `backward_reduce` sums."""
    tiles = -(-_pixels(y) // (TILE // _across(y))) * -(-y.shape[1] // _across(y))
    return max(1, -(-tiles // PROGRAMS))


def _column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)
