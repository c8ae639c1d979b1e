"""The convolution kernels in Triton's interpreter: how far their results are from float64, in every form and precision.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_conv_bn_relu_interpreted.py

Maps that lie in memory in odd ways, numbers that are none, and the ops round the kernels are in the file of `_edges`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conv_cases import PRECISIONS, TILES, Case, checked, statistics_errors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skipcost.kernels.ops.tiles import Tile, up_to
from skipcost.kernels.verify.canaries import CHANNELS_ADJACENT, DATA

EVERY = [(form, precision) for form, precisions in PRECISIONS.items() for precision in precisions]
WINDOWS = {(8, 12): "bf16", (7, 11): "tf32", (2, 3): "fp16", (3, 2): "bf16"}  # over edges: not pooled
ODD = ((0, 0), (1, 3), (4, 1), (2, 0), (0, 5), (3, 2))  # by how much maps exceed the smallest: odd and even remainders


@pytest.mark.parametrize(
    ("form", "precision", "data"),
    [(*each, data) for row, each in enumerate(EVERY) for at, data in enumerate(DATA) if (row + at) % len(DATA) < 2],
)
def test_every_form_is_within_the_bound(form: str, precision: str, data: str) -> None:
    """Two tiles of pixels and of channels, both ragged, and two blocks of the reduction where the form has blocks."""
    checked(Case(form, precision, data=data, tile=replace(TILES[form], depth=16) if form == "pointer" else None))


@pytest.mark.parametrize(
    "change",
    [
        {"padding": 0},
        {"padding": 2},  # the gradient of the input of a convolution without padding
        {"side": 1, "padding": 0},
        {"side": 1},
        {"relu": False},
        {"scaled": False},
        {"shifted": False},
        {"scaled": False, "shifted": False, "relu": False},
        {"batch": 3, "size": (1, 40)},
        {"batch": 3, "size": (40, 1)},
        {"batch": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", TILES)
def test_every_option_is_within_the_bound(form: str, change: dict[str, Any]) -> None:
    """Kernel sizes, paddings, and what is left out after the convolution; maps of one row or column, and no map."""
    checked(replace(Case(form), **change))


@pytest.mark.parametrize(("count", "precision"), [(2, "tf32"), (3, "bf16"), (6, "tf32")])
@pytest.mark.parametrize("form", ["pointer", "tma"])
def test_several_maps_are_read_as_one(form: str, count: int, precision: str) -> None:
    """Each map is cropped on its own, by odd and even remainders, at a padding that must be zero all the same."""
    channels = (17, 3, 33, 1, 16, 2) if form == "pointer" else (32, 16, 64, 16, 16, 32)
    tile = replace(TILES[form], channels=64, depth=64 if form == "pointer" else 16)

    checked(Case(form, precision, channels[:count], larger=ODD, tile=tile))


@pytest.mark.parametrize("size", WINDOWS, ids=str)
@pytest.mark.parametrize("form", TILES)
def test_the_pooled_map_is_that_of_what_is_stored(form: str, size: tuple[int, int]) -> None:
    """Every pooled value is, to the number, the largest of the four that the kernel stored; negative ones too."""
    checked(Case(form, WINDOWS[size], size=size, pooled=True, relu=size != (7, 11)))


@pytest.mark.parametrize(("form", "precision"), EVERY)
def test_statistics_are_those_of_what_is_stored(form: str, precision: str) -> None:
    """Tiles' counts are exact, and they combine to mean and variance of the rounded map, not of the sums before."""
    errors = statistics_errors(Case(form, precision, scaled=False, shifted=False, relu=False))

    assert max(errors) <= 1


@pytest.mark.parametrize("form", TILES)
def test_statistics_hold_beside_a_pooled_map(form: str) -> None:
    """Pooling orders the pixels of a tile otherwise, odd sizes leave holes in it, and all pixels still count once."""
    assert max(statistics_errors(Case(form, size=(7, 11)), both=True)) <= 1


@pytest.mark.parametrize("form", TILES)
def test_statistics_survive_a_large_mean(form: str) -> None:
    """About 1000, a sum of squares would lose the variance; and pixels beyond the map are as far from the mean."""
    assert max(statistics_errors(Case(form, side=1, padding=0, mean=1000.0, relu=False))) <= 1


@pytest.mark.parametrize("form", TILES)
def test_all_tiles_of_all_groups_are_computed(form: str) -> None:
    """11 tiles of pixels are a whole group of 8 and a part of one, each with 3 tiles of channels."""
    tile = replace(TILES[form], pixels=16, channels=16, **({"rows": 2, "columns": 8} if form == "tma" else {}))

    checked(Case(form, side=1, padding=0, tile=tile))


@st.composite
def cases(draw: st.DrawFn, form: str) -> Case:
    """A small convolution, cut into about as many tiles along each axis as it is drawn to have."""
    few, by_descriptor = form == "few", form == "tma"
    side, padding = draw(st.sampled_from((3, 1))), draw(st.integers(0, 1))
    least = max(side - 2 * padding, 1)  # leaves one pixel
    size = (draw(st.integers(least, 12)), draw(st.integers(least, 12)))
    count = 1 if few else draw(st.integers(1, 6 if side == 1 else 2))
    one = st.sampled_from((16, 32, 48) if by_descriptor else (1, 2, 3, 5, 7) if few else (1, 2, 3, 5, 16, 17, 24))
    channels = tuple(draw(st.lists(one, min_size=count, max_size=count)))
    outputs = draw(st.sampled_from((8, 16, 24, 40) if by_descriptor else (1, 2, 15, 16, 33)))
    batch = draw(st.integers(0, 3))
    relu, scaled, shifted = (draw(st.booleans()) for _ in range(3))
    return Case(
        form,
        draw(st.sampled_from(PRECISIONS[form])),
        channels,
        outputs,
        batch,
        size,
        tuple(draw(st.lists(st.sampled_from(ODD), min_size=count, max_size=count))),
        side,
        padding,
        relu,
        scaled,
        shifted,
        data=draw(st.sampled_from(tuple(DATA))),
        layouts=tuple(draw(st.lists(st.sampled_from(CHANNELS_ADJACENT), min_size=count, max_size=count))),
        out_layout=draw(st.sampled_from(CHANNELS_ADJACENT)),
        tile=draw(tiles(form, batch * size[0] * size[1], outputs)),
    )


@st.composite
def tiles(draw: st.DrawFn, form: str, pixels: int, outputs: int) -> Tile:
    """A tile that cuts so many pixels and output channels into 1 to 3 parts each."""
    channels = up_to(-(-outputs // draw(st.integers(1, 3))), 64)
    if form == "tma":
        rows, columns = draw(st.sampled_from(((2, 8), (4, 4), (8, 8), (4, 16), (16, 16))))
        return Tile("tma", rows * columns, channels, 16, rows=rows, columns=columns)
    depth = 64 if form == "few" else draw(st.sampled_from((16, 32)))
    return Tile(form, up_to(-(-pixels // draw(st.integers(1, 3))), 512), channels, depth)


@settings(max_examples=12)
@given(cases("pointer"))
@example(Case("pointer", "tf32", (16, 17), 33, 1, (3, 3), padding=0))  # one pixel is left
def test_any_shape_by_address(case: Case) -> None:
    """Any channels, sizes, crops, options, precisions and tiles."""
    checked(case)


@settings(max_examples=12)
@given(cases("few"))
def test_any_shape_of_few_channels(case: Case) -> None:
    """Any channels up to 7, sizes, options, precisions and tiles."""
    checked(case)


@settings(max_examples=12)
@given(cases("tma"))
def test_any_shape_by_descriptor(case: Case) -> None:
    """Any channels that 16 divides, sizes, crops, options, precisions and tiles."""
    checked(case)
