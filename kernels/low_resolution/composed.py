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

Left out: gradients (the composed weights would be made anew in every step), and up-sampled maps that are cropped, which
no network of the suite has. Tried on CPUs only.
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
        with torch.inference_mode(mode=False), torch.no_grad():
            by_type[dtype] = Composed(*_compose(up.weight, up.bias, conv.weight, conv.bias, dtype))
    made: Composed = by_type[dtype]
    return made


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
        shape = (x.shape[0], len(made.bias), height - 2 + 2 * padding, width - 2 + 2 * padding)
        layout = _layout(x, made.kernel)
        result = made.bias.view(-1, 1, 1).expand(shape).contiguous(memory_format=layout)
    _add_phases(result, functional.conv2d(x, made.kernel, padding=padding), padding)
    if padding:
        _take_outside(result, made.border)
    return result


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


def _add_phases(result: Tensor, positions: Tensor, padding: int) -> None:
    """Add (N, 4 * O, h - 1 + 2 * padding, ...) to (N, O, 2 * (h - 1 + padding), ...), each phase where it belongs.

    Position p lies between the pixels p - 1 and p of the small map and gives the rows 2p - 1 and 2p of the result with
    padding. With padding the first position has no first row and the last one no second.
    """
    rows, columns = (size // 2 for size in result.shape[2:])
    for phase, part in enumerate(positions.chunk(4, 1)):
        y, x = phase // 2, phase % 2
        top, left = (1 - y, 1 - x) if padding else (y, x)
        skipped = (top, left) if padding else (0, 0)
        seen = part[:, :, skipped[0] : skipped[0] + rows, skipped[1] : skipped[1] + columns]
        result[:, :, top::2, left::2] += seen


def _take_outside(result: Tensor, border: Tensor) -> None:
    """Take from the border rows and columns what taps outside would pass on of a bias: zeros are around the map."""
    if not border.numel():
        return
    for at, tap in ((0, 0), (-1, 2)):
        result[:, :, at] -= border[:, tap].sum(1, keepdim=True)
        result[:, :, :, at] -= border[:, :, tap].sum(1, keepdim=True)
        for other, crossing in ((0, 0), (-1, 2)):
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
