"""A 2x2 transposed convolution and the 3x3 convolution behind it, as one convolution of the small map; at inference.

Reference: `up_conv`, `merge`, `conv2d`. Both convolutions are linear, so conv(cat(a, up(b))) = conv_a(a) + C(b), and C
is one 4x4 transposed convolution of stride 2. Its sixteen taps are a 2x2 convolution with four times the channels, one
set for each phase of the result: an output pixel reads rows of two pixels of the small map and never of three. Exact at
the borders, where the bias of the transposed convolution reaches the result through fewer taps. docs/rewritten.md.

Bytes saved: the up-sampled map, twice, and where `a` is one map, the copy of it too. MACs: 16 C O for a pixel of the
small map instead of 36 M O + 4 C M, with M channels in between.

When it loses: with more than three times as many channels as in between (M = O); in 16 bits on a CPU, where phases are
slow to add; and where the composed weights, which are kept, are larger than the maps that are saved: 0.87 times as fast
from 1024 to 512 channels at 16x16. `rewritten` counts before it chooses.

Zeros around the up-sampled map are exact, too. Left out: gradients (the composed weights would be made anew in every
step), and up-sampled maps that are cropped, which no network of the suite has. Tried on CPUs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.weights import kept
from skipcost.unet_models.ops import crop

ATTRIBUTE = "_skipcost_composed"
LAST = torch.channels_last
Window = tuple[int, int, int, int]
PART = 64  # input channels that are composed at once: what that needs in float64 stays below what is kept


@dataclass(frozen=True, slots=True)
class Composed:
    """The weights of both convolutions as one.

    kernel: (4 * O, C, 2, 2), its outputs in the order of row phase, column phase, channel. bias: (O,), all of it in the
    interior. border: (O, 3, 3), what each tap of the 3x3 convolution passes on of the transposed convolution's bias,
    and what is missing of it where that tap is outside; (O, 0, 0) where there is no such bias.
    """

    kernel: Tensor
    bias: Tensor
    border: Tensor


def composed(up: nn.ConvTranspose2d, conv: nn.Conv2d, dtype: torch.dtype) -> Composed:
    """Return the weights of `up` and of the last channels of `conv` as one, rounded to `dtype` once; kept on `up`.

    They are made again when a weight or bias has another version, place or type. No gradient flows through them.
    """
    tensors = [up.weight, up.bias, conv.weight, conv.bias]
    by_type = kept(up, ATTRIBUTE, tensors)
    if dtype not in by_type:
        by_type[dtype] = compose(up.weight, up.bias, conv.weight, conv.bias, dtype)
    made: Composed = by_type[dtype]
    return made


def compose(
    up: Tensor, up_bias: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Composed:  # fmt: skip
    """Return (C, M, 2, 2) and the last M channels of (O, A + M, 3, 3), with their biases, as one."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return Composed(*_compose(up, up_bias, weight, bias, dtype))


def composed_up_conv(
    maps: list[Tensor], x: Tensor, weight: Tensor, made: Composed, *, padding: int = 1
) -> Tensor:  # fmt: skip
    """Return conv2d(cat(*maps, up(x)), padding=padding), the maps centre-cropped to the up-sampled x; empties `maps`.

    maps: (N, C_i, H_i, W_i), none smaller than (2h, 2w), or none at all; x: (N, C, h, w). weight: what the convolution
    has for the maps, (O, sum of C_i, 3, 3). padding: 0 or 1. The result is (N, O, 2 * (h - 1 + padding), ...).
    """
    height, width = 2 * int(x.shape[2]), 2 * int(x.shape[3])
    _check(maps, (height, width), padding)
    if maps:
        joined = [_joined([crop(each, height, width) for each in maps])]
        maps.clear()
        result = functional.conv2d(joined.pop(), weight, made.bias, padding=padding)
    else:
        result = blank(x, made.kernel, made.bias, (0, 0, height, width), padding)
    add_composed(result, x, made, (0, 0, height, width), padding)
    return result


def blank(x: Tensor, kernel: Tensor, bias: Tensor, window: Window, padding: int) -> Tensor:
    """Return the bias of the interior everywhere: what `add_composed` adds to where nothing else is convolved."""
    shape = (x.shape[0], len(bias), *(side - 2 + 2 * padding for side in window[2:]))
    return bias.view(-1, 1, 1).expand(shape).clone(memory_format=_layout(x, kernel))


def add_composed(result: Tensor, x: Tensor, made: Composed, window: Window, padding: int) -> None:
    """Add the share of an up-sampled map to a convolution that has the bias of the interior everywhere.

    result: (N, O, height - 2 + 2 * padding, ...). window: (top, left, height, width) of what is read of the map, which
    may begin before it and end behind it, where zeros are, but holds all of it. padding: 0 or 1.
    """
    rows, columns = (
        Side(2 * int(x.shape[2 + axis]), window[axis] + 1 - padding, int(result.shape[2 + axis])) for axis in (0, 1)
    )
    around = rows.around, columns.around
    _add_phases(result, functional.conv2d(x, made.kernel, padding=around), rows, columns)
    if made.border.numel():
        _take_outside(result, made.border, rows, columns)


def _check(maps: Sequence[Tensor], size: tuple[int, int], padding: int) -> None:
    if padding not in (0, 1):
        message = f"padding={padding} beside a 3x3 convolution: composed_up_conv takes 0 or 1"
        raise ValueError(message)
    small = [tuple(each.shape[2:]) for each in maps if each.shape[2] < size[0] or each.shape[3] < size[1]]
    if small:
        message = (
            f"a map of {small[0][0]}x{small[0][1]} would crop the up-sampled map of {size[0]}x{size[1]}: "
            "composed_up_conv needs all of it; take the convolutions one by one"
        )
        raise ValueError(message)


def _joined(maps: list[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


@dataclass(frozen=True, slots=True)
class Side:
    """Rows or columns of a result: `length` of them, the first around pixel `first` of an up-sampled map of `size`."""

    size: int
    first: int
    length: int

    @property
    def around(self) -> int:
        """1 where the outermost positions, between zeros and the map's first and last pixel, are read; else 0."""
        return int(self.first < 1 or self.first + self.length > self.size - 1)

    def seen(self, phase: int) -> tuple[slice, slice]:
        """Return where a phase is put in the result, and what is read of it.

        Position p lies between the pixels p - 1 and p of the small map, and gives the rows 2p - 1 and 2p around the
        pixels of the up-sampled map: phases 0 and 1.
        """
        start = 1 - self.around
        skipped = max(0, (self.first + 2 - phase) // 2 - start)
        at = 2 * (start + skipped) - 1 + phase - self.first
        count = min(self.size // 2 - 1 + 2 * self.around - skipped, (self.length - at + 1) // 2)
        return slice(at, at + 2 * count, 2), slice(skipped, skipped + count)

    @property
    def outside(self) -> list[tuple[int, int]]:
        """The rows of which a tap reads zeros around the map, each with that tap."""
        ends = (*range(1 - self.first), *range(max(self.size - 1 - self.first, 0), self.length))
        reads = ((at, tap, self.first + at + tap - 1) for at in ends for tap in range(3))
        return [(at, tap) for at, tap, row in reads if not 0 <= row < self.size]


def _add_phases(result: Tensor, positions: Tensor, rows: Side, columns: Side) -> None:
    """Add (N, 4 * O, positions) to (N, O, rows, columns), each phase where it belongs."""
    for phase, part in enumerate(positions.chunk(4, 1)):
        (down, of_rows), (across, of_columns) = rows.seen(phase // 2), columns.seen(phase % 2)
        result[:, :, down, across] += part[:, :, of_rows, of_columns]


def _take_outside(result: Tensor, border: Tensor, rows: Side, columns: Side) -> None:
    """Take away what taps outside would pass on of a bias: zeros are around the map."""
    for at, tap in rows.outside:
        result[:, :, at] -= border[:, tap].sum(1, keepdim=True)
    for at, tap in columns.outside:
        result[:, :, :, at] -= border[:, :, tap].sum(1, keepdim=True)
    for at, tap in rows.outside:
        for other, crossing in columns.outside:
            result[:, :, at, other] += border[:, tap, crossing]  # was taken twice


@torch.library.custom_op("skipcost::compose_up_conv", mutates_args=())
def _compose(
    up: Tensor, up_bias: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compose (C, M, 2, 2) and the last M channels of (O, A + M, 3, 3), in float64, into what `Composed` holds."""
    kernel, total, border = _empty(up, up_bias, weight, bias, dtype)
    of_up = weight[:, -up.shape[1] :].double()
    for start in range(0, up.shape[0], PART):
        taps = functional.conv2d(up[start : start + PART].double(), of_up, padding=2)  # (C, O, 4, 4), stride 2
        phases = taps.unflatten(3, (2, 2)).unflatten(2, (2, 2))  # (C, O, pixel, phase, pixel, phase)
        kernel[:, start : start + PART] = phases.flip(2, 4).permute(3, 5, 1, 0, 2, 4).flatten(0, 2)
    sums = total.new_zeros(total.shape, dtype=torch.float64) if bias is None else bias.double()
    if up_bias is not None:
        passed = (of_up * up_bias.double().view(-1, 1, 1)).sum(1)
        border.copy_(passed)
        sums = sums + passed.sum((1, 2))
    total.copy_(sums)
    return kernel, total, border


def _empty(
    up: Tensor, up_bias: Tensor | None, weight: Tensor, _bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out_channels, taps = weight.shape[0], 0 if up_bias is None else 3
    like = partial(torch.empty, dtype=dtype, device=weight.device)
    kernel = like((4 * out_channels, up.shape[0], 2, 2), memory_format=_layout(weight))
    return kernel, like(out_channels), like((out_channels, taps, taps))


def _layout(*given: Tensor) -> torch.memory_format:
    """channels_last where one of the tensors can be nothing else, as PyTorch's convolution decides."""
    last = any(each.is_contiguous(memory_format=LAST) and not each.is_contiguous() for each in given)
    return LAST if last else torch.contiguous_format


_compose.register_fake(_empty)
