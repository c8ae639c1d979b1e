"""The kernels of batch norm in Triton's interpreter: statistics, normalisation, gradients, each launch on its own.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_batch_norm_interpreted.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import far_apart
from torch import Tensor

from skipcost.kernels.ops import batch_norm as module
from skipcost.kernels.ops.batch_norm import (
    Norm,
    add_launch,
    gradient_launches,
    normalize_launch,
    precise,
    statistics_launches,
)
from skipcost.kernels.ops.launch import run
from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import CHANNELS_ADJACENT, amid, blank, unwritten, written_beside

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """A map (N, C, H, W) and the memory it lies in, with the tile that cuts it: several programs, with ragged edges."""

    size: tuple[int, int, int, int]
    layout: str = "channels_last"
    tile: int = 1024


SHAPES = (
    Shape((2, 70, 5, 7)),  # two blocks of channels, the second of 6; tiles of 16 pixels, the last of 6
    Shape((1, 1, 1, 130), "channel_slice"),  # one channel, one row; two tiles of 64 pixels and one of 2
    Shape((3, 16, 6, 5), "window"),  # rows and images apart; tiles cross both
    Shape((2, 3, 1, 1)),  # two values per channel, the fewest there can be
)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shape:
    """Small tiles, two of which a program of `backward_reduce` sums, and trees of two branches."""
    chosen: Shape = request.param
    monkeypatch.setattr(module, "TILE", chosen.tile)
    monkeypatch.setattr(module, "STATISTICS_TILE", chosen.tile)
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "PROGRAMS", 4)
    return chosen


def make_map(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values of either sign, amid canaries."""
    generator = torch.Generator().manual_seed(seed)
    return amid(torch.randn(shape.size, generator=generator).mul(3).add(1).to(dtype), shape.layout)


def make_vector(y: Tensor, seed: int) -> Tensor:
    """One number per channel, amid canaries."""
    values = torch.randn(y.shape[1], generator=torch.Generator().manual_seed(seed))
    return amid(values.to(precise(y)), "contiguous")


def make_norm(y: Tensor, *, relu: bool) -> Norm:
    """Statistics of y, by PyTorch, and a scale and a shift that matter."""
    y = y if y.numel() else y.new_zeros(1, y.shape[1], 1, 1)
    variance, mean = torch.var_mean(y.to(precise(y)), (0, 2, 3), correction=0)
    mean, variance = (amid(each, "contiguous") for each in (mean, variance))
    return Norm(mean, variance, make_vector(y, 3), make_vector(y, 4), EPS, relu)


def run_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance; everything round them and all that is not written shows."""
    mean, variance = (blank(y.shape[1:2], precise(y), "contiguous") for _ in range(2))
    run(statistics_launches(y, mean, variance))
    for each in (mean, variance):
        assert not written_beside(each)
        assert not unwritten(each)
    return mean, variance


def ratio(actual: Tensor, exact: validate.Exact) -> float:
    """Return the worst error over what a right kernel may err; the oracle keeps vectors as (C, 1, 1)."""
    expected, allowed = exact.value, validate.allowed(exact, actual.dtype)
    return validate.worst(actual, expected.reshape(actual.shape), allowed.reshape(actual.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_what_is_stored(shape: Shape, dtype: torch.dtype) -> None:
    """Mean to 4 sqrt(M) units of mean |y|, variance to 2e-6 of itself, and both within the oracle's bounds."""
    y = make_map(shape, dtype)

    mean, variance = run_statistics(y)

    exact = validate.batch_norm(y, *(torch.ones(y.shape[1]),) * 2, eps=EPS)
    assert ratio(mean, exact.mean) <= 1
    assert ratio(variance, exact.variance) <= 1
    values, stored = y.numel() // y.shape[1], y.double()
    error = (mean - stored.mean((0, 2, 3))).abs() / stored.abs().mean((0, 2, 3))
    assert float(error.max()) <= 4 * 2**-24 * math.sqrt(values)
    torch.testing.assert_close(variance.double(), stored.var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


def test_a_large_mean_does_not_blur_the_variance() -> None:
    """Values of 1000 +- 1: the difference of their mean square and squared mean is off by 1 % and more; not here."""
    values = torch.randn(4, 16, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    y = values.float().contiguous(memory_format=torch.channels_last)

    mean, variance = run_statistics(y)

    stored = y.double()
    expected = stored.var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=2**-23, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert float((naive / expected - 1).abs().max()) > 1e-2


@pytest.mark.parametrize("tiles", [1, 2, 3, 9])
def test_tiles_of_any_size_are_combined(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile says how many pixels it has, none included, as a convolution's tiles at the edge of a map have."""
    monkeypatch.setattr(module, "GROUP", 2)  # 9 tiles: trees of depth 4, of which branches are missing
    generator = torch.Generator().manual_seed(tiles)
    parts = [torch.randn(count, 19, generator=generator) + count for count in (5, 0, 64, 1, 7, 7, 2, 33, 3)[:tiles]]
    rows = [[torch.full((19,), float(len(each))), each.sum(0) / max(len(each), 1)] for each in parts]
    for row, part in zip(rows, parts, strict=True):
        row.append((part - row[1]).square().sum(0))
    partials = amid(torch.stack([torch.stack(row) for row in rows]), "contiguous")
    mean, variance = (blank((19,), torch.float32, "contiguous") for _ in range(2))

    run(statistics_launches(torch.empty(1, 19, 1, 1), mean, variance, partials))

    everything = torch.cat(parts).double()
    torch.testing.assert_close(mean.double(), everything.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), everything.var(0, correction=0), rtol=2e-6, atol=0)
    assert not written_beside(mean)
    assert not written_beside(variance)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_statistics_of_what_is_no_number(special: float) -> None:
    """One such value spoils the statistics of its channel and of no other, wherever it is."""
    y = torch.randn(2, 5, 20, 20).contiguous(memory_format=torch.channels_last)
    y[0, 3, 0, 0] = y[1, 1, 19, 19] = special  # in the first tile, from which the means of the others are counted

    mean, variance = run_statistics(y)

    assert mean.isfinite().tolist() == [True, False, True, False, True]
    assert variance.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("dtype", "relu", "layout"),
    [(DTYPES[at % 4], at < 4, CHANNELS_ADJACENT[at % len(CHANNELS_ADJACENT)]) for at in range(8)],
    ids=str,
)
def test_a_map_is_normalised_into_any_place(
    shape: Shape, dtype: torch.dtype, relu: bool, layout: str  # noqa: FBT001 - parameters of the check
) -> None:  # fmt: skip
    """The result may be a slice of a wider map's channels, or a window: all of it is written, and nothing else."""
    y = make_map(shape, dtype)
    norm = make_norm(y, relu=relu)
    out = blank(shape.size, dtype, layout)

    run([normalize_launch(y, norm, out)])

    assert ratio(out, validate.batch_norm(y, norm.gamma, norm.beta, eps=EPS, relu=relu).result) <= 1
    assert not written_beside(out)
    assert bool((out == 0).any()) == relu


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_meet_their_bounds(shape: Shape, dtype: torch.dtype, relu: bool) -> None:  # noqa: FBT001
    """Those of y, gamma and beta, against float64; all are written, and nothing beside them."""
    y, grad = make_map(shape, dtype), make_map(Shape(shape.size, "channel_slice"), dtype, seed=1)
    norm = make_norm(y, relu=relu)
    sums = blank((2, y.shape[1]), precise(y), "contiguous")
    y_grad = blank(shape.size, dtype, "window")

    run(gradient_launches(y, grad, norm, sums, y_grad))

    exact = validate.batch_norm_gradients(y, norm.gamma, norm.beta, grad, eps=EPS, relu=relu)
    for actual, each in zip((y_grad, sums[1], sums[0]), exact, strict=True):
        assert ratio(actual, each) <= 1
    assert not written_beside(sums)
    assert not written_beside(y_grad)
    assert not unwritten(y_grad)


def test_relu_lets_nan_through_and_its_gradient_too() -> None:
    """As PyTorch's relu and threshold_backward do; a gradient that is NaN where ReLU clipped is 0."""
    y = torch.tensor([2.0, -3.0, 1.0, -2.0]).view(1, 1, 2, 2)
    norm = Norm(torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1), EPS, relu=True)
    spoilt = replace(norm, mean=torch.tensor([math.nan]))
    out, sums, y_grad = torch.empty(1, 1, 2, 2), torch.empty(2, 1), torch.empty(1, 1, 2, 2)
    grad = torch.tensor([1.0, math.nan, 1.0, math.nan]).view(1, 1, 2, 2)

    run([normalize_launch(y, spoilt, out), *gradient_launches(y, grad, norm, sums, y_grad)])

    assert bool(out.isnan().all())
    assert float(sums[0]) == 2
    assert bool(y_grad.isfinite().all())
    run(gradient_launches(y, torch.ones_like(y), spoilt, sums, y_grad))
    assert float(sums[0]) == 4


@pytest.mark.parametrize(("rows", "size"), [(0, 3), (1, 5000), (2, 3), (300, 40), (1000, 17)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_added_up(rows: int, size: int, dtype: torch.dtype) -> None:
    """More rows and elements than one step takes, fewer, and none, of which the sum is 0; rounded at the end."""
    partials = torch.randn(rows, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    total = blank((size,), dtype, "contiguous")

    run([add_launch(amid(partials, "contiguous"), total)])

    terms = max(rows, 1)
    exact = validate.Exact(partials.double().sum(0), partials.double().abs().sum(0), terms)
    assert ratio(total, exact) <= 1
    assert not written_beside(total)
    assert not unwritten(total)


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("far", ["read", "written"])
def test_offsets_beyond_31_bits(axis: int, far: str) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    near, grad = (torch.randn(3, 3, 4, 5).half().contiguous(memory_format=torch.channels_last) for _ in range(2))
    norm, mean = make_norm(near, relu=True), torch.empty(3)
    expected, expected_grad, sums = torch.empty_like(near), torch.empty_like(near), torch.empty(2, 3)
    run([normalize_launch(near, norm, expected), *gradient_launches(near, grad, norm, sums, expected_grad)])
    y = far_apart(near, axis) if far == "read" else near
    out = far_apart(torch.zeros_like(near), axis) if far == "written" else torch.zeros_like(near)

    normalize = normalize_launch(y, norm, out)
    run([normalize])
    written = out.clone()
    gradients = gradient_launches(y, grad, norm, sums, out)
    run(gradients)
    statistics = statistics_launches(y, mean, torch.empty(3))
    run(statistics)

    assert torch.equal(written, expected)
    assert torch.equal(out, expected_grad)
    torch.testing.assert_close(mean, norm.mean)
    assert normalize.constants["wide"]
    assert gradients[-1].constants["wide"]
    assert statistics[0].constants["wide"] == (far == "read")


def test_pixels_beyond_31_bits_are_counted() -> None:
    """Means of the gradient are over all 2**31 pixels of a map, of which one program is seen to write its tile."""
    y = torch.ones(1, dtype=torch.float16).expand(2, 1, 2**15, 2**15)
    norm = Norm(torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1), eps=0.0, relu=False)
    sums = torch.full((2, 1), 2.0**31)
    y_grad = torch.empty(1, dtype=torch.float16).expand(y.shape)

    *_, launch = gradient_launches(y, y, norm, sums, y_grad)
    run([replace(launch, grid=(1, 1))])

    assert launch.constants["wide"]
    assert y_grad[0, 0, 0, 0] == -1  # 1 - 1 - 1 * 1


def test_an_empty_map_has_statistics_and_sums_of_zero() -> None:
    """No pixel: nothing to launch over it, and no division by how many there are."""
    y = torch.empty(0, 5, 4, 4, dtype=torch.half).contiguous(memory_format=torch.channels_last)
    sums = torch.full((2, 5), math.nan)

    mean, variance = run_statistics(y)
    run(gradient_launches(y, y, make_norm(y, relu=True), sums, y))

    assert not torch.cat([mean, variance, *sums]).any()
