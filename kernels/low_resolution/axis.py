"""One axis of a convolution over an up-sampled map, as a banded matrix from pixels of the small map to the result.

Tap d of output o reads pixel o + d - padding of the up-sampled map, which is a mean of at most two pixels of the small
one, or nothing outside. `bands` cuts that matrix into dense blocks along the output, `adjoint_bands` its transpose
along the small map. Arithmetic alone: numpy, no torch.

Left out: strides, dilation, and factors that are no whole number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # pixels of the small map per block: from 8 to 32 no time apart on two cores (Xeon with AVX-512, fp32)
MODES = ("bilinear", "nearest")

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Band:
    """A dense block of the matrix: outputs from `start` to `stop` read the pixels from `first` to `last`.

    weights: (stop - start, taps, last - first); of an adjoint, where outputs and pixels change places,
    (stop - start, taps, last - first) too: `start` and `stop` are pixels, `first` and `last` outputs.
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Reals


@dataclass(frozen=True)
class Axis:
    """`extent` pixels, up-sampled by `factor`, `length` pixels from `start` on convolved with `kernel` taps.

    Of those pixels, which may begin before the map and end behind it, the ones outside are zeros. mode, align_corners:
    as in torch.nn.functional.interpolate; nearest has no corners to align. padding: more zeros on both sides.
    ValueError for what cannot be.
    """

    extent: int
    factor: int
    mode: str
    align_corners: bool
    start: int
    length: int
    kernel: int
    padding: int

    def __post_init__(self) -> None:
        """Check what the arithmetic rests on."""
        if self.mode not in MODES:
            message = f"mode={self.mode!r} is unknown; accepted: {', '.join(MODES)}"
            raise ValueError(message)
        if self.mode == "nearest" and self.align_corners:
            message = "align_corners=True means nothing for mode='nearest': leave it at False"
            raise ValueError(message)
        if self.factor < 1 or self.extent < 1:
            message = f"{self.extent} pixels by a factor of {self.factor}: both must be 1 or more"
            raise ValueError(message)
        if self.length < 1 or self.start >= self.up or self.start + self.length <= 0:
            message = f"{self.length} pixels from {self.start} on are none of an up-sampled map of {self.up}"
            raise ValueError(message)
        if not 0 <= self.padding < self.kernel:
            message = f"padding={self.padding} beside {self.kernel} taps: accepted are 0 to {self.kernel - 1}"
            raise ValueError(message)
        if self.output < 1:
            message = (
                f"{self.kernel} taps leave no pixel of {self.length} with padding={self.padding}: pad, or crop less"
            )
            raise ValueError(message)

    @property
    def up(self) -> int:
        """Pixels of the whole up-sampled map."""
        return self.extent * self.factor

    @property
    def output(self) -> int:
        """Pixels of the result."""
        return self.length + 2 * self.padding - self.kernel + 1

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The matrix in blocks along the output, each of at most BLOCK * factor outputs; every output is in one."""
        return self.blocks(BLOCK * self.factor)

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """How many pixels each of `bands` reads that the one before it reads too: that one's last, its own first."""
        ends = (0, *(band.last for band in self.bands))
        return tuple(max(min(end, band.last) - band.first, 0) for end, band in zip(ends, self.bands, strict=False))

    def blocks(self, outputs: int) -> tuple[Band, ...]:
        """Return the same in blocks of so many outputs, the last of the rest; each reads a pixel or more."""
        out, tap, pixel, weight = self._entries()
        made = _blocks(out, tap, pixel, weight, (self.output, outputs, self.kernel))
        return tuple(each if each.last else self._of_zeros(each) for each in made)

    def _of_zeros(self, band: Band) -> Band:
        """Let a block that lies outside of the map read the pixel that is nearest to it, times 0."""
        nearest = 0 if band.start + self.start - self.padding < 0 else self.extent - 1
        weights = np.zeros((*band.weights.shape[:2], 1))
        return replace(band, first=nearest, last=nearest + 1, weights=weights)

    @cached_property
    def adjoint_bands(self) -> tuple[Band, ...]:
        """The transpose in blocks along the small map, each of at most BLOCK pixels; every pixel is in one."""
        out, tap, pixel, weight = self._entries()
        return _blocks(pixel, tap, out, weight, (self.extent, BLOCK, self.kernel))

    @cached_property
    def reads(self) -> tuple[Integers, Reals]:
        """The two pixels that each tap of each output reads, and their weights: (output, kernel, 2).

        Both weights of a tap outside of the up-sampled map are 0; then the pixel may be any.
        """
        out, tap = np.mgrid[: self.output, : self.kernel]
        read = out + tap - self.padding
        at = read + self.start
        inside = (read >= 0) & (read < self.length) & (at >= 0) & (at < self.up)
        low, high, share = self._sources(np.clip(at, 0, self.up - 1))
        weights = np.stack((1 - share, share), -1) * inside[..., None]
        return np.stack((low, high), -1), weights

    def _entries(self) -> tuple[Integers, Integers, Integers, Reals]:
        """Every (output, tap, pixel) with its weight; weights of equal ones add up."""
        pixels, weights = self.reads
        out, tap, _ = np.indices(pixels.shape)
        return out.ravel(), tap.ravel(), pixels.ravel(), weights.ravel()

    def _sources(self, up: Integers) -> tuple[Integers, Integers, Reals]:
        """Return the two pixels that pixels of the up-sampled map lie between, and the share of the second.

        The coordinates of torch.nn.functional.interpolate: centres of pixels are matched, and what lies outside of the
        first and last centre is held; with align_corners the corner pixels are.
        """
        if self.mode == "nearest":
            low = up // self.factor
            return low, low, np.zeros(up.shape)
        if self.align_corners:
            at = up.astype(np.float64) * ((self.extent - 1) / max(1, self.up - 1))
        else:
            at = np.maximum((up.astype(np.float64) + 0.5) / self.factor - 0.5, 0)
        low = np.minimum(at.astype(np.int64), self.extent - 1)
        return low, np.minimum(low + 1, self.extent - 1), at - low


def _blocks(
    rows: Integers, taps: Integers, columns: Integers, weights: Reals, shape: tuple[int, int, int]
) -> tuple[Band, ...]:  # fmt: skip
    """Cut entries into blocks of `shape` = (rows in all, rows per block, taps)."""
    size, step, kernel = shape
    order = np.argsort(rows, kind="stable")
    rows, taps, columns, weights = rows[order], taps[order], columns[order], weights[order]
    made = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = slice(*np.searchsorted(rows, (start, stop)))
        read = columns[part][weights[part] != 0]
        first, last = (int(read.min()), int(read.max()) + 1) if len(read) else (0, 0)
        within = part.start + np.flatnonzero(weights[part] != 0)
        dense = np.zeros((stop - start, kernel, last - first))
        np.add.at(dense, (rows[within] - start, taps[within], columns[within] - first), weights[within])
        made.append(Band(start, stop, first, last, dense))
    return tuple(made)
