"""What the ops refuse, in one sentence each, before anything is launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIDES = (1, 3)
PADDINGS = (0, 1)


def names(dtypes: Sequence[torch.dtype]) -> str:
    """List types as people write them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_maps(op: str, maps: Sequence[Tensor], dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Refuse maps that are not (N, C_i, H_i, W_i) of one batch, one type that the kernel takes, and one device."""
    if not maps:
        message = f"{op} got no maps: give it at least one of shape (N, C, H, W)"
        raise ValueError(message)
    first = maps[0]
    for index, each in enumerate(maps):
        if each.ndim != 4:  # noqa: PLR2004 - N, C, H, W
            message = f"map {index} of {op} has shape {tuple(each.shape)}: every map must be (N, C, H, W)"
            raise ValueError(message)
        if each.dtype not in dtypes:
            message = f"map {index} of {op} is {each.dtype}, which the kernel does not take; accepted: {names(dtypes)}"
            raise ValueError(message)
        if (each.dtype, each.device) != (first.dtype, first.device):
            message = (
                f"map {index} of {op} is {each.dtype} on {each.device}, map 0 is {first.dtype} on "
                f"{first.device}: bring all maps to one type and device first"
            )
            raise ValueError(message)
        if each.shape[0] != first.shape[0]:
            message = (
                f"map {index} of {op} has batch size {each.shape[0]}, map 0 has {first.shape[0]}: "
                "all maps must come from the same batch"
            )
            raise ValueError(message)


def check_weight(
    op: str, maps: Sequence[Tensor], weight: Tensor, padding: int, vectors: Mapping[str, Tensor | None]
) -> None:
    """Refuse a weight that is not (O, C, k, k) for these maps, and vectors that are not one number per output."""
    first = maps[0]
    sides = tuple(weight.shape[2:])
    if weight.ndim != 4 or sides[0] != sides[1] or sides[0] not in SIDES:  # noqa: PLR2004 - O, C, k, k
        message = f"the weight of {op} has shape {tuple(weight.shape)}: (O, C, 3, 3) and (O, C, 1, 1) are supported"
        raise ValueError(message)
    channels = sum(each.shape[1] for each in maps)
    if weight.shape[1] != channels:
        message = (
            f"the weight of {op} has shape {tuple(weight.shape)}, the maps have {channels} channels: the weight must "
            f"read {channels}; groups, stride and dilation other than 1 are not supported"
        )
        raise ValueError(message)
    if (weight.dtype, weight.device) != (first.dtype, first.device):
        message = (
            f"the weight of {op} is {weight.dtype} on {weight.device}, the maps are {first.dtype} on {first.device}: "
            "bring them to one type and device first"
        )
        raise ValueError(message)
    if padding not in PADDINGS:
        message = f"padding={padding} of {op} is not supported; accepted: 0, 1"
        raise ValueError(message)
    check_vectors(op, weight, vectors)
    if min(output_size(maps, weight.shape[2], padding)) < 1:
        message = (
            f"{op} got maps of {', '.join(f'{each.shape[2]}x{each.shape[3]}' for each in maps)}: after cropping, "
            f"nothing is left of a {sides[0]}x{sides[1]} convolution with padding {padding}; give it larger maps"
        )
        raise ValueError(message)


def check_vectors(op: str, weight: Tensor, vectors: Mapping[str, Tensor | None]) -> None:
    """Refuse per-channel numbers that are not (O,), on the weight's device, in fp32 (fp64 beside fp64)."""
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != (weight.shape[0],):
            message = (
                f"{name} of {op} has shape {tuple(vector.shape)}: one number for each of {weight.shape[0]} outputs"
            )
            raise ValueError(message)
        if (vector.dtype, vector.device) != (wanted, weight.device):
            message = (
                f"{name} of {op} is {vector.dtype} on {vector.device}: beside a weight of {weight.dtype} on "
                f"{weight.device} it must be {wanted} on {weight.device}"
            )
            raise ValueError(message)


def check_up_conv(op: str, maps: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a weight that is not (C, O, 2, 2) for x (N, C, H, W), and types and devices that differ."""
    check_maps(op, [*maps, x])
    shape = tuple(x.shape)
    if 0 in shape[1:]:
        message = f"x of {op} has shape {shape}: it needs a channel and a pixel at least; only the batch may be empty"
        raise ValueError(message)
    if weight.ndim != 4 or weight.shape[0] != shape[1] or tuple(weight.shape[2:]) != (2, 2):  # noqa: PLR2004
        message = (
            f"the weight of {op} has shape {tuple(weight.shape)}: for x of shape {shape} it must be "
            f"({shape[1]}, O, 2, 2), as of nn.ConvTranspose2d with kernel 2 and stride 2, without groups"
        )
        raise ValueError(message)
    if bias is not None and tuple(bias.shape) != (weight.shape[1],):
        message = f"the bias of {op} has shape {tuple(bias.shape)}: one number for each of {weight.shape[1]} outputs"
        raise ValueError(message)
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and (each.dtype, each.device) != (x.dtype, x.device):
            message = (
                f"the {name} of {op} is {each.dtype} on {each.device}, x is {x.dtype} on {x.device}: "
                "bring them to one type and device first"
            )
            raise ValueError(message)


def check_encoder_maps(maps: Sequence[Tensor], x: Tensor) -> None:
    """Refuse a decoder map that will be larger than an encoder map it joins: that is a network wired wrongly."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    for index, each in enumerate(maps):
        if each.shape[2] < height or each.shape[3] < width:
            message = (
                f"map {index} of up_conv_concat is {each.shape[2]}x{each.shape[3]}, the map that joins it is "
                f"up-sampled to {height}x{width}: encoder maps must be at least as large; to crop both, use up_conv "
                "and crop_concat"
            )
            raise ValueError(message)


def check_buffer(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, channel: int) -> None:
    """Refuse a buffer that the up-sampled map does not fill, and one that nothing may be written to."""
    name = f"the buffer of up_conv_into has shape {tuple(buffer.shape)}"
    check_maps("up_conv_into", [x, buffer])
    if channel < 0 or channel + weight.shape[1] > buffer.shape[1]:
        message = f"{name}: {weight.shape[1]} channels from channel {channel} on do not fit; give it more channels"
        raise ValueError(message)
    if buffer.shape[2] > 2 * x.shape[2] or buffer.shape[3] > 2 * x.shape[3]:
        message = (
            f"{name}: x of shape {tuple(x.shape)} gives {2 * x.shape[2]}x{2 * x.shape[3]} pixels and cannot fill it"
        )
        raise ValueError(message)
    strides = buffer.stride()
    repeated = any(stride == 0 and size > 1 for stride, size in zip(strides, buffer.shape, strict=True))
    if repeated or (strides[1] != 1 and buffer.shape[1] > 1):
        message = f"{name} and strides {strides}: channels must be adjacent and nothing repeated; make it channels_last"
        raise ValueError(message)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias, buffer)):
        message = "up_conv_into has no gradient, but an argument requires one: use up_conv_concat, or torch.no_grad()"
        raise ValueError(message)


def check_result_buffer(
    op: str, size: Sequence[int], inputs: Sequence[Tensor | None], buffer: Tensor, channel: int
) -> None:
    """Refuse a buffer that a result of `size` = (N, O, H, W) does not fit, and one that nothing may be written to.

    inputs: the op's other tensors, the map first.
    """
    x = inputs[0]
    assert x is not None
    check_maps(op, [x, buffer])
    name = f"the buffer of {op} has shape {tuple(buffer.shape)}"
    if channel < 0 or channel + size[1] > buffer.shape[1]:
        message = f"{name}: {size[1]} channels from channel {channel} on do not fit; give it more channels"
        raise ValueError(message)
    if buffer.shape[2:] != tuple(size[2:]):
        message = f"{name}: the result has {size[2]}x{size[3]} pixels, and so must the buffer"
        raise ValueError(message)
    if any(stride == 0 and extent > 1 for stride, extent in zip(buffer.stride(), buffer.shape, strict=True)):
        message = f"{name} and strides {buffer.stride()}: nothing may be repeated in what is written to; make it whole"
        raise ValueError(message)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (*inputs, buffer)):
        message = f"{op} has no gradient, but an argument requires one: use the op that returns its result, or no_grad"
        raise ValueError(message)


def output_size(maps: Sequence[Tensor], side: int, padding: int) -> tuple[int, int]:
    """Height and width of a convolution over maps that are cropped to the smallest of them."""
    shrink = side - 1 - 2 * padding
    height = min(each.shape[2] for each in maps) - shrink
    width = min(each.shape[3] for each in maps) - shrink
    return height, width
