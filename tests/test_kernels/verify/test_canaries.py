"""Canaries find writes beside a map and elements not written, in every layout; data is what it is called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import bits, maps_amid_nan
from torch import Tensor

from skipcost.kernels.verify.canaries import CHANNELS_ADJACENT, DATA, LAYOUTS, amid, blank, unwritten, written_beside

SHAPE = (2, 16, 3, 5)
OUTPUTS = [layout for layout in LAYOUTS if layout != "expanded"]
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool)


def whole(view: Tensor) -> Tensor:
    """All elements of a view's storage."""
    return view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)


def places(view: Tensor) -> set[int]:
    """Where in its storage the elements of a view are."""
    numbers = torch.arange(len(whole(view)))
    return set(numbers.as_strided(view.shape, view.stride(), view.storage_offset()).flatten().tolist())


@settings(max_examples=60)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    shape=st.tuples(*[st.integers(0, 4)] * 4),
    dtype=st.sampled_from(TYPES),
    aligned=st.booleans(),
)
def test_a_map_amid_canaries_has_its_values(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype, *, aligned: bool
) -> None:
    """Whatever the shape, type and layout, the view equals what was copied, and all round it canaries are untouched."""
    values = DATA["normal"](shape, torch.float32, 0).mul(50).to(dtype)

    view = amid(values, layout, aligned=aligned)

    expected = values[:, :1].expand(shape) if layout == "expanded" else values
    assert torch.equal(view, expected)
    assert written_beside(view) == ""
    assert len(places(view)) < len(whole(view))


@pytest.mark.parametrize("layout", OUTPUTS)
def test_a_write_beside_the_map_is_found_wherever_it_is(layout: str) -> None:
    """Every single element of the storage that is no element of the map is watched: before, after and between."""
    view = amid(torch.zeros(SHAPE), layout)
    mine = places(view)

    for place in range(len(whole(view))):
        if place in mine:
            continue
        everything = whole(view)
        before = everything[place].clone()
        everything[place] = 1.0
        assert written_beside(view).startswith("1 elements beside the map were written"), place
        everything[place] = before

    assert written_beside(view) == ""


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan"), 1e-45, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_number_written_beside_the_map_is_found(dtype: torch.dtype, value: float) -> None:
    """No result of arithmetic has the bits of a canary, NaN included."""
    view = blank(SHAPE, dtype, "channel_slice")
    beside = whole(view)[view.storage_offset() - 1]

    beside.fill_(value)

    place = view.storage_offset() - 1
    assert f"the first at element {place} of a storage of {len(whole(view))}, in which a map of" in written_beside(view)


@pytest.mark.parametrize("layout", OUTPUTS)
def test_an_element_that_was_not_written_is_found_wherever_it_is(layout: str) -> None:
    """A map is all canaries until it is written; of a single element left out, the place is named."""
    view = blank(SHAPE, torch.bfloat16, layout)
    assert unwritten(view).startswith(f"{view.numel()} elements of the map were never written")

    for index in torch.cartesian_prod(*(torch.arange(size) for size in SHAPE)).tolist():
        full = blank(SHAPE, torch.bfloat16, layout)
        left_out = full[tuple(index)].clone()
        full.fill_(1.0)
        full[tuple(index)] = left_out
        assert unwritten(full).startswith("1 elements of the map were never written"), index

    view.fill_(float("nan"))
    assert unwritten(view) == ""
    assert written_beside(view) == ""


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("layout", CHANNELS_ADJACENT)
def test_alignment_is_what_was_asked_for(layout: str, *, aligned: bool) -> None:
    """For descriptors, address and strides are multiples of 16 bytes, channels being 16; else the address is odd."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        view = blank(SHAPE, dtype, layout, aligned=aligned)

        assert view.stride(1) == 1
        assert all(stride * view.itemsize % 16 == 0 for axis, stride in enumerate(view.stride()) if axis != 1)
        assert (view.data_ptr() % 16 == 0) == aligned


def test_layouts_are_what_they_are_called() -> None:
    """The strides of dense maps are PyTorch's; a slice is of a wider map, a window of a larger one."""
    strides = {layout: blank(SHAPE, torch.float32, layout).stride() for layout in LAYOUTS}

    assert strides["contiguous"] == torch.empty(SHAPE).stride()
    assert strides["channels_last"] == torch.empty(SHAPE, memory_format=torch.channels_last).stride()
    assert strides["transposed"] == torch.empty(2, 16, 5, 3).transpose(2, 3).stride()
    assert strides["expanded"] == torch.empty(2, 1, 3, 5).expand(SHAPE).stride()
    assert strides["channel_slice"] == (3 * 5 * 48, 1, 5 * 48, 48)
    assert strides["window"] == (7 * 11 * 16, 1, 11 * 16, 16)


def test_what_is_no_map_lies_contiguous() -> None:
    """A vector or a block of partial sums has canaries too, but no layout of N, C, H, W."""
    vector = amid(torch.arange(3.0), "contiguous")

    assert vector.tolist() == [0, 1, 2]
    assert written_beside(vector) == ""
    assert unwritten(blank((2, 3, 4), torch.float32, "contiguous")).startswith("24 elements")
    with pytest.raises(ValueError, match=r"shape \(3,\) has no layout 'window', which is one of N, C, H, W; use 'cont"):
        amid(torch.arange(3.0), "window")


def test_an_unknown_layout_is_refused() -> None:
    """The message lists the known ones."""
    with pytest.raises(ValueError, match="layout 'nhwc' is unknown; accepted: contiguous, channels_last, transposed"):
        blank(SHAPE, torch.float32, "nhwc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_data_depends_on_the_seed_alone(data: str, dtype: torch.dtype) -> None:
    """The same seed gives the same bits, whatever was drawn before, and another seed others; nothing is beyond fp16."""
    shape = (4, 8, 3, 3)

    first, other = DATA[data](shape, dtype, 0), DATA[data](shape, dtype, 1)
    torch.randn(3)

    assert (first.shape, first.dtype) == (shape, dtype)
    assert torch.equal(bits(first), bits(DATA[data](shape, dtype, 0)))
    assert not torch.equal(first, other)
    assert first.isfinite().all()
    assert DATA[data]((0, 3, 2, 2), dtype, 0).shape == (0, 3, 2, 2)


def test_data_is_what_it_is_called() -> None:
    """Positive numbers are positive; large and small ones are a thousand times as large and small; a 1 is alone."""
    drawn = {name: make((4, 8, 30, 30), torch.float32, 0) for name, make in DATA.items()}

    assert drawn["normal"].lt(0).any()
    assert drawn["positive"].gt(0).all()
    torch.testing.assert_close(drawn["large"], drawn["normal"] * 1e3)
    torch.testing.assert_close(drawn["small"], drawn["normal"] * 1e-3)
    assert drawn["one-hot"].flatten(1).sum(1).tolist() == [1.0] * 4
    assert drawn["one-hot"].count_nonzero() == 4


def test_maps_amid_nan_take_the_layouts_in_turn() -> None:
    """Several maps, each with other numbers, in strides that repeat; NaN is next to each."""
    sizes = ((16, 3, 4),) * 4

    maps = maps_amid_nan(2, sizes, torch.float16, data="positive")

    assert [each.shape[1:] for each in maps] == [torch.Size(size) for size in sizes]
    assert maps[0].stride() == maps[3].stride() != maps[1].stride() != maps[2].stride()
    assert not torch.equal(maps[0], maps[3])
    assert all(whole(each)[each.storage_offset() - 1].isnan() for each in maps)
    assert all(each.gt(0).all() for each in maps)
