"""A convolution over maps side by side, and its gradients, by the Triton kernels.

What `conv_bn_relu_train` does beside batch norm, where ATen does not do it (`conv_aten`). The kernels read every map
through its own window, so that no joined map is made; its gradient is, and its parts are the maps' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipcost.kernels.ops.batch_norm import precise
from skipcost.kernels.ops.checks import output_size
from skipcost.kernels.ops.conv import channels_last, conv_launch, need_of, pack_weight, statistics_tiles
from skipcost.kernels.ops.conv_bn_relu import pick_form
from skipcost.kernels.ops.launch import Launch, architecture_of
from skipcost.kernels.ops.tiles import FEW_CHANNELS, tile_for
from skipcost.kernels.ops.weight_gradient import weight_gradient_launches
from skipcost.unet_models.ops import crop, crop_all


def empty_output(maps: Sequence[Tensor], weight: Tensor, padding: int) -> Tensor:
    """Allocate what the convolution of weight (O, sum of C_i, k, k) writes: (N, O, H', W') in channels_last."""
    return _empty(maps[0], weight.shape[0], *output_size(maps, weight.shape[2], padding))


def empty_joined(maps: Sequence[Tensor]) -> Tensor:
    """Allocate the maps (N, C_i, H_i, W_i), cropped and side by side: (N, sum of C_i, h, w) in channels_last."""
    height, width = (min(each.shape[axis] for each in maps) for axis in (2, 3))
    return _empty(maps[0], sum(each.shape[1] for each in maps), height, width)


def output_launch(
    maps: Sequence[Tensor], weight: Tensor, y: Tensor, *, padding: int, tf32: bool
) -> tuple[Launch, Tensor]:
    """Convolve the maps into y (N, O, H', W'); also return where statistics of its tiles go, (tiles, 3, O)."""
    launch = _convolution(crop_all(maps), pack_weight(weight), y, padding, tf32=tf32, summarized=True)
    return launch, launch.arguments["partials"]


def joined_grad_launch(weight: Tensor, grad: Tensor, joined_grad: Tensor, *, padding: int, tf32: bool) -> Launch:
    """Write the gradient of the joined map (N, C, h, w), given that of the output (N, O, H', W') in channels_last.

    It is a convolution too: the taps turned round, input and output channels exchanged, padded by what is missing.
    """
    turned = pack_weight(weight.flip(2, 3).transpose(0, 1))
    around = weight.shape[2] - 1 - padding
    if around < 0:  # the frame that a padded 1x1 convolution adds depends on no input
        grad = crop(grad, *joined_grad.shape[2:])
    return _convolution([grad], turned, joined_grad, max(around, 0), tf32=tf32)


def weight_grad_launches(
    maps: Sequence[Tensor], grad: Tensor, weight_grad: Tensor, *, padding: int, tf32: bool
) -> list[Launch]:
    """Write the gradient of the weight, as (O, k, k, sum of C_i), given that of the output in channels_last."""
    windows = crop_all(maps)
    if len(windows) > 1 or windows[0].shape[1] > FEW_CHANNELS:
        windows = [adjacent(each) for each in windows]
    return weight_gradient_launches(windows, grad, weight_grad, padding=padding, tf32=tf32)


def adjacent(x: Tensor) -> Tensor:
    """Return the map (N, C, H, W), with its channels next to each other: a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else channels_last(x)


def _convolution(
    sources: Sequence[Tensor], packed: Tensor, out: Tensor, padding: int, *, tf32: bool, summarized: bool = False
) -> Launch:
    architecture = architecture_of(out.device)
    form = pick_form(sources, packed, out, architecture, tf32=tf32)
    if form != "few":
        sources = [adjacent(each) for each in sources]
    tile = tile_for(need_of(sources, packed, out, tf32=tf32), form, architecture)
    partials = None
    if summarized:
        partials = out.new_empty((statistics_tiles(out, tile), 3, out.shape[1]), dtype=precise(out))
    return conv_launch(sources, packed, out, padding=padding, partials=partials, tf32=tf32, tile=tile)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
