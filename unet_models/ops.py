"""The arithmetic of the executor, as a table of functions that can be replaced one by one.

`REFERENCE` is plain PyTorch and the definition of every op: kernels are validated against it, and counting is always
done on it. `dataclasses.replace(REFERENCE, merge=...)` is a one-kernel ablation. Ops take the layer that holds the
weights, so that a replacement may fold or pack them, and never own state of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from skipcost.unet_models.topology import Conv, Gate


class ConvNormAct(nn.Module):
    """The weights of a convolution, its norm and its ReLU; `Ops.conv_norm_act` runs them.

    `valid` takes the padding away; a 1x1 or transposed convolution has none. Padding is a number, never the word
    "same", which fvcore counts as zero operations.
    """

    def __init__(self, record: Conv, *, valid: bool) -> None:
        super().__init__()
        padding = 0 if valid else record.kernel // 2
        self.conv = nn.Conv2d(record.in_channels, record.out_channels, record.kernel, padding=padding, bias=record.bias)
        self.norm = _norm(record)
        self.act = record.act

    def without_act(self) -> ConvNormAct:
        """Return the same layer, the same weights, without its ReLU."""
        layer = copy(self)
        layer.act = False
        return layer


class AttentionGate(nn.Module):
    """The weights of a gate: three 1x1 convolutions, each with the network's norm; `Ops.gate` runs them."""

    def __init__(self, record: Gate) -> None:
        super().__init__()
        self.x = ConvNormAct(record.x, valid=False)
        self.signal = ConvNormAct(record.signal, valid=False)
        self.psi = ConvNormAct(record.psi, valid=False)


def _norm(record: Conv) -> nn.Module | None:
    channels = record.out_channels
    match record.norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels, affine=True)
        case "group":
            return nn.GroupNorm(record.norm_groups, channels)
    return None


def conv_norm_act(layer: ConvNormAct, x: Tensor) -> Tensor:
    """Convolve (N, C, H, W), then norm and ReLU where the layer has them."""
    x = layer.conv(x)
    if layer.norm is not None:
        x = layer.norm(x)
    return functional.relu(x, inplace=True) if layer.act else x


def up_conv(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """2x2 transposed convolution, stride 2: (N, C, H, W) -> (N, C', 2H, 2W)."""
    result: Tensor = layer(x)
    return result


def up_sample(x: Tensor, factor: int, mode: str) -> Tensor:
    """Enlarge (N, C, H, W) by a whole factor; bilinear with align_corners=False, or nearest."""
    return functional.interpolate(x, scale_factor=float(factor), mode=mode)


def up_sample_conv(layer: ConvNormAct, x: Tensor, factor: int, mode: str) -> Tensor:
    """Up-sample, then convolve: UNet 3+'s edges from deeper levels."""
    return conv_norm_act(layer, up_sample(x, factor, mode))


def pool(x: Tensor, factor: int, *, ceil: bool) -> Tensor:
    """Max-pool (N, C, H, W) by `factor`, which is kernel and stride; an incomplete window counts only with `ceil`."""
    return functional.max_pool2d(x, factor, ceil_mode=ceil)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Centre-crop (N, C, H, W) at offset (H - height) // 2; a view."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    if x.shape[-2:] == (height, width):
        return x
    return x[..., top : top + height, left : left + width]


def crop_all(maps: Sequence[Tensor]) -> list[Tensor]:
    """Centre-crop all maps to the smallest height and width among them."""
    height, width = min(m.shape[-2] for m in maps), min(m.shape[-1] for m in maps)
    return [crop(m, height, width) for m in maps]


def merge(maps: list[Tensor], how: str) -> Tensor:
    """Centre-crop all maps to the smallest of them, then concatenate the channels or add."""
    cropped = crop_all(maps)
    if len(cropped) == 1:
        return cropped[0]
    if how == "concat":
        return torch.cat(cropped, 1)
    result = cropped[0] + cropped[1]  # a new map: an encoder map that others still read is never written to
    for other in cropped[2:]:
        result += other
    return result


def gate(layer: AttentionGate, x: Tensor, signal: Tensor) -> Tensor:
    """Weigh (N, C, H, W) pixel by pixel with the coefficients that x and the signal give; cropped to each other."""
    x, signal = crop_all((x, signal))
    joint = functional.relu(conv_norm_act(layer.x, x) + conv_norm_act(layer.signal, signal), inplace=True)
    return x * torch.sigmoid(conv_norm_act(layer.psi, joint))


@dataclass(frozen=True, slots=True)
class Ops:
    """The functions through which the executor does all of its arithmetic on maps.

    merge_conv, up_concat_conv, relu_concat and conv_pool join steps that other rows do one by one; where they are None,
    as in the reference, those rows run.
    merge_conv(layer, maps, how, up): merge the maps, the last of them up-sampled by `up` first where that is given, and
    run a node's first convolution. It may empty the list, so that no map outlives its use.
    up_concat_conv(layer, maps, factor, mode): up-sample the last of the maps as up_sample does, concatenate, and run a
    node's first convolution. It may empty the list as well.
    relu_concat(maps, shape): take each map as it is made, ReLU, crop, and concatenate to (channels, height, width): for
    a node all of whose edges end in a convolution with ReLU, which the edges then leave out.
    conv_pool(layer, x): run a node's last convolution; return the map and its 2x2 max-pool, floored.
    around: makes the context in which one forward pass runs.
    """

    conv_norm_act: Callable[[ConvNormAct, Tensor], Tensor]
    up_conv: Callable[[nn.ConvTranspose2d, Tensor], Tensor]
    up_sample: Callable[[Tensor, int, str], Tensor]
    up_sample_conv: Callable[[ConvNormAct, Tensor, int, str], Tensor]
    pool: Callable[..., Tensor]
    merge: Callable[[list[Tensor], str], Tensor]
    gate: Callable[[AttentionGate, Tensor, Tensor], Tensor]
    merge_conv: Callable[[ConvNormAct, list[Tensor], str, nn.ConvTranspose2d | None], Tensor] | None = None
    up_concat_conv: Callable[[ConvNormAct, list[Tensor], int, str], Tensor] | None = None
    relu_concat: Callable[[Iterator[Tensor], tuple[int, int, int]], Tensor] | None = None
    conv_pool: Callable[[ConvNormAct, Tensor], tuple[Tensor, Tensor]] | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


REFERENCE = Ops(conv_norm_act, up_conv, up_sample, up_sample_conv, pool, merge, gate)
