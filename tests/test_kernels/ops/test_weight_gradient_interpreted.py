"""The kernels of the weight's gradient in Triton's interpreter, over one map and several, cropped and not.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_weight_gradient_interpreted.py
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import assert_same, far_apart
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.ops import weight_gradient as module
from skipcost.kernels.ops.launch import run
from skipcost.kernels.ops.weight_gradient import cut_of, weight_gradient_launches
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA, amid, blank, unwritten, written_beside

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS["fp64"] = torch.float64


@dataclass(frozen=True, slots=True)
class Case:
    """A convolution (N, C_i, H, W) -> O whose weight's gradient is wanted; programs: how many share the work."""

    channels: tuple[int, ...]
    outputs: int = 18
    size: tuple[int, int] = (9, 7)
    side: int = 3
    padding: int = 1
    layout: str = "channels_last"
    programs: int = 1024
    batch: int = 2


CASES = (
    Case((1,), layout="contiguous"),  # an image, channels first: all taps at once, 9 of 16 columns of the product
    Case((2,), padding=0, programs=2),  # 18 columns of 32
    Case((3,), outputs=1, layout="window"),
    Case((5,), side=1, padding=0, layout="sliced"),
    Case((7,), outputs=130, size=(4, 5)),  # two tiles of outputs, the second of 2; 63 columns of 64
    Case((24,), layout="window", programs=20),  # 24 of 32 channels; two splits of two tiles, the last half empty
    Case((24,), outputs=130, size=(1, 13), layout="channel_slice"),  # one row: of nine taps, six see padding alone
    Case(
        (70,), outputs=3, size=(6, 7), padding=0, programs=1
    ),  # two tiles of channels, the second of 6; one split of two
    Case((24, 5, 1), layout="window"),  # three maps, each cropped: what is round the windows is NaN
    Case((2, 3), side=1, padding=1, layout="window"),  # a padded 1x1 convolution, whose frame depends on no input
    Case((16, 70), size=(3, 4), padding=0, programs=40),
)


def make_inputs(case: Case, dtype: torch.dtype, kind: str = "normal") -> tuple[list[Tensor], Tensor]:
    """Maps and the gradient of the output, amid canaries."""
    shapes = [(case.batch, channels, *case.size) for channels in case.channels]
    sources = [amid(DATA[kind](shape, dtype, seed), case.layout) for seed, shape in enumerate(shapes)]
    shrink = case.side - 1 - 2 * case.padding
    out = (case.batch, case.outputs, case.size[0] - shrink, case.size[1] - shrink)
    return sources, amid(DATA[kind](out, dtype, 99), "channel_slice")


def worst(case: Case, sources: list[Tensor], grad: Tensor, actual: Tensor, *, tf32: bool = False) -> float:
    """Return the error of a gradient (O, k, k, C) over what a right kernel may err."""
    weight = grad.new_zeros(case.outputs, sum(case.channels), case.side, case.side)

    def convolve(*inputs: Tensor) -> Tensor:
        return functional.conv2d(torch.cat(inputs[:-1], 1), inputs[-1], padding=case.padding)

    exact = validate.gradients(convolve, [*sources, weight], grad)[-1]
    allowed = validate.allowed(exact, actual.dtype, tf32=tf32)
    return validate.worst(actual.permute(0, 3, 1, 2), exact.value, allowed)


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        (case, precision)
        for precision in PRECISIONS
        for case in (CASES if precision in ("fp32", "bf16") else CASES[1::4])
    ],
    ids=str,
)
def test_the_gradient_meets_its_bound(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of maps, channels and splits; all of the gradient is written, in the weight's type, and no more."""
    monkeypatch.setattr(module, "PROGRAMS", case.programs)
    sources, grad = make_inputs(case, PRECISIONS[precision])
    total = blank((case.outputs, case.side, case.side, sum(case.channels)), grad.dtype, "contiguous")
    tf32 = precision == "tf32"

    run(weight_gradient_launches(sources, grad, total, padding=case.padding, tf32=tf32))

    assert worst(case, sources, grad, total, tf32=tf32) <= 1
    assert not written_beside(total)
    assert not unwritten(total)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_are_kept_in_32_bits(precision: str) -> None:
    """Positive numbers, 2888 to a sum: kept in 16 bits, or of products in tf32, it would be off by more."""
    case = Case((3,), size=(38, 38))
    sources, grad = make_inputs(case, PRECISIONS[precision], "positive")
    total = torch.empty(case.outputs, 3, 3, 3)

    run(weight_gradient_launches(sources, grad, total, padding=1))

    assert worst(case, sources, grad, total) <= 1


def test_the_cut_has_splits_of_several_tiles() -> None:
    """The cases above cover one split and several, of one tile and of several, and tiles beyond the last pixel."""
    cuts = set()
    for case in CASES:
        sources, grad = make_inputs(case, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PROGRAMS", case.programs)
            cut = cut_of(sources, grad, case.side)
        beyond = cut.splits * cut.steps * cut.pixels - grad.numel() // case.outputs >= cut.pixels
        cuts.add((cut.few, cut.splits > 1, cut.steps > 1, beyond))

    assert {(few, True, True) for few in (False, True)} <= {each[:3] for each in cuts}
    assert (False, False, True) in {each[:3] for each in cuts}
    assert any(each[3] for each in cuts)


@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_runs_are_repeatable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits are added in a fixed order: two runs agree in every bit."""
    monkeypatch.setattr(module, "PROGRAMS", 40)
    sources, grad = make_inputs(case, torch.bfloat16)
    totals = [torch.empty(case.outputs, 3, 3, sum(case.channels)) for _ in range(2)]

    for total in totals:
        run(weight_gradient_launches(sources, grad, total, padding=case.padding))

    assert_same(*totals)


def test_an_empty_batch_has_a_gradient_of_zeros() -> None:
    """No pixel, no product: what was in memory is not taken for one."""
    sources = [torch.empty(0, 24, 5, 5).contiguous(memory_format=torch.channels_last)]
    total = torch.full((18, 3, 3, 24), torch.nan)

    run(weight_gradient_launches(sources, torch.empty(0, 18, 5, 5), total, padding=1))

    assert not total.any()


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("far", ["source", "grad"])
def test_offsets_beyond_31_bits(channels: int, axis: int, far: str) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    case = Case((channels,), outputs=4, size=(3, 4), batch=3)
    (source,), grad = make_inputs(case, torch.float16)
    total = torch.empty(4, 3, 3, channels)
    distant = (far_apart(source, axis), grad) if far == "source" else (source, far_apart(grad, axis))

    launches = weight_gradient_launches(distant[:1], distant[1], total, padding=1)
    run(launches)

    assert launches[0].constants["wide"]
    assert worst(case, [source], grad, total) <= 1
