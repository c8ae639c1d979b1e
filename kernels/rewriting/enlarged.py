"""What rewritten models call: a convolution over maps of which some are up-sampled on the way to it.

`convolve` takes the place of up-sampling, crops, pads, concatenation and convolution. In each call it counts both forms
of every up-sampled map's share, on the maps that it gets, and runs the cheaper: `tap_first` over the small map, or
PyTorch's own operators one by one, in which the map is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.dispatch.low_resolution import Choice, choose
from skipcost.kernels.low_resolution.tap_first import DTYPES, axes, tap_first
from skipcost.kernels.precision import computing_type, tf32_allowed

MODES = {"bilinear": "bilinear", "nearest": "nearest", "nearest-exact": "nearest"}  # the same for whole factors
DEVICES = ("cpu", "cuda", "meta")
# On a CPU the model's own form runs below these, of the direct form and of the small map: a call's own Python and what
# is done to its weights take longer than what is saved: 1.05 to 2.4 times the time in ten calls below, 0.63 to 0.92 in
# three above (one thread of an AMD EPYC with AVX2, torch 2.13.0, fp32).
FEWEST_MACS, FEWEST_PIXELS = 60_000_000, 256
Window = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Up:
    """An up-sampling by a whole factor. mode, align_corners: as of torch.nn.functional.interpolate."""

    factor: int
    mode: str
    align_corners: bool | None

    def make(self, x: Tensor) -> Tensor:
        """Return the map (N, C, factor * h, factor * w)."""
        factor = float(self.factor)
        return functional.interpolate(x, scale_factor=factor, mode=self.mode, align_corners=self.align_corners)


class Enlarged(NamedTuple):
    """A map that is up-sampled on the way to a convolution. pads: what is added to it, in order, as of `pad`.

    x: (N, C, h, w). Each of `pads` is (left, right, top, bottom), where a crop is a negative one.
    """

    x: Tensor
    up: Up
    pads: tuple[tuple[int, int, int, int], ...]

    def window(self) -> Window | None:
        """Return (top, left, height, width) of what is read of the whole map, which may begin before it and end behind.

        Outside are zeros. None where zeros are added at a side that was cropped before, or no pixel is left.
        """
        rows = _span(self.x.shape[2] * self.up.factor, [(above, below) for _, _, above, below in self.pads])
        columns = _span(self.x.shape[3] * self.up.factor, [(before, after) for before, after, _, _ in self.pads])
        return None if rows is None or columns is None else (rows[0], columns[0], rows[1], columns[1])

    def make(self) -> Tensor:
        """Return the map, by PyTorch's own operators."""
        made = self.up.make(self.x)
        for pad in self.pads:
            made = functional.pad(made, pad) if any(pad) else made
        return made


def _span(size: int, pads: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return where what is left of an axis begins, and its length; None if it is empty or has lost pixels to zeros."""
    start, stop = 0, size
    for before, after in pads:
        if (before > 0 and start > 0) or (after > 0 and stop < size):
            return None
        start, stop = start - before, stop + after
    return (start, stop - start) if max(start, 0) < min(stop, size) else None


Part = Tensor | Enlarged


def convolve(parts: Sequence[Any], weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Return conv2d(cat(parts, 1), weight, bias, padding=padding), every part in the form that counts fewer MACs.

    parts: maps (N, C_i, H, W), and where one is up-sampled (x, factor, mode, align_corners, pads), see `Enlarged`.
    weight: (O, sum of C_i, kh, kw). Where PyTorch would not convolve these, it is asked, and says what it has to say.
    """
    read: list[Part] = [each if isinstance(each, Tensor) else enlarged(*each) for each in parts]
    windows = [taken_window(each, weight, padding) for each in read]
    if not any(windows) or not _fit(read, weight, bias):
        maps = [each if isinstance(each, Tensor) else each.make() for each in read]
        return functional.conv2d(_joined(maps), weight, bias, padding=padding)
    channels = [each.shape[1] if isinstance(each, Tensor) else each.x.shape[1] for each in read]
    shares = list(zip(read, weight.split(channels, 1), windows, strict=True))
    result: Tensor | None = None
    rest = [(each if isinstance(each, Tensor) else each.make(), own) for each, own, window in shares if not window]
    if rest:
        maps, weights = [each for each, _ in rest], [own for _, own in rest]
        result = functional.conv2d(_joined(maps), _joined(weights), bias, padding=padding)
        del rest, maps
    for each, own, window in shares:
        if window is not None and isinstance(each, Enlarged):
            term = _tap_first(each, own, bias if result is None else None, padding, window)
            result = term if result is None else result.add_(term)
    assert result is not None
    return result


def enlarged(x: Tensor, factor: int, mode: str, align_corners: bool | None, pads: Sequence[Any]) -> Enlarged:
    """Return a map from what a graph has of it: numbers, names and lists."""
    return Enlarged(x, Up(factor, mode, align_corners), tuple((each[0], each[1], each[2], each[3]) for each in pads))


def _joined(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)


def _tap_first(part: Enlarged, weight: Tensor, bias: Tensor | None, padding: int, window: Window) -> Tensor:
    """Call the op in the type that PyTorch's convolution would compute in."""
    dtype = computing_type(weight)
    return tap_first(
        part.x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), factor=part.up.factor,
        mode=MODES[part.up.mode], align_corners=bool(part.up.align_corners), padding=padding, window=window,
    )  # fmt: skip


def _fit(parts: Sequence[Part], weight: Tensor, bias: Tensor | None) -> bool:
    maps = [each if isinstance(each, Tensor) else each.x for each in parts]
    given = [*maps, weight] if bias is None else [*maps, weight, bias]
    dtypes = {each.dtype for each in given}
    if any(each.device != weight.device for each in given) or weight.device.type not in DEVICES:
        return False
    if computing_type(weight) != weight.dtype:  # autocast converts
        return dtypes <= set(DTYPES) - {torch.float64}
    return len(dtypes) == 1 and weight.dtype in DTYPES


def taken_window(part: Part, weight: Tensor, padding: int) -> Window | None:
    """Return what tap-first would read of a part; None where it is not taken."""
    if isinstance(part, Tensor) or (window := part.window()) is None:
        return None
    if any(side + 2 * padding < taps for side, taps in zip(window[2:], weight.shape[2:], strict=True)):
        return None  # PyTorch has a word for it
    return window if choice_of(part, window, weight, padding).taken else None


def choice_of(part: Enlarged, window: Window, weight: Tensor, padding: int) -> Choice:
    """Count both forms of a part's share of a convolution."""
    size = computing_type(weight).itemsize
    kind = {2: "16 bits", 4: "tf32" if tf32_allowed() else "fp32", 8: "fp32"}[size]
    device = "cuda" if weight.is_cuda else "cpu"
    settings = (part.up.factor, MODES[part.up.mode], bool(part.up.align_corners), padding, _numbers(window))
    batch, in_channels, height, width = _numbers(part.x.shape)
    channels, kernel = (in_channels, int(weight.shape[0])), _numbers(weight.shape[2:])
    found = counted((height, width), kernel, settings, channels, batch, kind, device)
    small = found.direct_macs < FEWEST_MACS or height * width < FEWEST_PIXELS
    if device != "cpu" or not found.taken or not small:
        return found
    why = (
        f"{found.direct_macs / 1e6:,.1f} M MACs over a map of {height}x{width}: on a CPU it takes "
        f"{FEWEST_MACS / 1e6:.0f} M and {FEWEST_PIXELS} pixels before fewer are faster"
    )
    return replace(found, taken=False, why=why)


def _numbers(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(each) for each in sizes)


@lru_cache(maxsize=1024)  # the same few in every step
def counted(
    size: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[int, str, bool, int, Window],
    channels: tuple[int, int], batch: int, kind: str, device: str,
) -> Choice:  # fmt: skip
    """Count both forms. settings: factor, mode, align_corners, padding, window; the rest as of `choose`."""
    return choose(*axes(size, kernel, *settings), channels, batch, kind=kind, device=device)


@lru_cache(maxsize=64)
def rows_are_exact(factor: int) -> bool:
    """Whether PyTorch's fp32 arithmetic finds the nearest pixel of every row up to 16,384, as whole numbers would."""
    rows = np.arange(1 << 14)
    return bool((np.floor(rows.astype(np.float32) * np.float32(1 / factor)) == rows // factor).all())
