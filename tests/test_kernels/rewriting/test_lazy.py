"""A map that is not made yet: what crops, joins and convolves it, what makes it, and which form a convolution takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_checks import Called
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_checks import always
from torch import Tensor, nn
from torch.nn import functional

from skipcost.kernels.dispatch.low_resolution import choose
from skipcost.kernels.low_resolution.tap_first import axes
from skipcost.kernels.rewriting import lazy as rewrite_calls
from skipcost.kernels.rewriting.lazy import Enlarged, Joined, enlarge_by, whole_factor

pytestmark = pytest.mark.usefixtures("one_thread")


def enlarge(*args: Any, **kwargs: Any) -> Any:
    """Return a map that PyTorch's functions take, whatever its type."""
    return rewrite_calls.enlarge(*args, **kwargs)


def small(*, channels: int = 3, size: tuple[int, int] = (5, 6)) -> Tensor:
    """Return a small map in float64."""
    return torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        (None, 2, 2), (None, 3.0, 3), (None, (2, 2), 2), (None, [4.0, 4.0], 4), (None, (2.0,), 2),
        (None, 1, None), (None, 0.5, None), (None, 2.5, None), (None, (2, 3), None), (None, -2, None),
        ((10, 12), None, 2), ([15, 18], None, 3), (torch.Size((20, 24)), None, 4),
        ((10, 18), None, None), ((11, 12), None, None), (12, None, None), ((5, 6), None, None), (None, None, None),
    ],
)  # fmt: skip
def test_whole_factors(size: Any, scale: Any, expected: int | None) -> None:
    """From a scale or a size, the same for both axes and 2 or more."""
    factor = whole_factor(size, scale, (5, 6))

    assert factor == expected


@pytest.mark.parametrize("factor", [*range(2, 20), 41, 47, 55, 61, 82, 83, 94])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nearest_reads_the_pixels_that_pytorch_reads(
    factor: int, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fp32 arithmetic misses whole rows by a pixel at some factors: there the map is made."""
    always(monkeypatch)
    x = torch.arange(20, dtype=dtype).view(1, 1, 20, 1)
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)

    result = torch.conv2d(enlarge(x, scale_factor=factor, mode=mode), weight)

    assert torch.equal(result, functional.interpolate(x, scale_factor=factor, mode=mode))


@pytest.mark.parametrize(
    "given",
    [
        {"scale_factor": 1.5}, {"size": (10, 18)}, {"scale_factor": 2, "mode": "bicubic"},
        {"scale_factor": 2, "mode": "area"}, {"scale_factor": 2, "mode": "bilinear", "antialias": True},
        {"scale_factor": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_whole_factor_is_made_at_once(given: dict[str, Any]) -> None:
    """A tensor, PyTorch's own."""
    x = small()

    result = enlarge(x, **given)

    assert torch.equal(result, functional.interpolate(x, **given))


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 3, 4, 5, 6)])
def test_other_than_two_dimensions_are_made_at_once(shape: tuple[int, ...]) -> None:
    """As functional.interpolate takes them in its nearest mode."""
    x = torch.randn(shape)

    assert torch.equal(enlarge(x, scale_factor=2), functional.interpolate(x, scale_factor=2))


def test_bad_arguments_fail_as_the_original_fails() -> None:
    """With PyTorch's own words."""
    with pytest.raises(ValueError, match="align_corners option can only be set"):
        enlarge(small(), scale_factor=2, mode="nearest", align_corners=False)
    with pytest.raises(ValueError, match="either size or scale_factor should be defined"):
        enlarge(small())


SPAN = st.builds(slice, st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12))


@settings(max_examples=150)
@given(st.lists(st.lists(SPAN, max_size=2), max_size=3))
def test_crops_are_those_of_a_tensor(crops: list[list[slice]]) -> None:
    """Any slices of rows and columns one after another, shapes and sizes included."""
    x = small()
    map_: Any = enlarge_by(nn.Upsample(scale_factor=2, mode="bilinear"), x)
    expected = functional.interpolate(x, scale_factor=2, mode="bilinear")

    for spans in crops:
        index = (slice(None), slice(None), *spans)
        map_, expected = map_[index], expected[index]

    assert map_.shape == expected.shape == map_.size()
    assert [map_.size(dim) for dim in (0, -1)] == [expected.size(dim) for dim in (0, -1)]
    assert torch.equal(map_.made() if isinstance(map_, Enlarged) else map_, expected)


PADS = st.lists(st.integers(-4, 2), min_size=2, max_size=4).filter(lambda pad: len(pad) % 2 == 0)


@settings(max_examples=100)
@given(PADS, st.sampled_from(("constant", "replicate", "reflect", "circular")), st.floats(0, 1))
def test_pads_are_those_of_a_tensor(pad: list[int], mode: str, value: float) -> None:
    """Less than nothing crops; anything else is PyTorch's."""
    x = small()
    more = {"value": value} if mode == "constant" else {}
    if mode != "constant" and len(pad) != 4:
        pad = [0, 0, *pad]

    result: Any = functional.pad(enlarge(x, scale_factor=2), pad, mode=mode, **more)

    expected = functional.pad(functional.interpolate(x, scale_factor=2), pad, mode=mode, **more)
    assert torch.equal(result.made() if isinstance(result, Enlarged) else result, expected)


def test_a_pad_that_pytorch_does_not_take_fails_in_its_words() -> None:
    """Also one that would do nothing."""
    with pytest.raises(NotImplementedError, match="Padding size 2 is not supported"):
        functional.pad(enlarge(small(), scale_factor=2), (0, 0), mode="replicate")


def _normed(x: Any) -> Tensor:
    return functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu, torch.sum, functional.relu, _normed, lambda x: torch.stack([x, x]), lambda x: torch.cat([x, x], 2),
        lambda x: functional.conv_transpose2d(x, torch.ones(3, 1, 2, 2).double()),
    ],
)  # fmt: skip
def test_any_other_function_gets_the_map(function: Callable[[Any], Tensor]) -> None:
    """Made by the call that it stands for."""
    x = small()

    result = function(enlarge(x, scale_factor=2))

    assert torch.equal(result, function(functional.interpolate(x, scale_factor=2)))


def test_concatenating_makes_nothing() -> None:
    """Only where all maps fit together; if not, PyTorch says what it has to say."""
    up = enlarge(small(), scale_factor=2)

    joined: Any = torch.cat([up, small(size=(10, 12)), up], 1)

    assert isinstance(joined, Joined)
    assert joined.shape == joined.size() == (2, 9, 10, 12)
    assert torch.equal(torch.relu(joined), torch.relu(joined.made()))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([up, small()], 1)


PART = st.tuples(st.integers(1, 3), st.sampled_from(("made", "bilinear", "nearest")), st.sampled_from((2, 4)))


@settings(max_examples=60)
@given(st.lists(PART, min_size=1, max_size=4), st.booleans(), st.sampled_from((1, 3)), st.booleans(), st.data())
def test_any_concatenation_is_convolved_part_by_part(
    parts: list[tuple[int, str, int]], bias: bool, kernel: int, last: bool, data: Any  # noqa: FBT001 - hypothesis
) -> None:  # fmt: skip
    """At whatever positions up-sampled maps are, whichever of them are taken: to 1e-12, layout included."""
    pad = data.draw(st.integers(0, kernel - 1))
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    weight = torch.randn(2, sum(each[0] for each in parts), kernel, kernel, dtype=torch.float64)
    maps = []
    for channels, mode, factor in parts:
        side = (8, 12) if mode == "made" else (8 // factor, 12 // factor)
        x = small(channels=channels, size=side).contiguous(memory_format=layout)
        maps.append(x if mode == "made" else enlarge(x, scale_factor=factor, mode=mode))
    taken = iter(data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts))))
    offset = torch.randn(2, dtype=torch.float64) if bias else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipcost.kernels.rewriting.lazy._counted", lambda *_: next(taken))
        result = torch.conv2d(torch.cat(maps, 1), weight, offset, padding=pad)

    made = torch.cat([each.made() if isinstance(each, Enlarged) else each for each in maps], 1)
    expected = torch.conv2d(made, weight, offset, padding=pad)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 8), (4, 4), (64, 8), (64, 64)])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_form_is_the_one_that_counts_fewer_macs(
    channels: int, out_channels: int, factor: int, dtype: torch.dtype
) -> None:  # fmt: skip
    """As `choose` says of the call, by the precision that it computes in."""
    x, weight = torch.randn(1, channels, 16, 16, dtype=dtype), torch.randn(out_channels, channels, 3, 3, dtype=dtype)
    both = axes((16, 16), (3, 3), factor, "bilinear", False, 1, (0, 0, 16 * factor, 16 * factor))

    with Called() as called:
        torch.conv2d(enlarge(x, scale_factor=factor, mode="bilinear"), weight, padding=1)

    kind = "16 bits" if dtype == torch.bfloat16 else "fp32"
    assert bool(called.names) == choose(*both, (channels, out_channels), 1, kind=kind, device="cpu").taken


def test_autocast_decides_for_its_own_type() -> None:
    """The direct form computes in 16 bits then, three times as fast."""
    x, weight = torch.randn(1, 64, 16, 16), torch.randn(8, 64, 3, 3)
    names = {}

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Called() as called:
            result = torch.conv2d(enlarge(x, scale_factor=2, mode="bilinear"), weight, padding=1)
        names[result.dtype] = len(called.names)

    assert names == {torch.float32: 1, torch.bfloat16: 0}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(2, 4, 3, 3).double(), "expected input"),
        (torch.randn(2, 3, 3, 3), "type"),
        (torch.randn(2, 3, 30, 30).double(), "Kernel size can't be greater than actual input size"),
    ],
)
def test_what_pytorch_would_not_convolve_fails_in_its_words(weight: Tensor, message: str) -> None:
    """Channels, types and sizes that do not fit."""
    with pytest.raises(RuntimeError, match=message):
        torch.conv2d(enlarge(small(), scale_factor=2), weight)
