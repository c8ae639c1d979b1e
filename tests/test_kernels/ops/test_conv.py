"""How a convolution is launched: which kernel takes which maps, and arguments that a launcher on a GPU can read."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.ops import conv_bn_relu as module
from skipcost.kernels.ops.conv import (
    MAX_DESCRIPTORS,
    conv_launch,
    dense,
    pack_weight,
    padding_of,
    statistics_tiles,
    why_not_tma,
)
from skipcost.kernels.ops.conv_bn_relu import launches, pick_form
from skipcost.kernels.ops.launch import Descriptor
from skipcost.kernels.ops.tiles import Tile

LAST = torch.channels_last
BY_DESCRIPTOR = Tile("tma", 128, 64, 16, rows=8, columns=16)


def _map(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=LAST)


def _convolution(*channels: int, outputs: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Maps, weight, no scale, no shift, and room for the result: what `launches` takes."""
    maps = [_map(2, count, 16, 16, dtype=dtype) for count in channels]
    weight = _map(outputs, sum(channels), 3, 3, dtype=dtype)
    return maps, weight, None, None, _map(2, outputs, 16, 16, dtype=dtype)


@pytest.mark.parametrize(
    ("channels", "architecture", "form"),
    [
        ((3,), "sm90", "few"),
        ((64,), "sm90", "tma"),
        ((32, 32), "sm90", "tma"),  # blocks of 32 channels, not of 64, which would reach from one map into the next
        ((96, 48), "sm90", "tma"),
        ((64,), "sm100", "tma"),
        ((64,), "sm120", "tma"),
        ((64,), "sm80", "pointer"),
        ((64,), "gfx942", "pointer"),
        ((64,), "", "pointer"),
        ((24,), "sm90", "pointer"),  # 16 does not divide it
        ((64, 8), "sm90", "pointer"),
        ((16,) * (MAX_DESCRIPTORS + 1), "sm90", "pointer"),
    ],
)
def test_the_form_follows_from_channels_and_architecture(
    channels: tuple[int, ...], architecture: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few channels at once, by descriptor where there is a copy engine and it can move the maps, else by address."""
    monkeypatch.setattr(module, "architecture_of", lambda _: architecture)
    kernels = {"few": "conv.conv_few", "tma": "conv_tma.conv", "pointer": "conv.conv"}

    (launch,) = launches(*_convolution(*channels), padding=1, relu=True)

    assert launch.kernel == kernels[form]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"depth": 64}, "a block of 64 channels does not divide every map's"),
        ({"dtype": torch.float64}, "torch.float64 has no descriptor form"),
        ({"outputs": [_map(2, 9, 16, 16)]}, r"strides \(2304, 1, 144, 9\) of 2 bytes are not multiples of 16 bytes"),
        ({"sources": [_map(0, 16, 16, 16)]}, "a map is empty"),
        ({"sources": [_map(2, 24, 16, 16)[:, 4:20]]}, "a map or the weight does not start at a multiple of 16 bytes"),
        ({"weight": _map(17, 16, 3, 3).flatten()[4:2308].view(16, 3, 3, 16)}, "the weight does not start at"),
        ({"sources": [_map(2, 16, 16, 16)] * 9}, "9 maps are more than 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_what_the_copy_engine_cannot_move_is_said(change: dict[str, Any], reason: str) -> None:
    """The driver would refuse such a descriptor, or the kernel read beside a map, on a GPU only."""
    given = {"sources": [_map(2, 16, 16, 16)], "outputs": [_map(2, 16, 16, 16)], "depth": 16, **change}
    given.setdefault("weight", _map(16, 16, 3, 3, dtype=given.pop("dtype", torch.bfloat16)))

    assert re.search(reason, why_not_tma(**given))


def test_descriptors_are_no_parts_of_tuples() -> None:
    """The launchers of triton 3.6 and 3.7 look for descriptors among a kernel's arguments and not inside of them."""
    (launch,) = launches(*_convolution(16, 32, 16), padding=1, relu=True, tile=BY_DESCRIPTOR)

    maps = [value for name, value in launch.arguments.items() if name.startswith("map_")]
    assert [isinstance(each, Descriptor) for each in maps] == [True] * 3 + [False] * (MAX_DESCRIPTORS - 3)
    nested = [each for value in launch.arguments.values() if isinstance(value, tuple) for each in value]
    assert not any(isinstance(each, Descriptor) for each in nested)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile("few", 128, 64, 32), "cannot run in form few: a tile of depth 32 does not hold 36 products; take form"),
        (Tile("tma", 128, 64, 64, rows=8, columns=16), "cannot run in form tma: strides .* take form auto or pointer"),
    ],
    ids=["few", "tma"],
)
def test_a_tile_that_cannot_do_it_is_refused(tile: Tile, message: str) -> None:
    """A tile that tuning tries, or a file holds, never computes something else."""
    with pytest.raises(ValueError, match=message):
        launches(*_convolution(4), padding=1, relu=True, tile=tile)


@pytest.mark.parametrize(
    ("batch", "outputs", "size", "pooled", "wide"),
    [
        (1, 16, (1, 2**27), False, True),  # 2**31 elements
        (1, 16, (1, 2**27 - 128), False, False),
        (1, 1, (1, 2**31 - 64), False, True),  # the last tile reaches beyond 2**31
        (1, 1, (1, 2**31 - 128), False, False),
        (2**20, 1, (1, 2**10), True, True),  # windows of 2 rows where the map has one: twice the pixels
        (2**20, 1, (1, 2**10), False, False),
    ],
)
def test_numbers_beyond_31_bits_are_widened(
    batch: int,
    outputs: int,
    size: tuple[int, int],
    pooled: bool,  # noqa: FBT001 - a parameter of the test
    wide: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """Offsets and the numbers of pixels, up to the end of the last tile, and not before they need it."""
    x, out = _map(batch, 1, *size), _map(batch, outputs, *size)
    half = _map(batch, outputs, size[0] // 2, size[1] // 2) if pooled else None

    launch = conv_launch([x], _map(outputs, 1, 1, 1), out, padding=0, pooled=half, tile=Tile("pointer", 128, 16, 16))

    assert launch.constants["wide"] == wide


@pytest.mark.parametrize("tile", [Tile("pointer", 64, 16, 16), BY_DESCRIPTOR], ids=["pointer", "tma"])
@pytest.mark.parametrize("pooled", [False, True])
def test_statistics_have_a_row_for_every_tile(tile: Tile, pooled: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """The grid is that many tiles of pixels, times the tiles of channels."""
    maps, weight, _, _, out = _convolution(16, outputs=40)
    half = _map(2, 40, 8, 8) if pooled else None

    launch = conv_launch(maps, pack_weight(weight), out, padding=1, pooled=half, tile=tile)

    across = -(-40 // tile.channels)
    assert launch.grid == (statistics_tiles(out, tile, pooled=pooled) * across,)


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_padding_is_a_number_whatever_the_layer_calls_it(
    padding: str | int | tuple[int, int], dilation: int, side: int
) -> None:
    """A layer that is given these numbers computes what the one with the word does."""
    layer = nn.Conv2d(2, 3, side, padding=padding, dilation=dilation)
    x = torch.randn(1, 2, 9, 12)

    numbers = padding_of(layer)

    expected = functional.conv2d(x, layer.weight, layer.bias, padding=numbers, dilation=dilation)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1), (0, 3, 4, 5)], ids=str)
def test_dense_maps_have_the_strides_of_new_ones(shape: tuple[int, ...]) -> None:
    """Also where sizes of 1 let PyTorch take other strides for channels_last; what has them already is not copied."""
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)

    result = dense(x)

    assert torch.equal(result, x)
    assert result.stride() == torch.empty(shape, memory_format=LAST).stride()
    assert dense(result) is result


def test_form_and_depth_are_those_of_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32 is tuned apart from fp32; what is picked for one must not be launched with the other's tile."""
    maps, weight, *_, out = _convolution(32, dtype=torch.float32)
    tuned = {"fp32": Tile("tma", 128, 16, 64, rows=8, columns=16), "tf32": Tile("tma", 128, 16, 32, rows=8, columns=16)}
    monkeypatch.setattr(module, "tile_for", lambda need, *_: tuned[need.precision])

    forms = [pick_form(maps, pack_weight(weight), out, "sm90", tf32=tf32) for tf32 in (False, True)]

    assert forms == ["pointer", "tma"]
