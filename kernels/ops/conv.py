"""How a convolution is launched: from maps, packed weights and a tile to a `Launch`, by addresses or by descriptors.

Everything that convolves goes through `conv_launch`: inference, training's forward pass, the gradient of the input.

ATen's convolution over maps side by side, cuDNN's on a GPU, stands here too: it reads one map, so the joined one is
made where it is needed, and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn

from skipcost.kernels.ops.launch import Descriptor, Launch, span
from skipcost.kernels.ops.tiles import FEW_CHANNELS, Need, Tile, default_tile
from skipcost.unet_models.ops import crop_all

GROUP = 8  # tiles of neighbouring pixels that run together
NHWC = (0, 2, 3, 1)
MAX_DESCRIPTORS = 8  # maps that the kernel by descriptor has arguments for; UNet++ of depth 6 reads 7
ALIGNED = 16  # bytes: what descriptors and wide loads need of addresses and strides
ONES = [1, 1]


def pack_weight(weight: Tensor) -> Tensor:
    """Lay (O, C, k, k) out as (O, k, k, C): the reduction runs along memory. No copy where it is channels_last."""
    return weight.permute(NHWC).contiguous()


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Return how many rows and columns of zeros a layer of odd kernel sides adds on each side, which may be a word."""
    if not isinstance(conv.padding, str):
        rows, columns = conv.padding
        return rows, columns
    steps = (0, 0) if conv.padding == "valid" else conv.dilation
    rows, columns = (step * (side - 1) // 2 for step, side in zip(steps, conv.kernel_size, strict=True))
    return rows, columns


def dense(x: Tensor) -> Tensor:
    """Return (N, C, H, W) in channels_last, with a new map's strides also where a size of 1 leaves a choice."""
    wanted = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last).stride()
    return x if x.stride() == wanted else torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """Lay a map out channels_last, also where its strides would pass for it by accident."""
    return x.permute(NHWC).contiguous().permute(0, 3, 1, 2)


def conv_launch(
    sources: Sequence[Tensor],
    weight: Tensor,
    out: Tensor,
    *,
    padding: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    pooled: Tensor | None = None,
    partials: Tensor | None = None,
    tf32: bool = False,
    tile: Tile | None = None,
) -> Launch:
    """Convolve the sources, as if their channels were one map's, into `out`: relu(conv * scale + shift).

    sources: (N, C_i, H, W) of equal N, H and W, channel stride 1; a crop is a view. weight: (O, k, k, sum of C_i),
    contiguous. out: (N, O, H', W') of channel stride 1; it may be a slice of a wider map. pooled: (N, O, H'//2, W'//2),
    the 2x2 maximum of what is stored. partials: (tiles, 3, O), count, mean and summed squared deviations of what each
    tile stores. tf32: round 32-bit operands to 10 bits, as tensor cores do. Nothing is checked here: ops do.
    """
    tile = tile or default_tile(need_of(sources, weight, out, tf32=tf32), "pointer")
    precision = "tf32" if tf32 and weight.dtype == torch.float32 else "ieee"
    common = {
        "side": weight.shape[1],
        "padding": padding,
        "relu": relu,
        "precision": precision,
        "tile_channels": tile.channels,
        "tile_depth": tile.depth,
    }
    build = {"pointer": _by_address, "few": _of_few_channels, "tma": _by_descriptor}[tile.form]
    return build(sources, weight, out, scale, shift, pooled, partials, tile, common)


def statistics_tiles(out: Tensor, tile: Tile, *, pooled: bool = False) -> int:
    """Return how many tiles of pixels `out` (N, O, H, W) is cut into: the first size of `partials`."""
    batch, _, height, width = out.shape
    if tile.form == "tma":
        return int(batch * -(-height // tile.rows) * -(-width // tile.columns))
    pixels = batch * -(-height // 2) * -(-width // 2) * 4 if pooled else batch * height * width
    return int(-(-pixels // tile.pixels))


def need_of(
    sources: Sequence[Tensor], weight: Tensor, out: Tensor, *, tf32: bool = False, op: str = "conv_bn_relu"
) -> Need:
    """Return what decides on the tile of this convolution; weight is packed."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return Need(
        op=op,
        in_channels=weight.shape[3],
        out_channels=weight.shape[0],
        height=out.shape[2],
        width=out.shape[3],
        batch=out.shape[0],
        precision=names.get(weight.dtype, "tf32" if tf32 else "fp32"),
        taps=weight.shape[1] ** 2,
        sources=len(sources),
        divisor=gcd(*(each.shape[1] for each in sources)),
    )


def why_not_few(sources: Sequence[Tensor], weight: Tensor) -> str:
    """Say why all taps of all channels are no single step; empty where they are."""
    if len(sources) > 1:
        return "there are several maps"
    if weight.shape[3] > FEW_CHANNELS:
        return f"{weight.shape[3]} channels are more than {FEW_CHANNELS}"
    return ""


def why_not_tma(sources: Sequence[Tensor], outputs: Sequence[Tensor], weight: Tensor, depth: int) -> str:
    """Say why the copy engine cannot move these maps and this weight; empty where it can."""
    maps = (*sources, *outputs)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{weight.dtype} has no descriptor form"
    if len(sources) > MAX_DESCRIPTORS:
        return f"{len(sources)} maps are more than {MAX_DESCRIPTORS}"
    if any(0 in each.shape for each in maps):
        return "a map is empty"
    for each in maps:
        if any(stride * each.itemsize % ALIGNED for axis, stride in enumerate(each.stride()) if axis != 1):
            return f"strides {each.stride()} of {each.itemsize} bytes are not multiples of {ALIGNED} bytes"
    if any(each.data_ptr() % ALIGNED for each in (*maps, weight)):
        return f"a map or the weight does not start at a multiple of {ALIGNED} bytes"
    divides = all(each.shape[1] % depth == 0 for each in sources)
    return "" if divides else f"a block of {depth} channels does not divide every map's"


def _grid(out: Tensor, tile: Tile, *, pooled: bool) -> tuple[int]:
    across = -(-out.shape[1] // tile.channels)
    return (statistics_tiles(out, tile, pooled=pooled) * across,)


def _outputs(out: Tensor, pooled: Tensor | None) -> dict[str, tuple[int, ...] | None]:
    return {"out_strides": _strides(out), "pooled_strides": None if pooled is None else _strides(pooled)}


def _strides(x: Tensor) -> tuple[int, int, int]:
    n, _, y, x_ = x.stride()
    return n, y, x_


def _by_address(
    sources: Sequence[Tensor], weight: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None,
    pooled: Tensor | None, partials: Tensor | None, tile: Tile, common: dict[str, object],
) -> Launch:  # fmt: skip
    batch, _, height, width = sources[0].shape
    arguments = {
        "sources": tuple(sources),
        "source_channels": tuple(each.shape[1] for each in sources),
        "source_strides": tuple(_strides(each) for each in sources),
        "weight": weight,
        "scale": scale,
        "shift": shift,
        "out": out,
        "pooled": pooled,
        "partials": partials,
        **_outputs(out, pooled),
        "batch": batch,
        "height": height,
        "width": width,
        "out_height": out.shape[2],
        "out_width": out.shape[3],
        "in_channels": weight.shape[3],
        "out_channels": weight.shape[0],
    }
    constants = {**common, "wide": _wide(sources, out, pooled, tile), "tile_pixels": tile.pixels, "group": GROUP}
    grid = _grid(out, tile, pooled=pooled is not None)
    return Launch("conv.conv", grid, arguments, constants, tile.warps, tile.stages)


def _of_few_channels(
    sources: Sequence[Tensor], weight: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None,
    pooled: Tensor | None, partials: Tensor | None, tile: Tile, common: dict[str, object],
) -> Launch:  # fmt: skip
    (source,) = sources
    batch, channels, height, width = source.shape
    n, c, y, x = source.stride()
    arguments = {
        "source": source,
        "source_strides": (n, y, x, c),
        "weight": weight,
        "scale": scale,
        "shift": shift,
        "out": out,
        "pooled": pooled,
        "partials": partials,
        **_outputs(out, pooled),
        "batch": batch,
        "height": height,
        "width": width,
        "out_height": out.shape[2],
        "out_width": out.shape[3],
        "out_channels": weight.shape[0],
    }
    constants = {
        **common,
        "in_channels": channels,
        "wide": _wide(sources, out, pooled, tile),
        "tile_pixels": tile.pixels,
        "group": GROUP,
    }
    grid = _grid(out, tile, pooled=pooled is not None)
    return Launch("conv.conv_few", grid, arguments, constants, tile.warps, tile.stages)


def _by_descriptor(
    sources: Sequence[Tensor], weight: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None,
    pooled: Tensor | None, partials: Tensor | None, tile: Tile, common: dict[str, object],
) -> Launch:  # fmt: skip
    block = (1, tile.rows, tile.columns)
    half = (1, tile.rows // 2, tile.columns // 2, tile.channels)
    maps = [Descriptor(each.permute(NHWC), (*block, tile.depth)) for each in sources]
    arguments = {
        **{f"map_{index}": each for index, each in enumerate([*maps, *[None] * (MAX_DESCRIPTORS - len(maps))])},
        "source_channels": tuple(each.shape[1] for each in sources),
        "weight": Descriptor(weight.flatten(1), (tile.channels, tile.depth)),
        "scale": scale,
        "shift": shift,
        "out": Descriptor(out.permute(NHWC), (*block, tile.channels)),
        "pooled": None if pooled is None else Descriptor(pooled.permute(NHWC), half),
        "partials": partials,
        "out_height": out.shape[2],
        "out_width": out.shape[3],
        "in_channels": weight.shape[3],
        "out_channels": weight.shape[0],
    }
    constants = {**common, "tile_rows": tile.rows, "tile_columns": tile.columns}
    return Launch("conv_tma.conv", _grid(out, tile, pooled=False), arguments, constants, tile.warps, tile.stages)


def _wide(sources: Sequence[Tensor], out: Tensor, pooled: Tensor | None, tile: Tile) -> bool:
    """Whether the offset of an element, or the number of a pixel up to the end of the last tile, needs 64 bits."""
    pixels = statistics_tiles(out, tile, pooled=pooled is not None) * tile.pixels
    return max(pixels, *(span(each) for each in (*sources, out, *([] if pooled is None else [pooled])))) >= 2**31


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
