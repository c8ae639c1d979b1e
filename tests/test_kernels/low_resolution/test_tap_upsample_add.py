"""What `tap_upsample_add` launches, and how tap maps are cut to what there is room for; nothing is launched here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipcost.kernels.low_resolution import tap_upsample_add as module
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.parts import DEPTH
from skipcost.kernels.low_resolution.tap_first import axes
from skipcost.kernels.low_resolution.tap_upsample_add import launches, parts
from skipcost.kernels.ops.launch import Launch

WAYS = (("bilinear", False), ("bilinear", True), ("nearest", False))
LAST = torch.channels_last


@st.composite
def axis_strategy(draw: Any) -> Axis:
    """Any axis, cut anywhere."""
    extent, factor, kernel = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.sampled_from((1, 3, 5)))
    padding = draw(st.integers(0, kernel - 1))
    start = draw(st.integers(0, extent * factor - 1))
    length = draw(st.integers(1, extent * factor - start))
    if length + 2 * padding < kernel:
        start, length, padding = 0, extent * factor, kernel - 1
    mode, align_corners = draw(st.sampled_from(WAYS))
    return Axis(extent, factor, mode, align_corners, start, length, kernel, padding)


def _matrix(axis: Axis) -> np.ndarray:
    """(outputs, taps, pixels)."""
    made = np.zeros((axis.output, axis.kernel, axis.extent))
    for band in axis.bands:
        made[band.start : band.stop, :, band.first : band.last] += band.weights
    return made


@given(axis_strategy())
def test_rows_of_the_table_are_the_axis(axis: Axis) -> None:
    """Pixels and weights of each tap, put into a matrix, are the axis's."""
    pixels, weights = (each.numpy() for each in module._row_tables(axis, torch.float64, torch.device("cpu")))
    made = np.zeros((axis.output, axis.kernel, axis.extent))
    corners = pixels.shape[1] // axis.kernel

    for column in range(pixels.shape[1]):
        np.add.at(made, (np.arange(axis.output), column // corners, pixels[:, column]), weights[:, column])

    assert corners == 2 or not axis.reads[1][..., 1].any()
    np.testing.assert_array_equal(made, _matrix(axis))


@given(axis_strategy(), st.sampled_from((16, 32, 128)))
def test_columns_of_the_table_are_the_axis(axis: Axis, tile: int) -> None:
    """Tiles of weights from their first pixel on are the axis's, and zero beyond what there is."""
    first, weights = (each.numpy() for each in module._column_tables(axis, tile, torch.float64, torch.device("cpu")))
    band = -(-weights.shape[2] // axis.kernel)
    made = np.zeros((len(first) * tile, band + axis.extent, axis.kernel))
    padded = np.zeros((len(first), tile, band * axis.kernel))
    padded[:, :, : weights.shape[2]] = weights

    for at, begin in enumerate(first):
        made[at * tile : (at + 1) * tile, begin : begin + band] = padded[at].reshape(tile, band, axis.kernel)

    assert weights.shape[2] % DEPTH == 0
    assert not made[axis.output :].any()
    assert not made[:, axis.extent :].any()
    np.testing.assert_array_equal(made[: axis.output, : axis.extent].swapaxes(1, 2), _matrix(axis))


@given(axis_strategy(), st.integers(0, 5), st.integers(1, 4000))
def test_parts_cover_the_result_once_and_fit(rows: Axis, batch: int, room: int) -> None:
    """Every row of every image is in one part; a part has room, or is one row of the result."""
    x = torch.empty(batch, 2, rows.extent, 3, device="meta")
    out = torch.empty(batch, 5, rows.output, 6, device="meta")
    per_row = 3 * rows.kernel * 5 * 4
    pixels, weights = rows.reads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TAP_BYTES", room * per_row // 2)
        cut = list(parts(x, out, rows.kernel, rows))

    written = np.zeros((batch, rows.output), dtype=int)
    for start, stop, (above, below, first, last) in cut:
        written[start:stop, above:below] += 1
        read = pixels[above:below][weights[above:below] != 0]
        assert first <= read.min()
        assert read.max() < last
        assert (stop - start) * (last - first) * per_row <= room * per_row // 2 or below - above == 1
    assert (written == 1).all()


def _launch(factor: int = 2, size: int = 256, batch: int = 1, outputs: int = 64, **options: Any) -> Launch:
    """The launch that writes the last channels of a map of 320, without memory."""
    layout = options.pop("layout", LAST)
    taps = torch.empty(batch, size, size, 3, 3, outputs, device="meta")
    wide = torch.empty(batch, 320, factor * size, factor * size, device="meta", dtype=torch.bfloat16)
    window = (0, 0, factor * size, factor * size)
    out = wide.contiguous(memory_format=layout)[:, 320 - outputs :]
    (launch,) = launches(taps, None, out, axes((size, size), (3, 3), factor, "bilinear", False, 1, window), **options)
    return launch


@pytest.mark.parametrize(("batch", "wide"), [(25, False), (26, True)])
def test_addresses_take_64_bits_where_32_do_not_reach(batch: int, wide: bool) -> None:  # noqa: FBT001 - what is expected
    """A map of 320 channels at 512x512 passes 2**31 elements at batch 26."""
    assert _launch(batch=batch).constants["wide"] == wide


@pytest.mark.parametrize(("factor", "pixels"), [(1, 16), (2, 16), (3, 32), (4, 32), (8, 64), (16, 64), (32, 64)])
def test_a_tile_holds_the_outputs_of_eight_columns(factor: int, pixels: int) -> None:
    """Up to 64 of them; they read 30 products, or more where 16 outputs, the fewest, are those of more columns."""
    launch = _launch(factor, 64)

    assert launch.constants["tile_pixels"] == pixels
    assert launch.arguments["band"] == {1: 64, 3: 48, 32: 16}.get(factor, 32)
    assert launch.grid == (64 * factor * 64 * factor // pixels * 2,)  # of 32 channels each


def test_several_blocks_of_channels_share_the_grid() -> None:
    """100 channels are four blocks of 32, however many pixels a tile has and whatever addresses take."""
    assert _launch(2, 64, outputs=100).grid == (128 * 8 * 4,)
    assert _launch(4, 64, outputs=100).grid == (256 * 8 * 4,)
    assert _launch(2, 256, batch=26, outputs=100).grid == (26 * 512 * 32 * 4,)


def test_a_row_too_long_for_32_bits_is_refused() -> None:
    """With the shape, before anything is launched."""
    taps = torch.empty(1, 1, 2**20, 3, 3, 256, device="meta")
    made = axes((1, 2**20), (3, 3), 1, "nearest", False, 1, (0, 0, 1, 2**20))

    with pytest.raises(ValueError, match=r"tap maps of shape \(1, 1, 1048576, 3, 3, 256\): a row of them has 2\*\*31"):
        launches(taps, None, torch.empty(1, 256, 1, 2**20, device="meta"), made)


def test_tap_maps_are_multiplied_in_fp32_from_16_bits() -> None:
    """Rounded to bf16 in between, a sum of 512 would stay where it is when 1 is added."""
    pixels = torch.ones(1, 513, dtype=torch.bfloat16)

    taps = module._product(pixels, pixels.t().contiguous())

    assert taps.dtype == torch.float32
    assert taps.item() == 513


def _same(_x: Tensor) -> bool:
    return True


def test_without_triton_the_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without Triton is no error: nothing but PyTorch is needed."""
    monkeypatch.setattr(module, "on_triton", _same)

    monkeypatch.setattr(module, "_has_triton", lambda: False)
    without = module.takes(torch.ones(1))
    monkeypatch.setattr(module, "_has_triton", lambda: True)

    assert not without
    assert module.takes(torch.ones(1))
