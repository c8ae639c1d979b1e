"""What a call on a GPU allocates inside, counted, is what PyTorch's own steps of it make, followed tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipcost.bench.measure.live_bytes import LiveBytes
from skipcost.kernels.low_resolution import tap_upsample_add as module
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.parts import TAP_BYTES, inside, tables
from skipcost.kernels.low_resolution.tap_first import axes

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Allocations(LiveBytes):
    """Live bytes, with the size of everything that is made, in order."""

    def __init__(self, present: list[Tensor]) -> None:
        self.made: list[int] = []
        super().__init__(present)
        self.made.clear()

    def _follow(self, tensor: Tensor) -> None:
        before = self.live
        super()._follow(tensor)
        if self.live > before:
            self.made.append(self.live - before)


def _cuda_product(pixels: Tensor, packed: Tensor) -> Tensor:
    """What CUDA's product allocates: its result, in fp32 whatever the operands are."""
    return torch.empty(len(pixels), packed.shape[1])


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in for the product and the kernel, and forget tables, which a call makes once."""
    monkeypatch.setattr(module, "_product", _cuda_product)
    monkeypatch.setattr(module, "run", list)
    _forget()
    yield
    _forget()


def _forget() -> None:
    module._row_tables.cache_clear()
    module._column_tables.cache_clear()


def _tables(size: tuple[int, int, int, int], outputs: int, both: tuple[Axis, Axis]) -> dict[str, Tensor]:
    """The tables that a call reads, by their names in the launch."""
    rows, columns = both
    taps = torch.empty(size[0], size[2], size[3], rows.kernel, columns.kernel, outputs)
    (launch,) = module.launches(taps, None, torch.empty(size[0], outputs, rows.output, columns.output), both)
    return {name: each for name, each in launch.arguments.items() if name.startswith(("row_", "column_"))}


@st.composite
def calls(draw: Any) -> tuple[tuple[int, int, int, int], int, tuple[Axis, Axis]]:
    """Sizes (N, C, h, w), output channels and axes of a call."""
    size = draw(st.tuples(*(st.integers(1, most) for most in (5, 4, 9, 9))))
    factor, kernel = draw(st.sampled_from((1, 2, 4, 16))), draw(st.sampled_from((1, 3)))
    mode = draw(st.sampled_from(("bilinear", "nearest")))
    window = (0, 0, *(draw(st.integers(max(1, factor * side - 3), factor * side)) for side in size[2:]))
    return size, draw(st.integers(1, 5)), axes(size[2:], (kernel, kernel), factor, mode, False, kernel // 2, window)


@settings(max_examples=60, deadline=None)
@given(calls(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(1, 60))
def test_what_a_call_makes_inside_is_counted(
    call: tuple[tuple[int, int, int, int], int, tuple[Axis, Axis]],
    dtype: torch.dtype,
    layout: torch.memory_format,
    room: int,
) -> None:
    """Packed weights, copies of pixels and tap maps: the most that is alive, and every size, however it is cut."""
    size, outputs, (rows, columns) = call
    x = torch.randn(size, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(outputs, size[1], rows.kernel, columns.kernel, dtype=dtype).contiguous(memory_format=layout)
    out = torch.empty(size[0], outputs, rows.output, columns.output, dtype=dtype)
    room *= 2 * columns.extent * rows.kernel * columns.kernel * outputs  # halves of a row's tap maps
    kept = _tables(size, outputs, (rows, columns)).values()

    with pytest.MonkeyPatch.context() as patch, Allocations([x, weight, out, *kept]) as tracker:
        patch.setattr(module, "TAP_BYTES", room)
        before = tracker.live
        module.fill(out, x, weight, None, (rows, columns))

    channels = size[1], outputs
    last = layout == torch.channels_last
    counted = inside(rows, columns, channels, size[0], dtype.itemsize, last=last, room=room)
    assert tracker.peak - before == counted.fullest
    assert tracker.made == [each for each in (counted.packed, *sum(counted.parts, ())) if each]
    assert tracker.live == before


@settings(max_examples=40, deadline=None)
@given(calls())
def test_tables_are_counted(call: tuple[tuple[int, int, int, int], int, tuple[Axis, Axis]]) -> None:
    """Pixels and weights of rows and of columns, as they are kept."""
    kept = _tables(*call)

    pairs = ("row_pixels", "row_weights"), ("column_pixels", "column_weights")
    assert tables(*call[2]) == tuple(tuple(kept[name].nbytes for name in pair) for pair in pairs)


def test_many_images_are_cut_at_256_mib() -> None:
    """By hand: 16 images of 64 channels from 320 at 128x128 have tap maps of 36 MiB each, of which 7 are 252 MiB."""
    rows, columns = axes((128, 128), (3, 3), 2, "bilinear", False, 1, (0, 0, 256, 256))

    counted = inside(rows, columns, (320, 64), 16, 2, last=False)

    image = 128 * 128 * 9 * 64 * 4
    assert TAP_BYTES // image == 7
    assert [taps // image for _, taps in counted.parts] == [7, 7, 2]
    assert [copied for copied, _ in counted.parts] == [n * 320 * 128 * 128 * 2 for n in (7, 7, 2)]
    assert counted.packed == 2 * 9 * 320 * 64
    assert counted.fullest == counted.packed + 7 * image + 7 * 320 * 128 * 128 * 2
