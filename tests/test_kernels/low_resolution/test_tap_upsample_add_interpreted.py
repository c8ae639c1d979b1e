"""`tap_upsample_add` in Triton's interpreter, which runs the kernel on CPU tensors without a GPU.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/low_resolution/test_tap_upsample_add_interpreted.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, amid, far_apart
from torch import Tensor

from skipcost.kernels.low_resolution import tap_upsample_add as module
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.low_resolution.tap_first import axes, tap_first, tap_first_into
from skipcost.kernels.low_resolution.tap_upsample_add import fill, launches
from skipcost.kernels.ops.launch import Launch, run
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA, blank, unwritten, written_beside

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = (("bilinear", False), ("bilinear", True), ("nearest", False))
TARGETS = tuple(name for name in LAYOUTS if name != "expanded")  # in which no element is written twice


@dataclass(frozen=True, slots=True)
class Case:
    """What a check convolves, up-sampled, and what it writes over, or adds to."""

    size: tuple[int, int, int, int]  # N, C, h, w
    outputs: int
    factor: int
    way: tuple[str, bool] = ("bilinear", False)
    kernel: tuple[int, int] = (3, 3)
    padding: int = 1
    window: tuple[int, int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, str] = ("channels_last", "channels_last")  # of the map and of the result
    data: str = "normal"
    bias: bool = True
    add: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of the op and of its oracle."""
        mode, align_corners = self.way
        corners = {"align_corners": align_corners} if mode == "bilinear" else {}
        return {"factor": self.factor, "padding": self.padding, "window": self.window, "mode": mode, **corners}

    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns."""
        height, width = self.size[2] * self.factor, self.size[3] * self.factor
        window = self.window or (0, 0, height, width)
        return axes(self.size[2:], self.kernel, self.factor, *self.way, self.padding, window)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map, weight and bias, each amid NaN."""
        shapes = (self.size, (self.outputs, self.size[1], *self.kernel), (self.outputs,))
        x, weight, bias = (DATA[self.data](shape, self.dtype, seed) for seed, shape in enumerate(shapes))
        return amid(x, self.layouts[0]), amid(weight, "contiguous"), amid(bias, "contiguous") if self.bias else None

    def target(self) -> tuple[Tensor, Tensor]:
        """What is written over, amid canaries and one itself, or added to; and what that adds to the result."""
        rows, columns = self.axes()
        shape = (self.size[0], self.outputs, rows.output, columns.output)
        if not self.add:
            return blank(shape, self.dtype, self.layouts[1]), torch.zeros(shape, dtype=torch.float64)
        held = DATA[self.data](shape, self.dtype, 9)
        return amid(held, self.layouts[1]), held.double()

    def error(self, actual: Tensor, inputs: tuple[Tensor, ...], held: Tensor) -> float:
        """Worst error over the allowed one."""
        exact = validate.up_sampled_conv(*inputs, **self.options)
        exact = replace(exact, value=exact.value + held, magnitude=exact.magnitude + held.abs(), terms=exact.terms + 1)
        return validate.worst(actual, exact.value, validate.allowed(exact, actual.dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any factor, crop or zeros around, kernel and layout, sizes that no tile divides."""
    factor = draw(st.sampled_from((1, 2, 3, 4, 8, 16)))
    largest = 7 if factor < 4 else 3
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    kernel = draw(st.sampled_from(((3, 3), (3, 3), (1, 1), (1, 3), (5, 3))))
    padding = draw(st.integers(0, min(kernel) - 1))
    window = (0, 0, height * factor, width * factor)
    if cropped := draw(st.booleans()):
        spans = []
        for size in window[2:]:
            start = draw(st.integers(-2, size - 1))
            spans.append((start, draw(st.integers(max(1, 1 - start), size - start + 2))))
        (top, rows), (left, columns) = spans
        window = (top, left, rows, columns)
    assume(all(window[2 + axis] + 2 * padding >= kernel[axis] for axis in (0, 1)))
    return Case(
        (draw(st.integers(0, 2)), draw(st.integers(1, 5)), height, width),
        draw(st.sampled_from((1, 3, 16, 17, 70))),
        factor,
        draw(st.sampled_from(WAYS)),
        kernel,
        padding,
        window if cropped else None,
        draw(st.sampled_from(DTYPES)),
        (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(TARGETS))),
        draw(st.sampled_from(("normal", "positive"))),
        draw(st.booleans()),
        draw(st.booleans()),
    )


EDGE = Case((2, 5, 5, 9), 24, 2, dtype=torch.bfloat16, layouts=("channels_last", "channel_slice"))


EDGES = {
    "slice": EDGE,
    "added": replace(EDGE, add=True, dtype=torch.float16, data="positive"),
    "rows copied": replace(EDGE, size=(1, 3, 3, 20), factor=1, layouts=("contiguous", "contiguous")),
    "ragged tiles": replace(EDGE, size=(1, 3, 2, 20), factor=8, outputs=3, dtype=torch.float32),
    "aligned": replace(EDGE, size=(1, 2, 4, 3), factor=3, way=("bilinear", True), window=(2, 1, 7, 6), padding=2),
    "nearest": replace(EDGE, size=(1, 2, 3, 4), factor=4, way=WAYS[2], window=(3, 2, 8, 11), padding=0, bias=False),
    "zeros around": replace(EDGE, size=(1, 2, 3, 4), window=(-1, -2, 8, 11)),
    "blocks of channels": replace(EDGE, size=(1, 2, 2, 2), factor=16, outputs=70),
    "tall kernel": replace(EDGE, size=(2, 2, 4, 4), kernel=(5, 3), padding=2, dtype=torch.float32),
}


def _assert_right(case: Case) -> None:
    inputs, (out, held) = case.inputs(), case.target()

    fill(out, *inputs, case.axes(), add=case.add)

    assert written_beside(out) == ""
    assert unwritten(out) == ""
    assert case.error(out, inputs, held) <= 1


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_tiles_and_maps(name: str) -> None:
    """Ragged tiles, several of them, crops, slices: all of the result is within the bound, its neighbours untouched."""
    _assert_right(EDGES[name])


@settings(max_examples=12)
@given(cases())
def test_any_call_is_within_the_bound(case: Case) -> None:
    """Of any size, factor, crop, kernel and type, in any strides: the same."""
    _assert_right(case)


def _taps(inputs: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """(N, h, w, kh, kw, O) in fp32, amid NaN."""
    taps = torch.einsum("nchw,ocyx->nhwyxo", inputs[0].float(), inputs[1].float())
    return amid(taps.contiguous(), "contiguous")


@pytest.mark.parametrize(
    ("way", "factor"), [*((WAYS[0], factor) for factor in (1, 2, 3, 8)), (WAYS[1], 3), (WAYS[2], 2)], ids=str
)
def test_nothing_beside_the_tap_maps_is_read(way: tuple[str, bool], factor: int) -> None:
    """NaN before the first and behind the last of them reach no pixel, with rows and columns of taps on every side."""
    case = replace(EDGE, way=way, factor=factor, size=(2, 3, 4, 3), outputs=5, padding=2, dtype=torch.float32)
    inputs, (out, held) = case.inputs(), case.target()

    run(launches(_taps(inputs), inputs[2], out, case.axes()))

    assert case.error(out, inputs, held) <= 1


@pytest.mark.parametrize("factor", [2, 3])
def test_rows_that_are_not_there_are_not_read(factor: int) -> None:
    """Parts of the rows beside NaN: at odd factors the second row of a mean may have no weight, and lie outside."""
    case = replace(EDGE, size=(1, 3, 5, 4), outputs=3, dtype=torch.float32, factor=factor)
    inputs, (whole, held) = case.inputs(), case.target()
    taps = _taps(inputs)

    for band in case.axes()[0].blocks(4):
        part = amid(taps[:, band.first : band.last].contiguous(), "contiguous")
        target = whole[:, :, band.start : band.stop]
        run(launches(part, inputs[2], target, case.axes(), top=band.start, first=band.first))

    assert case.error(whole, inputs, held) <= 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that are handed over, in their order."""
    found: list[Launch] = []

    def recorded(given: list[Launch]) -> None:
        found.extend(given)
        run(given)

    monkeypatch.setattr(module, "run", recorded)
    return found


@pytest.mark.parametrize(("tap_bytes", "count"), [(2**28, 1), (6 * 4 * 27 * 4 * 2, 2), (4 * 4 * 27 * 4, 12)])
def test_tap_maps_are_made_in_parts(
    tap_bytes: int, count: int, launched: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole images, or parts of one's rows, as many as have room: the result is the same."""
    monkeypatch.setattr(module, "TAP_BYTES", tap_bytes)
    case = replace(EDGE, size=(3, 5, 6, 4), outputs=3, dtype=torch.float32)
    inputs, (out, held) = case.inputs(), case.target()

    fill(out, *inputs, case.axes())

    assert len(launched) == count
    assert all(each.arguments["taps"].nbytes <= tap_bytes for each in launched)
    assert unwritten(out) == ""
    assert case.error(out, inputs, held) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_sums_are_within_the_bound(dtype: torch.dtype) -> None:
    """600 channels of one sign, as at the bottom of UNet 3+: tap maps in 16 bits would be far off."""
    case = replace(EDGE, size=(1, 600, 3, 3), outputs=8, factor=4, dtype=dtype, data="positive")
    inputs, (out, held) = case.inputs(), case.target()

    fill(out, *inputs, case.axes())

    assert case.error(out, inputs, held) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_rounded_once(dtype: torch.dtype) -> None:
    """What is added to is the result's own negative: only what is left of it may be rounded."""
    case = replace(EDGE, size=(1, 16, 3, 3), outputs=16, dtype=dtype, add=True)
    inputs = case.inputs()
    held = -validate.up_sampled_conv(*inputs, **case.options).value.to(dtype)
    out = held.clone(memory_format=torch.channels_last)

    fill(out, *inputs, case.axes(), add=True)

    assert case.error(out, inputs, held.double()) <= 1


def test_the_op_runs_the_kernel_and_has_gradients(launched: list[Launch]) -> None:
    """Values and gradients of `tap_first` are the blocks' within rounding; the layout is the map's."""
    case = replace(EDGE, size=(2, 3, 4, 5), outputs=4, dtype=torch.float32)
    leaves = [torch.randn(each.shape).requires_grad_() for each in case.inputs() if each is not None]
    leaves[0] = leaves[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    result = tap_first(*leaves, **case.options)
    grads = torch.autograd.grad(result.square().sum(), leaves)

    assert [each.kernel for each in launched] == ["tap_upsample_add.tap_upsample_add"]
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    reference = torch.nn.functional.interpolate(exact[0], scale_factor=2, mode="bilinear")
    reference = torch.nn.functional.conv2d(reference, exact[1], exact[2], padding=1)
    torch.testing.assert_close(result.double(), reference, rtol=0, atol=1e-5)
    for actual, wanted in zip(grads, torch.autograd.grad(reference.square().sum(), exact), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_a_bias_may_have_gaps() -> None:
    """Every other number of a vector, as a column of a matrix is."""
    case = replace(EDGE, size=(1, 3, 2, 3), outputs=5, dtype=torch.float32)
    (x, weight, bias), (out, held) = case.inputs(), case.target()
    assert bias is not None
    gaps = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]

    fill(out, x, weight, gaps, case.axes())

    assert case.error(out, (x, weight, bias), held) <= 1


def test_double_precision_is_double() -> None:
    """Maps of fp64 are summed in fp64, copied rows and means alike: gradients can be checked by differences."""
    for way in (WAYS[0], WAYS[2]):
        case = replace(EDGE, size=(1, 3, 4, 5), outputs=4, dtype=torch.float64, way=way)
        inputs, (out, held) = case.inputs(), case.target()

        fill(out, *inputs, case.axes())

        assert case.error(out, inputs, held) <= 1


@pytest.mark.parametrize(("dtype", "add"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_into_leaves_the_other_channels(dtype: torch.dtype, add: bool, launched: list[Launch]) -> None:  # noqa: FBT001
    """The op that fills a buffer writes its channels in one launch, and nothing of the others."""
    case = replace(EDGE, size=(2, 6, 3, 4), outputs=5, dtype=dtype)
    inputs = case.inputs()
    buffer = torch.full((2, 9, 6, 8), 7.0, dtype=dtype).contiguous(memory_format=torch.channels_last)

    tap_first_into(*inputs, buffer, 3, add=add, **case.options)

    held = torch.full((2, 5, 6, 8), 7.0 if add else 0.0, dtype=torch.float64)
    assert [each.kernel for each in launched] == ["tap_upsample_add.tap_upsample_add"]
    assert case.error(buffer[:, 3:8], inputs, held) <= 1
    assert torch.equal(buffer[:, [0, 1, 2, 8]], torch.full_like(buffer[:, :4], 7.0))


def test_an_empty_batch_launches_nothing(launched: list[Launch]) -> None:
    """No image, no launch."""
    case = replace(EDGE, size=(0, 3, 2, 3), dtype=torch.float32)
    x, weight, bias = case.inputs()

    result = tap_first(x, weight, bias, **case.options)

    assert launched == []
    assert result.shape == (0, 24, 4, 6)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_offsets_beyond_31_bits_in_the_result(axis: int) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    case = replace(EDGE, size=(3, 2, 2, 2), outputs=3)
    inputs, held = case.inputs(), torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    out = far_apart(torch.zeros(3, 3, 4, 4, dtype=case.dtype), axis)

    fill(out, *inputs, case.axes())

    assert case.error(out, inputs, held) <= 1


def test_offsets_beyond_31_bits_in_the_tap_maps() -> None:
    """The last row of a map whose tap maps are that many; memory is asked for, not touched, but for that row."""
    case = replace(EDGE, size=(1, 1, 3700, 2), outputs=2**15, bias=False)
    rows, columns = case.axes()
    taps = torch.empty(1, 3700, 2, 3, 3, 2**15)
    taps[:, -2:] = torch.arange(2 * 2 * 9, dtype=torch.float32).view(1, 2, 2, 3, 3, 1)
    out = torch.empty(1, 2**15, 1, columns.output)

    (launch,) = launches(taps, None, out, (rows, columns), top=rows.output - 1)
    run([replace(launch, grid=(1,))])  # 64 channels are enough

    assert launch.constants["wide"]
    weights = torch.zeros(columns.output, columns.kernel, 2, dtype=torch.float64)
    for band in columns.bands:
        weights[band.start : band.stop, :, band.first : band.last] = torch.from_numpy(band.weights)
    pixels, shares = rows.reads
    along = torch.einsum("xkc,rcyk->ryx", weights, taps[0, -2:, :, :, :, 0].double())
    picks = zip(pixels[-1].ravel() - 3698, shares[-1].ravel(), [0, 0, 1, 1, 2, 2], strict=True)
    expected = sum(share * along[pixel, tap] for pixel, share, tap in picks if share)
    torch.testing.assert_close(out[0, 0, 0].double(), expected, rtol=1e-6, atol=1e-5)


def test_the_op_that_writes_is_sound() -> None:
    """What it says of itself, its fake implementation and its mutation are PyTorch's to check."""
    case = replace(EDGE, size=(1, 3, 2, 3), outputs=4, dtype=torch.float32)
    buffer = torch.zeros(1, 6, 4, 6)

    torch.library.opcheck(
        torch.ops.skipcost.tap_first_into.default,
        (*case.inputs(), buffer, 1, True, 2, "bilinear", False, 1, [0, 0, 4, 6]),
    )
