"""What rewritten models call: a convolution over maps of which some are up-sampled on the way to it.

`convolve` takes the place of up-sampling, crops, pads, concatenation and convolution. In each call it counts both forms
of every up-sampled map's share, on the maps that it gets, and runs the cheaper: over the small map (`tap_first` where
up-sampling has no weights, `add_composed` behind a transposed convolution), or PyTorch's own operators one by one, in
which the map is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.dispatch.low_resolution import Choice, choose, choose_composed
from skipcost.kernels.low_resolution.composed import Composed, add_composed, blank
from skipcost.kernels.low_resolution.tap_first import DTYPES, axes, tap_first
from skipcost.kernels.precision import computing_type, tf32_allowed
from skipcost.kernels.rewriting.composing import kept_composed

MODES = {"bilinear": "bilinear", "nearest": "nearest", "nearest-exact": "nearest"}  # the same for whole factors
DEVICES = ("cpu", "cuda", "meta")
# On a CPU the model's own form runs below these, of the direct form and of the small map: a call's own Python and what
# is done to its weights take longer than what is saved: 1.05 to 2.4 times the time in ten calls below, 0.63 to 0.92 in
# three above (one thread of an AMD EPYC with AVX2, torch 2.13.0, fp32).
FEWEST_MACS, FEWEST_PIXELS = 60_000_000, 256
# Nor does a composed transposed convolution run where it saves fewer: 0.71 to 0.99 times the time in eight calls above,
# both layouts, and up to 1.45 in eight below (as above)
FEWEST_SAVED = 80_000_000
Window = tuple[int, int, int, int]


class Up(NamedTuple):
    """An up-sampling by a whole factor. mode, align_corners: as of torch.nn.functional.interpolate."""

    factor: int
    mode: str
    align_corners: bool | None

    @property
    def form(self) -> str:
        """What runs over the small map."""
        return "tap_first"

    def make(self, x: Tensor) -> Tensor:
        """Return the map (N, C, factor * h, factor * w)."""
        factor = float(self.factor)
        return functional.interpolate(x, scale_factor=factor, mode=self.mode, align_corners=self.align_corners)


class UpConv(NamedTuple):
    """A transposed convolution, 2x2 with stride 2. weight: (C, M, 2, 2), bias: (M,)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def factor(self) -> int:
        """How many times the sides are enlarged."""
        return 2

    @property
    def form(self) -> str:
        """What runs over the small map."""
        return "composed_up_conv"

    def make(self, x: Tensor) -> Tensor:
        """Return the map (N, M, 2h, 2w)."""
        return functional.conv_transpose2d(x, self.weight, self.bias, stride=2)


class Enlarged(NamedTuple):
    """A map that is up-sampled on the way to a convolution. pads: what is added to it, in order, as of `pad`.

    x: (N, C, h, w). Each of `pads` is (left, right, top, bottom), where a crop is a negative one.
    """

    x: Tensor
    up: Up | UpConv
    pads: tuple[tuple[int, int, int, int], ...]

    @property
    def channels(self) -> int:
        """How many the up-sampled map has."""
        return int(self.up.weight.shape[1] if isinstance(self.up, UpConv) else self.x.shape[1])

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


def convolve(
    parts: Sequence[Any], weight: Tensor, bias: Tensor | None, padding: int, *, keeps: bool = False
) -> Tensor:  # fmt: skip
    """Return conv2d(cat(parts, 1), weight, bias, padding=padding), every part in the form that counts fewer MACs.

    parts: maps (N, C_i, H, W), and where one is up-sampled (x, factor, mode, align_corners, pads) or (x, weight, bias,
    pads), see `Enlarged`. weight: (O, sum of C_i, kh, kw). keeps: composed weights, from call to call; else none are.
    Where PyTorch would not convolve these, it is asked, and says what it has to say.
    """
    read: list[Part] = [each if isinstance(each, Tensor) else enlarged(*each) for each in parts]
    given = _tensors(read, weight, bias)
    how = {"alone": len(read) == 1, "gradients": gradients_asked(given)}
    windows = [taken_window(each, weight, padding, **how) for each in read]
    if not any(windows) or not _fit(given, weight):
        return functional.conv2d(_joined([_made(each) for each in read]), weight, bias, padding=padding)
    channels = [each.shape[1] if isinstance(each, Tensor) else each.channels for each in read]
    rest: list[tuple[Part, Tensor]] = []
    terms: list[Term] = []
    for part, own, window in zip(read, weight.split(channels, 1), windows, strict=True):
        made = None
        if window and keeps and isinstance(part, Enlarged) and isinstance(part.up, UpConv):
            made = kept_composed((*part.up, own, bias), computing_type(weight))
            bias = made.bias if made else bias  # all that reaches the interior
        if isinstance(part, Tensor) or window is None or (made is None and isinstance(part.up, UpConv)):
            rest.append((part, own))
        else:
            terms.append(Term(part, own, padding, window, made))
    result: Tensor | None = None
    if rest:
        maps, weights = _laid(read, [_made(each) for each, _ in rest]), [own for _, own in rest]
        result = functional.conv2d(_joined(maps), _joined(weights), bias, padding=padding)
        del rest, maps
    for term in terms:
        result = term.added(result, bias)
    assert result is not None
    return result


def _laid(read: Sequence[Part], maps: list[Tensor]) -> list[Tensor]:
    """Lay maps out as their concatenation with the others would be: not in channels_last where one of all is not."""
    given = [each if isinstance(each, Tensor) else each.x for each in read]
    if all(each.is_contiguous(memory_format=torch.channels_last) for each in given):
        return maps
    return [each.contiguous() for each in maps]


class Term(NamedTuple):
    """A part's share of a convolution, in the form at low resolution. made: composed weights, for that form."""

    part: Enlarged
    weight: Tensor
    padding: int
    window: Window
    made: Composed | None

    def added(self, result: Tensor | None, bias: Tensor | None) -> Tensor:
        """Add it to what is convolved so far, the bias included; where there is nothing yet, to the bias."""
        dtype, up = computing_type(self.weight), self.part.up
        x = self.part.x.to(dtype)
        if self.made is not None:
            if result is None:
                assert bias is not None
                result = blank(x, self.made.kernel, bias, self.window, self.padding)
            add_composed(result, x, self.made, self.window, self.padding)
            return result
        assert isinstance(up, Up)
        bias = None if bias is None or result is not None else bias.to(dtype)
        term = tap_first(
            x, self.weight.to(dtype), bias, factor=up.factor, mode=MODES[up.mode],
            align_corners=bool(up.align_corners), padding=self.padding, window=self.window,
        )  # fmt: skip
        return term if result is None else result.add_(term)


def enlarged(x: Tensor, *given: Any) -> Enlarged:
    """Return a map from what a graph has of it: tensors, numbers, names and lists."""
    *by, pads = given
    up = UpConv(*by) if isinstance(by[0], Tensor) else Up(*by)
    return Enlarged(x, up, tuple((each[0], each[1], each[2], each[3]) for each in pads))


def _made(part: Part) -> Tensor:
    return part if isinstance(part, Tensor) else part.make()


def _joined(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)


def _fit(given: Sequence[Tensor], weight: Tensor) -> bool:
    dtypes = {each.dtype for each in given}
    if any(each.device != weight.device for each in given) or weight.device.type not in DEVICES:
        return False
    if computing_type(weight) != weight.dtype:  # autocast converts
        return dtypes <= set(DTYPES) - {torch.float64}
    return len(dtypes) == 1 and weight.dtype in DTYPES


def _tensors(parts: Sequence[Part], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    found = [weight, bias]
    for each in parts:
        found += [each] if isinstance(each, Tensor) else [each.x, *(each.up if isinstance(each.up, UpConv) else ())]
    return [each for each in found if each is not None]


def gradients_asked(given: Iterable[Any]) -> bool:
    """Whether a result of these may be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in given)


def taken_window(part: Part, weight: Tensor, padding: int, *, alone: bool, gradients: bool) -> Window | None:
    """Return what the form at low resolution would read of a part; None where it is not taken."""
    if isinstance(part, Tensor) or (window := part.window()) is None:
        return None
    if any(side + 2 * padding < taps for side, taps in zip(window[2:], weight.shape[2:], strict=True)):
        return None  # PyTorch has a word for it
    if why_not(part, window, weight, padding, gradients=gradients):
        return None
    return window if choice_of(part, window, weight, padding, alone).taken else None


def why_not(part: Enlarged, window: Window, weight: Tensor, padding: int, *, gradients: bool) -> str:
    """Say why a part has no form at low resolution, whatever it costs; empty where it has one."""
    if isinstance(part.up, Up):
        return ""
    if gradients:
        asked = "gradients may be asked for, and composed weights have none"
        return f"{asked}: call it under torch.no_grad() or torch.inference_mode()"
    if not isinstance(part.up.weight, nn.Parameter):
        return "the weight of its transposed convolution is no parameter, with which composed ones could be kept"
    if weight.shape[2:] != (3, 3) or padding > 1:
        return "a transposed convolution is composed with a 3x3 one with padding 0 or 1, no other"
    ends = (start + side for start, side in zip(window[:2], window[2:], strict=True))
    whole = (part.up.factor * side for side in part.x.shape[2:])
    cropped = max(window[:2]) > 0 or any(end < side for end, side in zip(ends, whole, strict=True))
    return "the map of its transposed convolution is cropped" if cropped else ""


def choice_of(part: Enlarged, window: Window, weight: Tensor, padding: int, alone: bool) -> Choice:
    """Count both forms of a part's share of a convolution. alone: nothing is concatenated with its map."""
    size = computing_type(weight).itemsize
    kind = {2: "16 bits", 4: "tf32" if tf32_allowed() else "fp32", 8: "fp32"}[size]
    device = "cuda" if weight.is_cuda else "cpu"
    batch, in_channels, height, width = _numbers(part.x.shape)
    out_channels, _, *kernel = _numbers(weight.shape)
    if isinstance(part.up, UpConv):
        three = in_channels, part.channels, out_channels
        found = counted_composed((height, width), three, padding, batch, kind, device, alone)
        macs, fewest, what = found.direct_macs - found.tap_macs, FEWEST_SAVED, "saved "
    else:
        settings = (part.up.factor, MODES[part.up.mode], bool(part.up.align_corners), padding, _numbers(window))
        found = counted((height, width), tuple(kernel), settings, (in_channels, out_channels), batch, kind, device)
        macs, fewest, what = found.direct_macs, FEWEST_MACS, ""
    if device != "cpu" or not found.taken or (macs >= fewest and height * width >= FEWEST_PIXELS):
        return found
    why = (
        f"{macs / 1e6:,.1f} M MACs {what}over a map of {height}x{width}: on a CPU it takes {fewest / 1e6:.0f} M and "
        f"{FEWEST_PIXELS} pixels before fewer are faster"
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


@lru_cache(maxsize=1024)
def counted_composed(
    size: tuple[int, int], channels: tuple[int, int, int], padding: int, batch: int, kind: str, device: str,
    alone: bool,
) -> Choice:  # fmt: skip
    """Count both forms, as of `choose_composed`."""
    return choose_composed(size, channels, padding, batch, kind=kind, device=device, alone=alone, copied=True)


@lru_cache(maxsize=64)
def rows_are_exact(factor: int) -> bool:
    """Whether PyTorch's fp32 arithmetic finds the nearest pixel of every row up to 16,384, as whole numbers would."""
    rows = np.arange(1 << 14)
    return bool((np.floor(rows.astype(np.float32) * np.float32(1 / factor)) == rows // factor).all())
