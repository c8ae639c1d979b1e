"""A convolution over a concatenation whose last map is up-sampled, as a sum of two; reference: cat, then `conv2d`.

A convolution is linear in its channels, so conv(cat(a, up(b))) = conv_a(a) + conv_b(up(b)), and the second term is
`tap_first`: neither the up-sampled map nor the concatenation is formed.

Bytes saved: the up-sampled map twice, and where `a` is one map, the copy of it too. The second term is added to the
first as it is computed; where gradients are asked for it is a map of its own, and one more pass adds the terms.
When it loses: as `tap_first`. Tried on CPUs only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.low_resolution.tap_first import tap_first, tap_first_into
from skipcost.unet_models.ops import crop


def split_concat(
    maps: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: int,
    mode: str = "bilinear",
    padding: int = 1,
) -> Tensor:
    """Return the convolution over the concatenated maps and the up-sampled x, all centre-cropped to the smallest.

    maps: (N, C_i, H_i, W_i), none at all if x is the only input; x: (N, C, h, w); weight: (O, sum of C_i + C, kh, kw).
    The rest as for `tap_first`. Differentiable once.
    """
    window = seen_of((x.shape[2], x.shape[3]), factor, [(each.shape[2], each.shape[3]) for each in maps])
    settings = {"factor": factor, "mode": mode, "padding": padding, "window": window}
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
