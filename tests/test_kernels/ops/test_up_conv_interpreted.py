"""`up_conv` in Triton's interpreter, which runs the kernel on CPU tensors without a GPU.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_up_conv_interpreted.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_same, far_apart
from torch.nn import functional
from up_conv_cases import DTYPES, TILES, Case, cases, error, no_tf32  # noqa: F401 - a fixture, named below

from skipcost.kernels.ops import up_conv as module
from skipcost.kernels.ops.launch import Launch, run
from skipcost.kernels.ops.tiles import Tile
from skipcost.kernels.ops.up_conv import launches, pack_weight, up_conv, up_conv_concat, up_conv_into
from skipcost.kernels.verify.canaries import CHANNELS_ADJACENT, blank, unwritten, written_beside
from skipcost.unet_models import ops as reference

pytestmark = pytest.mark.usefixtures("no_tf32")


NAN = float("nan")


@settings(max_examples=25)
@given(cases())
@example(Case(2, (33, 3, 7), 24, "bf16", data="positive", beyond=((3, 1, 0), (1, 2, 2)), tile=TILES[1]))
@example(Case(2, (64, 4, 4), 33, "fp16", data="positive"))  # positive sums of 64 terms: fp16 accumulation would show
@example(Case(1, (5, 1, 9), 3, "fp32", beyond=((16, 1, 1),)))  # the other map loses a row and a column
@example(Case(2, (5, 5, 6), 3, "fp32", beyond=((1, 6, 9),)))  # and more on both sides
@example(Case(1, (1, 1, 1), 1, "fp64", beyond=((1, 0, 0),)))  # one pixel, one channel: strides say nothing
def test_the_concatenation_is_within_the_bound(case: Case) -> None:
    """Any sizes, strides and types: the maps keep their bits, the up-sampled one is as exact as its type allows."""
    inputs, maps = case.inputs(), case.maps()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tile_for", lambda *_: case.tile)
        patch.setattr(torch.backends.cudnn, "allow_tf32", case.precision == "tf32")
        result = up_conv_concat(maps, *inputs)

    windows = reference.merge([*maps, functional.conv_transpose2d(*inputs, stride=2)], "concat")
    assert result.shape == windows.shape
    assert result.stride() == torch.empty_like(windows, memory_format=torch.channels_last).stride()
    assert_same(result[:, : -case.outputs], windows[:, : -case.outputs])
    assert error(result[:, -case.outputs :], case, inputs) <= 1


def test_a_bias_may_lie_anywhere() -> None:
    """A column of a matrix is a bias like any other."""
    x, weight, bias = Case(1, (5, 3, 4), 6, "fp32").inputs()
    assert bias is not None
    column = torch.stack([bias, -bias], 1)[:, 0]

    assert column.stride() == (2,)
    assert_same(up_conv(x, weight, column), up_conv(x, weight, bias))


@settings(max_examples=15)
@given(cases(), st.integers(0, 7), st.integers(0, 7), st.sampled_from(CHANNELS_ADJACENT))
@example(Case(2, (16, 3, 5), 24, "bf16", tile=TILES[1]), 0, 0, "channel_slice")  # two images, all of their pixels
def test_nothing_else_is_written(case: Case, rows: int, columns: int, layout: str) -> None:
    """Any centre of the up-sampled map, in a slice or a window of a larger one: all of it is written, nothing else."""
    height, width = max(2 * case.size[1] - rows, 1), max(2 * case.size[2] - columns, 1)
    inputs, out = case.inputs(), blank((case.batch, case.outputs, height, width), case.dtype, layout)

    run(launches(*inputs, out, tf32=case.precision == "tf32", tile=case.tile))

    assert unwritten(out) == ""
    assert written_beside(out) == ""
    assert error(out, case, inputs) <= 1


@pytest.mark.parametrize("precision", DTYPES)
def test_into_leaves_the_other_channels(precision: str, launched: list[Launch]) -> None:
    """The op that fills a buffer writes its channels of the centre, in one launch."""
    case = Case(2, (24, 3, 4), 5, precision)
    inputs = case.inputs()
    buffer = torch.full((2, 9, 5, 7), 7.0, dtype=case.dtype).contiguous(memory_format=torch.channels_last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
        up_conv_into(*inputs, buffer, 3)

    assert [each.kernel for each in launched] == ["up_conv.up_conv"]
    assert error(buffer[:, 3:8], case, inputs) <= 1
    assert torch.equal(buffer[:, [0, 1, 2, 8]], torch.full_like(buffer[:, :4], 7.0))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that the ops hand over, in their order."""
    found: list[Launch] = []

    def recorded(given: list[Launch]) -> None:
        found.extend(given)
        run(given)

    monkeypatch.setattr(module, "run", recorded)
    return found


def test_the_kernels_are_launched(launched: list[Launch]) -> None:
    """Two launches make the concatenated map, so the checks of this file are about the kernels."""
    case = Case(1, (3, 2, 3), 2, "fp32", beyond=((3, 1, 1), (1, 0, 0)))

    up_conv_concat(case.maps(), *case.inputs())

    assert [each.kernel for each in launched] == ["crop_concat.place", "up_conv.up_conv"]


def test_an_empty_batch_launches_nothing(launched: list[Launch]) -> None:
    """No image, no launch, forwards and backwards; gradients are there, and zero."""
    x, weight, bias = Case(0, (3, 2, 3), 2, "fp32").inputs()
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias) if each is not None]

    up_conv_concat([x.new_empty(0, 2, 5, 7)], *leaves).sum().backward()

    assert launched == []
    for each in leaves:
        assert each.grad is not None
        assert torch.equal(each.grad, torch.zeros_like(each))


@pytest.mark.parametrize("precision", DTYPES)
def test_deep_sums_are_within_the_bound(precision: str) -> None:
    """600 channels of one sign, as at the bottom of a U-Net: sums kept in 16 bits, or in tf32, would be far off."""
    case = Case(1, (600, 3, 3), 8, precision, data="positive", tile=Tile("pointer", 16, 32, 64))
    inputs, out = case.inputs(), torch.empty(1, 8, 6, 6, dtype=case.dtype, memory_format=torch.channels_last)

    run(launches(*inputs, out, tf32=precision == "tf32", tile=case.tile))

    assert error(out, case, inputs) <= 1


def test_fp32_is_cut_to_tf32_only_where_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op follows PyTorch's switch for convolutions: allowed, fp32's bound is missed; forbidden, it is met."""
    case = Case(1, (33, 3, 4), 5, "fp32", data="positive")
    inputs, errors = case.inputs(), {}

    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors[allowed] = error(up_conv(*inputs), case, inputs)

    assert errors[False] <= 1 < errors[True]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 3, 4), (3, 1, 1), (1, 1, 1), (2, 1, 5), (2, 5, 1), (16, 1, 1)], ids=str)
def test_ambiguous_layouts_are_read_right(size: tuple[int, int, int], layout: str) -> None:
    """With one channel or one pixel, strides fit two memory formats: what is read does not depend on which."""
    case = Case(2, size, 3, "fp32", layouts=(layout, layout))
    x, weight, bias = inputs = case.inputs()
    misleading = x.as_strided(
        x.shape, [stride if n > 1 else 999 for n, stride in zip(x.shape, x.stride(), strict=True)]
    )

    assert error(up_conv(*inputs), case, inputs) <= 1
    assert torch.equal(up_conv(misleading, weight, bias), up_conv(*inputs))


def test_a_packed_weight_gives_the_same_bits() -> None:
    """A weight that lies in memory as the kernel reads it is read there, and the result is the same."""
    x, weight, bias = Case(2, (5, 3, 4), 3, "fp32").inputs()

    assert torch.equal(up_conv(x, pack_weight(weight).permute(3, 2, 0, 1), bias), up_conv(x, weight, bias))


@pytest.mark.parametrize(
    ("precision", "where", "special"),
    [
        (precision, where, (NAN, float("inf"), -float("inf"))[(row + at) % 3])
        for row, precision in enumerate(("fp32", "bf16", "fp16"))
        for at, where in enumerate(("x", "weight", "bias"))
    ],
)
def test_special_values_propagate(precision: str, where: str, special: float) -> None:
    """One NaN or infinity reaches the pixels it must, and no others: masked lanes of a tile leak none.

    The reference computes in float64: in bf16 on a CPU, PyTorch spreads a NaN at one position of a weight to all four.
    """
    case = Case(2, (5, 3, 4), 3, precision)
    x, weight, bias = case.inputs()
    assert bias is not None
    {"x": x, "weight": weight, "bias": bias}[where].select(0, 1).fill_(0)
    {"x": x[1, 2, 1], "weight": weight[3, 1, 1], "bias": bias}[where][1] = special

    result = up_conv(x, weight, bias)

    expected = functional.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf() * result.sign(), expected.isinf() * expected.sign())
    assert not result.isfinite().all()


def test_sums_beyond_fp16_become_infinite() -> None:
    """Sums are rounded once, at the end: beyond 65504 that gives infinity, and below it nothing overflows before."""
    x = torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.float16).view(1, 3, 1, 1)
    weight = torch.ones(3, 1, 2, 2, dtype=torch.float16)
    weight[2, 0, 1] = 0

    result = up_conv(x, weight)

    assert result.view(2, 2).tolist() == [[60000.0, 60000.0], [float("inf"), float("inf")]]


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("far", ["read", "written"])
def test_offsets_beyond_31_bits(axis: int, far: str) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    x, weight, bias = Case(3, (3, 3, 3), 3, "fp16").inputs()
    near = up_conv(x, weight, bias)
    out = far_apart(torch.zeros_like(near), axis) if far == "written" else torch.zeros_like(near)
    (launch,) = launches(far_apart(x, axis) if far == "read" else x, weight, bias, out)

    run([launch])

    assert launch.constants["wide"]
    assert torch.equal(out, near)
