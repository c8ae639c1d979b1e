"""The oracles of batch norm in training, forwards and backwards, and of a ReLU that may fall either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from kernel_checks import kept_in_16_bits, maps_amid_nan
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA
from skipcost.kernels.verify.exact import Exact, allowed, worst
from skipcost.unet_models.ops import crop_all

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EPS = 1e-5
SHAPE = (2, 6, 9, 11)  # 198 values in a channel

pytestmark = pytest.mark.usefixtures("one_thread")


def ratio(actual: Tensor, exact: Exact, *, roundings: int = 0) -> float:
    """The largest error as a share of what is allowed."""
    return worst(actual, exact.value, allowed(exact, actual.dtype, roundings=roundings))


def wide(x: Tensor) -> Tensor:
    """(C,) as what meets (N, C, H, W)."""
    return x[:, None, None]


@dataclass(frozen=True, slots=True)
class Given:
    """What a norm gets: the unrounded output of a convolution, what was stored of it, and its parameters."""

    unrounded: Tensor
    stored: Tensor
    gamma: Tensor
    beta: Tensor
    grad: Tensor


def make(dtype: torch.dtype, data: str = "normal", mean: float = 0.0) -> Given:
    """Draw it; parameters are in fp32, in fp64 beside fp64."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    unrounded = DATA[data](SHAPE, torch.float32, 0) + mean
    gamma, beta = (DATA["normal"]((6,), parameters, seed) for seed in (1, 2))
    return Given(unrounded, unrounded.to(dtype), gamma, beta, DATA["normal"](SHAPE, dtype, 3))


def convolve(joined: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, in the type of the maps."""
    return functional.conv2d(joined, weight, padding=1)


def convolve_in_fp32(joined: Tensor, weight: Tensor) -> Tensor:
    """Forwards and backwards, 16 bits are multiplied and added up in fp32, and what is stored is rounded once."""
    wide = torch.promote_types(joined.dtype, torch.float32)
    return convolve(joined.to(wide), weight.to(wide)).to(joined.dtype)


@pytest.mark.numeric
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("dtype", "function"),
    [
        *((dtype, convolve) for dtype in DTYPES),
        (torch.float16, convolve_in_fp32),
        (torch.bfloat16, convolve_in_fp32),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_pytorchs_training_step_is_accepted(
    dtype: torch.dtype, function: Callable[[Tensor, Tensor], Tensor], data: str
) -> None:  # fmt: skip
    """Result and all gradients of convolution, batch norm and ReLU over two cropped maps, in every type.

    With sums in fp32, as kernels keep them, each is rounded once. PyTorch's own in 16 bits may round more on a CPU: the
    gradients of the maps at each of 9 taps, that of the weight at each image.
    """
    maps = maps_amid_nan(2, ((8, 9, 11), (5, 12, 13)), dtype, data=data)
    given = make(dtype)
    weight = DATA["small" if data == "large" else data]((6, 13, 3, 3), dtype, 2)  # fp16 has no sums of large by large
    leaves = [each.detach().requires_grad_() for each in (*maps, weight, given.gamma, given.beta)]

    stored = function(torch.cat(crop_all(leaves[:2]), 1), leaves[2])
    result = functional.batch_norm(stored, None, None, leaves[3], leaves[4], training=True, eps=EPS).relu()
    grads = torch.autograd.grad(result, leaves, given.grad)

    parameters = (stored, given.gamma, given.beta)
    assert stored.isfinite().all()
    assert ratio(result, validate.batch_norm(*parameters, eps=EPS).result) <= 1
    oracles = validate.conv_bn_relu_gradients(maps, weight, *parameters, given.grad, padding=1, eps=EPS)
    parts = (9, 9, 2, 1, 1) if function is convolve else (1,) * 5
    for actual, exact, count in zip(grads, oracles, parts, strict=True):
        assert ratio(actual, exact, roundings=kept_in_16_bits(dtype, count)) <= 1


def normalize(given: Given, mistake: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and result as a kernel would compute them: in fp32, in two passes, rounded at the end."""
    x = given.stored.float()
    source = given.unrounded if mistake == "statistics before rounding" else x
    mean = source.mean((0, 2, 3))
    variance = (source - wide(mean)).square().mean((0, 2, 3))
    if mistake == "difference of squares":
        variance = source.square().mean((0, 2, 3)) - mean.square()
    if mistake == "unbiased variance":
        variance = variance * 198 / 197
    inverse = 1 / (variance.sqrt() + EPS) if mistake == "eps outside the root" else (variance + EPS).rsqrt()
    result = (x - wide(mean)) * wide(inverse * given.gamma) + wide(given.beta)
    return mean, variance, (result if mistake == "no relu" else result.relu()).to(given.stored.dtype)


@pytest.mark.parametrize(
    ("mistake", "dtype", "mean"),
    [
        ("", torch.float32, 0.0),
        ("", torch.bfloat16, 0.0),
        ("", torch.float32, 1000.0),
        ("difference of squares", torch.float32, 1000.0),
        ("statistics before rounding", torch.bfloat16, 0.0),
        ("statistics before rounding", torch.float16, 1.0),
        ("unbiased variance", torch.float32, 0.0),
        ("eps outside the root", torch.float32, 0.0),
        ("no relu", torch.bfloat16, 0.0),
    ],
)
def test_mistakes_in_the_statistics_are_rejected(mistake: str, dtype: torch.dtype, mean: float) -> None:
    """Two passes are within bounds even at a mean of 1000 deviations; each mistake shows in one of the three."""
    given = make(dtype, mean=mean)
    exact = validate.batch_norm(given.stored, given.gamma, given.beta, eps=EPS)

    found = normalize(given, mistake)

    error = max(
        ratio(actual, each) for actual, each in zip(found, (exact.mean, exact.variance, exact.result), strict=True)
    )
    assert (error <= 1) == (not mistake), error


def test_sums_of_a_million_values_have_their_bounds() -> None:
    """Statistics of tiles, combined as Chan, Golub and LeVeque do, of 2**20 values with a mean of 100 deviations."""
    stored = DATA["normal"]((1, 1, 1024, 1024), torch.float32, 0) + 100
    tiles = stored.view(-1, 128)
    means = tiles.mean(1)
    mean = means.mean()
    variance = ((tiles - means[:, None]).square().sum(1) + 128 * (means - mean).square()).sum() / 2**20

    exact = validate.batch_norm(stored, torch.ones(1), torch.ones(1), eps=EPS)

    assert ratio(mean[None], exact.mean) <= 1
    assert ratio(variance[None], exact.variance) <= 1
    assert float(allowed(exact.variance, torch.float32)) < 1e-3  # of a variance of 1
    assert ratio((stored.square().mean() - mean.square())[None], exact.variance) > 1


@pytest.mark.parametrize("mean", [10.0, 1000.0])
@pytest.mark.parametrize("values", [8, 198, 1024])
def test_a_mean_and_variance_updated_value_by_value_are_accepted(values: int, mean: float) -> None:
    """Welford's sums err by units of mean times deviation, most where values are few; E[x^2] - E[x]^2 by more."""
    stored = DATA["normal"]((1, 256, 1, values), torch.float32, 0) + mean
    average, deviations = torch.zeros(256), torch.zeros(256)
    for count, x in enumerate(stored[0, :, 0].unbind(1), start=1):
        before = x - average
        average = average + before / count
        deviations = deviations + before * (x - average)
    naive = stored.square().mean((0, 2, 3)) - stored.mean((0, 2, 3)).square()

    exact = validate.batch_norm(stored, torch.ones(256), torch.ones(256), eps=EPS)

    assert ratio(average, exact.mean) <= 1
    assert ratio(deviations / values, exact.variance) <= 1
    assert ratio(naive, exact.variance) > 1


def backwards(given: Given, mistake: str = "", flipped: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of stored, gamma and beta as a kernel would compute them in fp32; `flipped`: where ReLU errs."""
    mean, variance, _ = normalize(given)
    inverse = (variance + EPS).rsqrt()
    unit = (given.stored.float() - wide(mean)) * wide(inverse)
    through = unit * wide(given.gamma) + wide(given.beta) > 0
    if flipped is not None:
        through ^= flipped
    grad = given.grad.float() * (1 if mistake == "no mask" else through)
    of_beta, of_gamma = grad.sum((0, 2, 3)), (grad * unit).sum((0, 2, 3))
    if mistake == "gamma unmasked":
        of_gamma = (given.grad.float() * unit).sum((0, 2, 3))
    count = 197 if mistake == "unbiased" else 198
    average = 0 if mistake == "no mean" else wide(of_beta / count)
    slope = 0 if mistake == "no slope" else unit * wide(of_gamma / count)
    factor = wide(given.gamma) if mistake == "no deviation" else wide(given.gamma * inverse)
    return (factor * (grad - average - slope)).to(given.stored.dtype), of_gamma, of_beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mistake", ["", "no mask", "gamma unmasked", "unbiased", "no mean", "no slope", "no deviation"]
)
def test_mistakes_in_the_gradients_are_rejected(mistake: str, dtype: torch.dtype) -> None:
    """Each term of batch norm's gradient counts, and so does M - 1 in place of M, in 16 bits too."""
    given = make(dtype)
    oracles = validate.batch_norm_gradients(given.stored, given.gamma, given.beta, given.grad, eps=EPS)

    error = max(ratio(*pair) for pair in zip(backwards(given, mistake), oracles, strict=True))

    assert (error <= 1) == (not mistake), error


def on_the_edge() -> tuple[Given, Tensor]:
    """A case with one value in each channel that is 0 before ReLU, to within rounding; and where these are."""
    given = make(torch.float32)
    unit = validate.batch_norm(given.stored, given.gamma, given.beta, eps=EPS).unit.value
    edge = torch.zeros(SHAPE, dtype=torch.bool)
    edge[1, :, 4, 5] = True
    beta = (-unit[1, :, 4, 5] * given.gamma).float()
    return Given(given.unrounded, given.stored, given.gamma, beta, given.grad), edge


@pytest.mark.parametrize("flip", [False, True])
def test_either_side_of_relus_edge_is_accepted(*, flip: bool) -> None:
    """Whether rounding puts a value of 0 above or below, the gradients are right, those of other elements included."""
    given, edge = on_the_edge()
    oracles = validate.batch_norm_gradients(given.stored, given.gamma, given.beta, given.grad, eps=EPS)

    found = backwards(given, flipped=edge if flip else None)

    assert max(ratio(*pair) for pair in zip(found, oracles, strict=True)) <= 1


def test_a_value_that_is_not_on_the_edge_has_one_side() -> None:
    """The smallest value of a channel beside the edge, let through or held back wrongly, puts every gradient out."""
    given = make(torch.float32)
    exact = validate.batch_norm(given.stored, given.gamma, given.beta, eps=EPS)
    flipped = exact.linear.value.abs() == exact.linear.value.abs().amin((0, 2, 3), keepdim=True)
    oracles = validate.batch_norm_gradients(given.stored, given.gamma, given.beta, given.grad, eps=EPS)

    found = backwards(given, flipped=flipped)

    assert min(ratio(*pair) for pair in zip(found, oracles, strict=True)) > 1


def test_the_edge_costs_the_other_elements_little() -> None:
    """With a value on the edge in a channel, a whole gradient that is wrong elsewhere is still rejected."""
    given, _ = on_the_edge()
    oracles = validate.batch_norm_gradients(given.stored, given.gamma, given.beta, given.grad, eps=EPS)

    for mistake in ("no mask", "no mean", "no slope"):
        assert ratio(backwards(given, mistake)[0], oracles[0]) > 1


@pytest.mark.parametrize("value", [0.0, 1000.0])
def test_a_constant_channel_is_no_exception(value: float) -> None:
    """Without variance the inverse is that of eps, and the gradients are bounded all the same."""
    given = make(torch.float32)
    stored = torch.full(SHAPE, value)
    exact = validate.batch_norm(stored, given.gamma, given.beta, eps=EPS)
    oracles = validate.batch_norm_gradients(stored, given.gamma, given.beta, given.grad, eps=EPS)
    given = Given(stored, stored, given.gamma, given.beta, given.grad)

    found = normalize(given)

    assert max(ratio(*pair) for pair in zip(found, (exact.mean, exact.variance, exact.result), strict=True)) <= 1
    assert max(ratio(*pair) for pair in zip(backwards(given), oracles, strict=True)) <= 1
