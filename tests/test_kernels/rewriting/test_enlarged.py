"""A convolution over maps of which some are up-sampled: the direct form's result, in the form its size asks for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    for name in ("FEWEST_MACS", "FEWEST_SAVED", "FEWEST_PIXELS"):
        monkeypatch.setattr(enlarged, name, 0)
    by = (3, "bilinear", True) if mode == "corners" else (3, mode, None)
    small, few = torch.randn(2, 64, 7, 6, dtype=torch.float64), torch.randn(2, 1, 7, 6, dtype=torch.float64)
    parts = [(each, *by, pads) for each in (small, few)]
    maps = [enlarged.enlarged(*each).make() for each in parts]
    plain = torch.randn(2, 3, *maps[0].shape[2:], dtype=torch.float64)
    weight, bias = torch.randn(32, 68, 3, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)

    result = convolve([parts[0], plain, parts[1]], weight, bias, padding)

    wanted = functional.conv2d(torch.cat([maps[0], plain, maps[1]], 1), weight, bias, padding=padding)
    assert (result - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def of_up_conv(channels: tuple[int, int] = (6, 8), size: tuple[int, int] = (16, 17)) -> tuple[Tensor, ...]:
    """Return a small map, and the parameters of a transposed convolution."""
    x = torch.randn(2, channels[0], *size, dtype=torch.float64)
    up = nn.ConvTranspose2d(*channels, 2, stride=2).double()
    assert up.bias is not None
    return x, up.weight, up.bias


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("pads", [(), (NOTHING,), (ZEROS,), (ZEROS, ZEROS)])
def test_a_transposed_convolution_is_composed(
    pads: tuple[Any, ...], padding: int, composing: list[tuple[int, ...]]
) -> None:
    """Two of them, in any place of the concatenation, beside a bilinear map; values and borders as one by one."""
    parts = [(*of_up_conv(), pads) for _ in range(2)]
    bilinear = (torch.randn(2, 3, 16, 17, dtype=torch.float64), 2, "bilinear", None, pads)
    maps = [enlarged.enlarged(*each).make() for each in (*parts, bilinear)]
    plain = torch.randn(2, 3, *maps[0].shape[2:], dtype=torch.float64)
    weight, bias = torch.randn(5, 22, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    with torch.no_grad():
        given = [parts[0], plain, parts[1], bilinear], weight, bias, padding
        results = [enlarged.convolve(*given, keeps=True) for _ in range(2)]

        wanted = functional.conv2d(torch.cat([maps[0], plain, *maps[1:]], 1), weight, bias, padding=padding)
    assert len(composing) == 4
    for result in results:
        assert (result - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_nothing_beside_two_of_them(composing: list[tuple[int, ...]]) -> None:
    """All of the result is theirs."""
    first, second = of_up_conv(), of_up_conv()
    weight, bias = torch.randn(5, 16, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    with torch.no_grad():
        result = enlarged.convolve([(*first, ()), (*second, ())], weight, bias, 1, keeps=True)

        maps = [enlarged.enlarged(*each, ()).make() for each in (first, second)]
        wanted = functional.conv2d(torch.cat(maps, 1), weight, bias, padding=1)
    assert len(composing) == 2
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["gradients", "crop", "kernel", "padding", "no parameter", "alone", "16 bits"])
def test_what_is_not_composed_is_convolved_one_by_one(what: str, composing: list[tuple[int, ...]]) -> None:
    """The very same result."""
    x, up, bias = of_up_conv()
    dtype = torch.bfloat16 if what == "16 bits" else torch.float64
    x, up, bias = (each.detach().to(dtype) for each in (x, up, bias))
    up = up if what == "no parameter" else nn.Parameter(up)
    kernel, padding = (5 if what == "kernel" else 3), (2 if what == "padding" else 1)
    part = (x, up, bias, (CROP,) if what == "crop" else ())
    its = enlarged.enlarged(*part).make()
    beside = [] if what == "alone" else [torch.randn_like(its)]
    weight = torch.randn(5, 8 + 8 * len(beside), kernel, kernel, dtype=dtype)

    with torch.set_grad_enabled(what == "gradients"):
        result = enlarged.convolve([*beside, part], weight, None, padding, keeps=True)

        assert torch.equal(result, functional.conv2d(torch.cat([*beside, its], 1), weight, None, padding=padding))
    assert not composing


@pytest.mark.parametrize(("channels", "side", "form"), [((64, 32), 64, "direct"), ((128, 64), 64, "composed")])
def test_on_a_cpu_few_macs_saved_are_left(channels: tuple[int, int], side: int, form: str) -> None:
    """Both count fewer, and keep less than the map that they do not make."""
    up = nn.Parameter(torch.empty(*channels, 2, 2))
    part = enlarged.enlarged(torch.empty(1, channels[0], side, side, device="meta"), up, None, ())

    found = choice_of(part, (0, 0, 2 * side, 2 * side), torch.empty(channels[1], channels[1], 3, 3), 1, alone=False)

    assert found.form == form
    assert ("M MACs saved" in found.why) is (form == "direct")


@pytest.mark.parametrize(
    ("channels", "side", "form"),
    [((128, 64), 32, "tap-first"), ((64, 32), 8, "direct"), ((512, 256), 4, "direct")],
)
def test_on_a_cpu_small_maps_are_convolved_directly(channels: tuple[int, int], side: int, form: str) -> None:
    """Few MACs, and few pixels beside many weights; the reason says what it would take."""
    part = enlarged.enlarged(torch.empty(1, channels[0], side, side, device="meta"), 2, "bilinear", None, ())
    weight = torch.empty(channels[1], channels[0], 3, 3)

    found = choice_of(part, (0, 0, 2 * side, 2 * side), weight, 1, alone=True)

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
