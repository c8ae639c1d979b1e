"""A convolution over maps side by side, and its gradients, by ATen, whose convolutions are cuDNN's on a GPU.

ATen reads one map: the joined one is made where it is needed, and never kept. The same by Triton is in `conv_train`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipcost.kernels.ops.conv import channels_last, dense
from skipcost.unet_models.ops import crop_all

ONES = [1, 1]


def aten_output(maps: Sequence[Tensor], weight: Tensor, *, padding: int) -> Tensor:
    """Return the convolution of the maps, cropped and side by side, in channels_last."""
    return dense(torch.ops.aten.convolution(_joined(maps), channels_last(weight), None, *_geometry(padding)))


def aten_grads(
    maps: Sequence[Tensor], weight: Tensor, grad: Tensor, *, padding: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the joined map, in channels_last, and of the weight, each where it is wanted."""
    if not any(wanted):
        return None, None
    joined_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, _joined(maps), channels_last(weight), None, *_geometry(padding), [*wanted, False]
    )
    return joined_grad if joined_grad is None else dense(joined_grad), weight_grad


def _joined(maps: Sequence[Tensor]) -> Tensor:
    windows = crop_all(maps)
    return channels_last(torch.cat(windows, 1) if len(windows) > 1 else windows[0])


def _geometry(padding: int) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Stride, padding, dilation, not transposed, output padding, groups: as ATen's convolutions take them."""
    return ONES, [padding, padding], ONES, False, [0, 0], 1
