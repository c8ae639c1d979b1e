"""One axis of tap-first up-sampling: its bands are the matrix of interpolating, cutting, padding and shifting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.nn import functional

from skipcost.kernels.low_resolution import costs as tap_costs
from skipcost.kernels.low_resolution.axis import BLOCK, Axis

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = (("bilinear", False), ("bilinear", True), ("nearest", False))
PLAIN = {"mode": "bilinear", "align_corners": False, "start": 0, "kernel": 3, "padding": 1}


@st.composite
def axis_strategy(draw: Any) -> Axis:
    """Any axis, cut or extended anywhere, of one block or several."""
    extent, factor = draw(st.integers(1, 3 * BLOCK)), draw(st.integers(1, 9))
    mode, align_corners = draw(st.sampled_from(WAYS))
    start = draw(st.integers(-BLOCK, extent * factor - 1))
    length = draw(st.integers(max(1, 1 - start), extent * factor - start + BLOCK))
    kernel = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel - 1))
    assume(length + 2 * padding - kernel + 1 >= 1)
    return Axis(extent, factor, mode, align_corners, start, length, kernel, padding)


def _expected(axis: Axis) -> np.ndarray:
    """(outputs, taps, pixels), by PyTorch: the identity interpolated, cut, padded and shifted."""
    unit = torch.eye(axis.extent, dtype=torch.float64)[None]
    corners = {"align_corners": axis.align_corners} if axis.mode == "bilinear" else {}
    mode = "linear" if axis.mode == "bilinear" else "nearest"
    up = functional.interpolate(unit, scale_factor=axis.factor, mode=mode, **corners)[0].T
    behind = axis.start + axis.length - axis.up
    seen = functional.pad(up, (0, 0, -axis.start, behind))
    padded = functional.pad(seen, (0, 0, axis.padding, axis.padding))
    return torch.stack([padded[tap : tap + axis.output] for tap in range(axis.kernel)], 1).numpy()


@given(axis_strategy())
def test_bands_are_the_matrix(axis: Axis) -> None:
    """Put together, the blocks are what PyTorch interpolates, and no output is in two of them."""
    made = np.zeros((axis.output, axis.kernel, axis.extent))

    for band in axis.bands:
        made[band.start : band.stop, :, band.first : band.last] += band.weights

    assert [band.start for band in axis.bands[1:]] == [band.stop for band in axis.bands[:-1]]
    np.testing.assert_allclose(made, _expected(axis), rtol=0, atol=1e-14)


@given(axis_strategy())
def test_adjoint_bands_are_the_transpose(axis: Axis) -> None:
    """Along the small map, the blocks are the same matrix; every pixel is in one, also one that nothing reads."""
    made = np.zeros((axis.extent, axis.kernel, axis.output))

    for band in axis.adjoint_bands:
        made[band.start : band.stop, :, band.first : band.last] += band.weights

    assert sum(band.stop - band.start for band in axis.adjoint_bands) == axis.extent
    np.testing.assert_allclose(made.transpose(2, 1, 0), _expected(axis), rtol=0, atol=1e-14)


@given(axis_strategy())
@example(Axis(2, 1, "bilinear", False, 0, 17, 1, 0))  # the second block lies behind the map
def test_what_two_blocks_share_ends_one_and_begins_the_other(axis: Axis) -> None:
    """So tap maps of shared pixels can be handed on, and each pixel's are made once."""
    spans = [range(band.first, band.last) for band in axis.bands]

    shared = list(axis.shared)

    assert shared[0] == 0
    for before, now, count in zip(spans, spans[1:], shared[1:], strict=False):
        assert before[len(before) - count :] == now[:count] if count else not set(before) & set(now)
    assert sum(map(len, spans)) - sum(shared) == len(set().union(*spans))


def test_blocks_read_few_pixels_beside_their_own() -> None:
    """A block of a long axis reads its own pixels and one on either side: the products are banded, not dense."""
    axis = Axis(8 * BLOCK, 2, length=16 * BLOCK, **PLAIN)

    widths = {band.last - band.first for band in axis.bands}

    assert widths == {BLOCK + 1, BLOCK + 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "bicubic"}, "mode='bicubic' is unknown; accepted: bilinear, nearest"),
        ({"mode": "nearest", "align_corners": True}, "align_corners=True means nothing for mode='nearest'"),
        ({"factor": 0}, "4 pixels by a factor of 0: both must be 1 or more"),
        ({"start": 8}, "8 pixels from 8 on are none of an up-sampled map of 8"),
        ({"padding": 3}, "padding=3 beside 3 taps: accepted are 0 to 2"),
        ({"padding": 0, "length": 2}, "3 taps leave no pixel of 2 with padding=0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    """Every bad value gets its sentence."""
    values = {"extent": 4, "factor": 2, "length": 8, **PLAIN} | changes

    with pytest.raises(ValueError, match=message):
        Axis(**values)


def test_costs_fall_with_the_square_of_the_factor() -> None:
    """Without blocks, the products over channels are the direct convolution's over factor squared."""
    axis = Axis(BLOCK, 4, length=4 * BLOCK, **PLAIN)

    taps = tap_costs.forward(axis, axis, (10, 6), batch=3).taps

    assert taps * 16 == tap_costs.direct(axis, axis, (10, 6), batch=3)
