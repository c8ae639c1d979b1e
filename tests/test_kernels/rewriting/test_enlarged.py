"""A convolution over maps of which some are up-sampled: the direct form's result, in the form its size asks for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from skipcost.kernels.rewriting import enlarged
from skipcost.kernels.rewriting.enlarged import choice_of, convolve

CROP, NOTHING, ZEROS = (-1, 0, -2, -1), (0, 0, 0, 0), (1, 0, 0, 2)


@pytest.mark.parametrize(("pads", "padding"), [*itertools.product([(), (CROP,), (CROP, NOTHING), (ZEROS,)], [0, 1])])
@pytest.mark.parametrize("mode", ["bilinear", "corners", "nearest", "nearest-exact"])
def test_the_result_is_that_of_the_calls_one_by_one(
    mode: str, pads: tuple[tuple[int, ...], ...], padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, two maps up-sampled and one not, in every place of the concatenation."""
    monkeypatch.setattr(enlarged, "FEWEST_MACS", 0)
    monkeypatch.setattr(enlarged, "FEWEST_PIXELS", 0)
    by = (3, "bilinear", True) if mode == "corners" else (3, mode, None)
    small, few = torch.randn(2, 64, 7, 6, dtype=torch.float64), torch.randn(2, 1, 7, 6, dtype=torch.float64)
    parts = [(each, *by, pads) for each in (small, few)]
    maps = [enlarged.enlarged(*each).make() for each in parts]
    plain = torch.randn(2, 3, *maps[0].shape[2:], dtype=torch.float64)
    weight, bias = torch.randn(32, 68, 3, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)

    result = convolve([parts[0], plain, parts[1]], weight, bias, padding)

    wanted = functional.conv2d(torch.cat([maps[0], plain, maps[1]], 1), weight, bias, padding=padding)
    assert (result - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(
    ("channels", "side", "form"),
    [((128, 64), 32, "tap-first"), ((64, 32), 8, "direct"), ((512, 256), 4, "direct")],
)
def test_on_a_cpu_small_maps_are_convolved_directly(channels: tuple[int, int], side: int, form: str) -> None:
    """Few MACs, and few pixels beside many weights; the reason says what it would take."""
    part = enlarged.enlarged(torch.empty(1, channels[0], side, side, device="meta"), 2, "bilinear", None, ())
    weight = torch.empty(channels[1], channels[0], 3, 3)

    found = choice_of(part, (0, 0, 2 * side, 2 * side), weight, 1)

    assert found.form == form
    assert ("before fewer are faster" in found.why) is (form == "direct")


@pytest.mark.parametrize(
    ("pads", "window"),
    [
        ((), (0, 0, 8, 10)),
        (((1, 2, 3, 4),), (-3, -1, 15, 13)),
        (((-1, -2, 0, -4),), (0, 1, 4, 7)),
        (((1, 0, 0, 0), (-3, 0, 0, 0)), (0, 2, 8, 8)),  # zeros, then cropped away and more
        (((-1, 0, 0, 0), (1, 0, 0, 0)), None),  # a zero where a pixel was
        (((0, 0, 0, -1), (0, 0, 0, 1)), None),
        (((0, 0, 9, 0), (0, 0, 0, -8)), None),  # zeros alone are left
    ],
)
def test_pads_come_to_a_window_of_the_whole_map(pads: Any, window: tuple[int, ...] | None) -> None:
    """Or to none, where that cannot say it; either way the convolution is PyTorch's."""
    x, weight = torch.randn(1, 64, 4, 5, dtype=torch.float64), torch.randn(32, 64, 3, 3, dtype=torch.float64)
    part = enlarged.enlarged(x, 2, "bilinear", None, pads)

    result = convolve([(x, 2, "bilinear", None, pads)], weight, None, 1)

    assert part.window() == window
    torch.testing.assert_close(result, functional.conv2d(part.make(), weight, padding=1), rtol=1e-12, atol=1e-12)


def test_what_pytorch_refuses_it_refuses_itself() -> None:
    """In its own words: a weight for other channels, a kernel that is larger than the map."""
    x = torch.randn(1, 64, 16, 16)

    with pytest.raises(RuntimeError, match="channels"):
        convolve([(x, 2, "bilinear", None, ())], torch.randn(8, 60, 3, 3), None, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        convolve([(x, 2, "bilinear", None, ((-15, -15, 0, 0),))], torch.randn(8, 64, 3, 3), None, 0)
