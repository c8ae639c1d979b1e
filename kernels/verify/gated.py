"""Which launches the resource gate compiles: `GATED`, one of each kernel and form that ships, and `tuned` tiles.

The launches come from the ops' own functions with the tiles that ship, on meta tensors, so that a change of either
shows. Shapes are those of a U-Net of width 64 at 512x512, batch 8, unless the row's name says another. A kernel that
is not in this table is not gated: add the row with the kernel. Tiles of a configuration file are gated by themselves,
each for the GPU that it was tuned on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.low_resolution import tap_upsample_add
from skipcost.kernels.low_resolution.tap_first import axes
from skipcost.kernels.ops import batch_norm, conv_bn_relu, crop_concat, up_conv
from skipcost.kernels.ops.conv import conv_launch, need_of, statistics_tiles
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.ops.tiles import Tile, default_tile, tuned_rows
from skipcost.kernels.ops.weight_gradient import weight_gradient_launches

BATCH = 8
HUGE = 256  # a batch whose largest maps have 2**32 elements, so that their addresses take 64 bits
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
PRECISIONS = ("bf16", "tf32")
LAST = torch.channels_last

SKIP = ((64, 568), (64, 392))  # the first of the 2015 network, image of 572: maps to crop, (channels, size)
SIX = ((64, 40),) * 5 + ((64, 37),)
CONVOLUTIONS = {  # channels of the maps, output channels, size
    "64>64@512": ((64,), 64, 512),
    "64>128@256": ((64,), 128, 256),
    "64+64>64@512": ((64, 64), 64, 512),  # virtual concat, as in every decoder
    "5x64>64@512": ((64,) * 5, 64, 512),  # UNet++'s last node
}
FIRST, PLAIN = ((3,), 64, 512), CONVOLUTIONS["64>64@512"]
UP = {"128>64@512": 512, "128>64@511": 511}  # whole, and cropped by an odd number


def _map(
    channels: int, size: int, precision: str, *, batch: int = BATCH, memory_format: torch.memory_format = LAST
) -> Tensor:  # fmt: skip
    return _empty((batch, channels, size, size), precision, memory_format)


def _empty(shape: tuple[int, ...], precision: str, memory_format: torch.memory_format = LAST) -> Tensor:
    return torch.empty(shape, dtype=TYPES[precision], device="meta", memory_format=memory_format)


def _vector(size: int, precision: str = "fp32") -> Tensor:
    return torch.empty(size, dtype=TYPES[precision], device="meta")


def _moved(sizes: tuple[tuple[int, int], ...], precision: str, *, back: bool = False, **options: Any) -> Launch:
    """Crop and join maps of (channels, size), the smallest last; back: the gradients, windows into frames of zeros."""
    maps = [_map(*size, precision, **options) for size in sizes]
    joined = _map(sum(channels for channels, _ in sizes), sizes[-1][1], precision, **options)
    pairs = zip(maps, joined.split([channels for channels, _ in sizes], 1), strict=True)
    moves = [crop_concat.centred(*(reversed(pair) if back else pair)) for pair in pairs]
    return _one("crop_concat.place", crop_concat.launches(moves))


def _conv(
    form: str, channels: tuple[int, ...], outputs: int, size: int, precision: str, *,
    extra: str = "", batch: int = BATCH,
) -> Launch:  # fmt: skip
    """A 3x3 convolution over maps of so many channels; extra: "pool", or "statistics" for training's raw outputs."""
    sources = [_map(each, size, precision, batch=batch) for each in channels]
    weight = torch.empty(outputs, 3, 3, sum(channels), dtype=TYPES[precision], device="meta")
    out = _map(outputs, size, precision, batch=batch)
    tf32 = precision == "tf32"
    tile = default_tile(need_of(sources, weight, out, tf32=tf32), form)
    options: dict[str, Any] = {"scale": _vector(outputs), "shift": _vector(outputs), "relu": True}
    if extra == "pool":
        options["pooled"] = _map(outputs, size // 2, precision, batch=batch)
    if extra == "statistics":
        options = {"partials": torch.empty(statistics_tiles(out, tile), 3, outputs, device="meta")}
    return conv_launch(sources, weight, out, padding=1, tf32=tf32, tile=tile, **options)


def _up_conv(size: int, precision: str) -> Launch:
    """From 128 channels at 256x256 into the second half of a map of 128, as the last decoder has it."""
    weight = torch.empty(2, 2, 64, 128, dtype=TYPES[precision], device="meta").permute(3, 2, 0, 1)
    out = _map(128, size, precision).narrow(1, 64, 64)
    x, bias = _map(128, 256, precision), _vector(64, precision)
    return _one("up_conv.up_conv", up_conv.launches(x, weight, bias, out, tf32=precision == "tf32"))


def _taps(
    factor: int, precision: str, *, add: bool = False, channels: int = 320, memory_format: torch.memory_format = LAST,
    batch: int = 1,
) -> Launch:  # fmt: skip
    """To 64 channels at 512x512, which are the last of a map of `channels`, as a decoder node of UNet 3+ has them."""
    low = 512 // factor
    taps = torch.empty(batch, low, low, 3, 3, 64, device="meta")
    out = _map(channels, 512, precision, batch=batch, memory_format=memory_format).narrow(1, channels - 64, 64)
    made = axes((low, low), (3, 3), factor, "bilinear", False, 1, (0, 0, 512, 512))
    (launch,) = tap_upsample_add.launches(taps, _vector(64, precision), out, made, add=add)
    return launch


def _weight_gradient(
    kernel: str, channels: tuple[int, ...], outputs: int, size: int, precision: str, *, batch: int = BATCH
) -> Launch:  # fmt: skip
    sources = [_map(each, size, precision, batch=batch) for each in channels]
    grad = _map(outputs, size, precision, batch=batch)
    total = torch.empty(outputs, 3, 3, sum(channels), dtype=TYPES[precision], device="meta")
    launches = weight_gradient_launches(sources, grad, total, padding=1, tf32=precision == "tf32")
    return _one(f"weight_gradient.{kernel}", launches)


def _norm(kernel: str, precision: str) -> Launch:
    """One of batch norm's launches, for 64 channels at 512x512: the largest map of the network."""
    y, other, third = (_map(64, 512, precision) for _ in range(3))
    mean, variance, gamma, beta = (_vector(64) for _ in range(4))
    norm = batch_norm.Norm(mean, variance, gamma, beta, eps=1e-5, relu=True)
    launches = [
        *batch_norm.statistics_launches(y, mean, variance),
        batch_norm.normalize_launch(y, norm, other),
        *batch_norm.gradient_launches(y, other, norm, torch.empty(2, 64, device="meta"), third),
    ]
    return _one(f"batch_norm.{kernel}", launches)


def _one(kernel: str, launches: list[Launch]) -> Launch:
    """The launch of this kernel: ops return those of all their kernels."""
    return next(each for each in launches if each.kernel == kernel)


GATED: dict[str, Callable[[], Launch]] = {
    "crop_concat/unet-572/bf16": partial(_moved, SKIP, "bf16"),
    "crop_concat/unet-572-nchw/bf16": partial(_moved, SKIP, "bf16", memory_format=torch.contiguous_format),
    "crop_concat/unet-572-wide/bf16": partial(_moved, SKIP, "bf16", batch=HUGE),
    "crop_concat/six-maps/fp32": partial(_moved, SIX, "fp32"),
    "crop_concat/unet-572-backward/bf16": partial(_moved, SKIP, "bf16", back=True),
    **{
        f"conv/{form}/{shape}/{precision}": partial(_conv, form, *CONVOLUTIONS[shape], precision)
        for form in ("pointer", "tma")
        for shape in CONVOLUTIONS
        for precision in PRECISIONS
    },
    **{
        f"conv/{form}+{extra}/64>64@512/{precision}": partial(_conv, form, *PLAIN, precision, extra=extra)
        for extra in ("pool", "statistics")
        for form in ("pointer", "tma")
        for precision in PRECISIONS
    },
    **{
        f"conv/few{'+' * bool(extra)}{extra}/3>64@512/{precision}": partial(
            _conv, "few", *FIRST, precision, extra=extra
        )
        for extra in ("", "statistics")
        for precision in PRECISIONS
    },
    "conv/pointer-wide/64>64@512/bf16": partial(_conv, "pointer", *PLAIN, "bf16", batch=HUGE),
    "conv/few-wide/3>64@512/bf16": partial(_conv, "few", *FIRST, "bf16", batch=HUGE),
    **{
        f"up_conv/{shape}/{precision}": partial(_up_conv, size, precision)
        for shape, size in UP.items()
        for precision in PRECISIONS
    },
    **{f"tap_upsample_add/x{factor}/bf16": partial(_taps, factor, "bf16") for factor in (2, 4, 8)},
    "tap_upsample_add/x2/fp32": partial(_taps, 2, "fp32"),
    "tap_upsample_add/x2-add/bf16": partial(_taps, 2, "bf16", add=True, channels=64),
    "tap_upsample_add/x2-nchw/bf16": partial(_taps, 2, "bf16", memory_format=torch.contiguous_format),
    "tap_upsample_add/x2-wide/bf16": partial(_taps, 2, "bf16", batch=HUGE),
    **{
        f"weight_gradient/{shape}/{precision}": partial(
            _weight_gradient, "weight_gradient_few" if sizes is FIRST else "weight_gradient", *sizes, precision
        )
        for shape, sizes in {"3>64@512": FIRST, **CONVOLUTIONS}.items()
        for precision in PRECISIONS
    },
    "weight_gradient/64>64@512-wide/bf16": partial(_weight_gradient, "weight_gradient", *PLAIN, "bf16", batch=HUGE),
    **{
        f"batch_norm/{kernel}/{precision}": partial(_norm, kernel, precision)
        for kernel in ("tile_statistics", "normalize", "backward_reduce", "backward_apply")
        for precision in ("bf16", "fp32")
    },
    **{f"batch_norm/{kernel}/fp32": partial(_norm, kernel, "fp32") for kernel in ("combine", "finish", "add")},
}


def gated(target: str) -> dict[str, Callable[[], Launch]]:
    """Return everything that is compiled for a target, a key of `targets.TARGETS`, by name."""
    return {**GATED, **tuned(target.replace("_", ""))}


def tuned(architecture: str) -> dict[str, Callable[[], Launch]]:
    """Return a launch for each tile of `configs/<architecture>.json`, at the first shape that it was timed at."""
    return {
        f"tuned/{row['key']}": partial(_called, Call.parse(row["call"]), Tile(**row["tile"]))
        for row in tuned_rows(architecture)
    }


def _called(call: Call, tile: Tile) -> Launch:
    """What an op launches for a call with this tile."""
    tf32, batch = call.precision == "tf32", call.batch
    maps = [_empty((batch, *each), call.precision) for each in call.sources]
    out = _empty((batch, call.out_channels, *call.out_size), call.precision)
    vector = torch.empty(call.out_channels, device="meta")
    if call.op == "up_conv":
        weight = _empty((call.in_channels, call.out_channels, 2, 2), call.precision)
        return _one("up_conv.up_conv", up_conv.launches(maps[0], weight, vector.to(out), out, tf32=tf32, tile=tile))
    weight = _empty((call.out_channels, call.in_channels, call.kernel, call.kernel), call.precision)
    height, width = call.out_size
    pooled = None
    if call.op == "conv_bn_relu_pool":
        pooled = _empty((batch, call.out_channels, height // 2, width // 2), call.precision)
    (launch,) = conv_bn_relu.launches(
        maps, weight, vector, vector, out,
        padding=call.padding, relu=call.relu, pooled=pooled, tf32=tf32, tile=tile,
    )  # fmt: skip
    return launch
