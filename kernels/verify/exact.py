"""What a kernel should give, computed in float64, and how far off it may be. Canaries are in `canaries.py`.

Needs torch only and works on CPU and CUDA tensors alike: tests use it in Triton's interpreter, `skipcost kernels
check` on a GPU. An oracle takes the inputs as the kernel gets them, already rounded to their type, so that what it
measures is the kernel's own error. Against a float64 kernel an oracle errs as much itself; the bound has room for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.unet_models.ops import crop_all

# Half the distance from 1 to the next number: the largest relative error of one rounding to nearest.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
TF32 = 2.0**-9  # of a product: tensor cores cut both operands to 10 bits of mantissa, each by less than 2**-10
ORDER = 3.0  # K positive numbers added one after the other in float32 erred by up to 1.06 * sqrt(K) units
EXTRA_TERMS = 4  # beside the products: scale, shift, and the rounding of each
TWO_MEANS = 24  # beside them where taps are added up last: 3 taps of 2 rows, 3 of 2 columns, each with a rounded weight


@dataclass(frozen=True, slots=True)
class Exact:
    """What a kernel should give, and what its error is measured by; all tensors of one shape, in float64.

    value: the result. magnitude: the sum of the absolute values of everything added up to it. terms: how many they
    are. slack: further absolute error that a right kernel may make, for a reason that the oracle states.
    """

    value: Tensor
    magnitude: Tensor
    terms: int
    slack: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


def allowed(exact: Exact, dtype: torch.dtype, *, tf32: bool = False, roundings: int = 0) -> Tensor:
    """Return the absolute error, element by element, that a right kernel whose results are `dtype` may make.

    tf32: the operands of products were cut to tf32. roundings: how often each product, or a sum that it is in, was
    rounded to `dtype` on the way: operands that the kernel rounded itself, such as a weight that it composed, and
    partial sums that it kept in 16 bits.

        1.01 * u_out * |value| + (3 * sqrt(terms) * u_acc + tau) * magnitude + smallest + slack

    The first part rounds the result, with 1 % for what is rounded being in error itself. In the second, K additions
    in any order err by at most K * u_acc * magnitude, but with errors of either sign this grows as sqrt(K), and 3
    times that is allowed; the hard limit could not tell tf32 from float32 at K = 8192. u_acc is the unit of float32,
    of float64 for float64. tau is what tf32 and `roundings` units of `dtype` make of each product: these may all have
    one sign.
    `smallest` is the spacing of subnormal numbers.
    """
    accumulation = _accumulation(dtype)
    relative = ORDER * math.sqrt(exact.terms) * accumulation + (TF32 if tf32 else 0.0) + roundings * UNIT[dtype]
    return 1.01 * UNIT[dtype] * exact.value.abs() + relative * exact.magnitude + SMALLEST[dtype] + exact.slack


def worst(actual: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """Return the largest |actual - expected| / allowed: at most 1 where `actual` is right, infinite for NaN amiss.

    NaN must be where the oracle has NaN and nowhere else; infinities too, with their sign. Where the expected value
    is beyond the numbers of actual's type, or within the allowed error of that, infinity is right as well.
    """
    if not actual.shape == expected.shape == allowed.shape:
        message = (
            f"worst got a result {tuple(actual.shape)}, expected values {tuple(expected.shape)} and allowed errors "
            f"{tuple(allowed.shape)}: the three must have one shape"
        )
        raise ValueError(message)
    if not actual.numel():
        return 0.0
    limit = torch.finfo(actual.dtype).max * (1 + UNIT[actual.dtype] / 2)
    actual = actual.detach().double()
    overflow = actual.isinf() & (actual.sign() == expected.sign()) & (expected.abs() + allowed >= limit)
    right = overflow | (actual == expected) | (actual.isnan() & expected.isnan())
    ratio = torch.where(allowed.isfinite(), (actual - expected).abs() / allowed, math.inf)
    return float(torch.where(right, 0.0, ratio.nan_to_num(nan=math.inf, posinf=math.inf)).max())


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: in these NaN equals itself, and -0.0 is not 0.0."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@torch.no_grad()
def conv(
    maps: Sequence[Tensor],  # (N, C_i, H_i, W_i), centre-cropped to the smallest and concatenated
    weight: Tensor,  # (O, sum of C_i, k, k)
    scale: Tensor | None = None,  # (O,)
    shift: Tensor | None = None,  # (O,)
    *,
    padding: int,
    relu: bool = False,
) -> Exact:
    """Convolution, scale, shift and ReLU over the channels of all maps: (N, O, H', W')."""
    x = torch.cat([each.double() for each in crop_all(maps)], 1)
    value = functional.conv2d(x, weight.double(), padding=padding)
    magnitude = functional.conv2d(x.abs(), weight.double().abs(), padding=padding)
    if scale is not None:
        value, magnitude = value * _wide(scale), magnitude * _wide(scale).abs()
    if shift is not None:
        value, magnitude = value + _wide(shift), magnitude + _wide(shift).abs()
    return Exact(value.relu() if relu else value, magnitude, weight[0].numel() + EXTRA_TERMS)


def pool(exact: Exact) -> Exact:
    """2x2 max-pool, floor, of what a kernel computed: (N, C, H, W) -> (N, C, H // 2, W // 2).

    Rounding keeps the order of numbers, and the largest of four moves by no more than the one that moves most. Of
    maps that are stored, the pooled one is exactly the pooled stored one: compare those bit by bit.
    """
    return Exact(functional.max_pool2d(exact.value, 2), functional.max_pool2d(exact.magnitude, 2), exact.terms)


@torch.no_grad()
def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Exact:
    """2x2 transposed convolution, stride 2: x (N, C, H, W), weight (C, O, 2, 2), bias (O,) -> (N, O, 2H, 2W)."""
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    value = functional.conv_transpose2d(x, weight, bias, stride=2)
    magnitude = functional.conv_transpose2d(x.abs(), weight.abs(), None if bias is None else bias.abs(), stride=2)
    return Exact(value, magnitude, len(weight) + EXTRA_TERMS)


@torch.no_grad()
def up_sampled_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    factor: int, padding: int, window: Sequence[int] | None = None, **interpolation: Any,
) -> Exact:  # fmt: skip
    """Convolution over x (N, C, h, w), up-sampled as `interpolation` says; window: as of `tap_first`."""
    options = {"mode": "bilinear", **interpolation}

    def computed(change: Callable[[Tensor], Tensor]) -> Tensor:
        up = functional.interpolate(change(x.double()), scale_factor=factor, **options)
        top, left, height, width = window or (0, 0, *up.shape[2:])
        up = functional.pad(up, (-left, left + width - up.shape[3], -top, top + height - up.shape[2]))
        return functional.conv2d(
            up, change(weight.double()), None if bias is None else change(bias.double()), padding=padding
        )

    return Exact(computed(lambda each: each), computed(torch.abs), weight[0].numel() + EXTRA_TERMS + TWO_MEANS)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, error: Tensor | None = None
) -> list[Exact]:
    """Gradients for every input of a function that adds up products, each with at most one factor from each input.

    Convolutions, transposed or not, crops, concatenation and biases are such functions. Then the gradient at absolute
    values adds up magnitudes, and the one at ones counts terms. grad: upstream, of the shape of the result; error: of
    the same shape, by how much `grad` itself may be off in a right kernel.
    """

    def backward(inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    exact = [each.detach().double() for each in inputs]
    absolute = [each.abs() for each in exact]
    values = backward(exact, grad.double())
    magnitudes = backward(absolute, grad.double().abs())
    counts = backward([torch.ones_like(each) for each in exact], torch.ones_like(grad, dtype=torch.float64))
    slacks = [torch.zeros_like(each) for each in exact] if error is None else backward(absolute, error)
    return [
        Exact(value, magnitude, int(count.max()) if count.numel() else 0, slack)
        for value, magnitude, count, slack in zip(values, magnitudes, counts, slacks, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Normalized:
    """Batch norm in training of a stored map x (N, C, H, W), step by step.

    mean, variance (biased) and inverse, which is 1 / sqrt(variance + eps), are (C,). unit, which is (x - mean) *
    inverse, linear, which is unit * gamma + beta, and result, its ReLU where there is one, are (N, C, H, W).
    """

    mean: Exact
    variance: Exact
    inverse: Exact
    unit: Exact
    linear: Exact
    result: Exact


@torch.no_grad()
def batch_norm(stored: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, relu: bool = True) -> Normalized:
    """Normalise (N, C, H, W) with its own statistics, then gamma (C,), beta (C,), and ReLU.

    stored: the convolution's output as the kernel stored it. Starting from it, neither the convolution's error nor its
    rounding blurs what is judged here, and statistics of the values before that rounding are found out.

    With M values in a channel, a mean is known to sqrt(M) units of mean |x|, and a variance, a sum of squares, to
    sqrt(M) units of itself, but for the means that are taken from the values: an error of one unit of |mean| in each
    of many moves the variance by units of |mean| * deviation, and the error of the whole mean moves it by that squared
    (Chan, Golub and LeVeque, 1983). E[x^2] - E[x]^2 errs by units of mean^2: a large mean gives it away.
    """
    x = stored.detach().double()
    terms = x[:, 0].numel() if x.shape[1] else 0
    accumulation = _accumulation(stored.dtype)
    mean, size = x.mean((0, 2, 3)), x.abs().mean((0, 2, 3))
    variance = (x - _wide(mean)).square().mean((0, 2, 3))
    slack = 4 * accumulation * (variance * (variance + mean.square())).sqrt()
    slack = slack + (ORDER * math.sqrt(terms) * accumulation * size).square()
    inverse = (variance + eps).rsqrt()
    relative = slack / (variance + eps) / 2  # what the slack of the variance makes of the inverse
    value = (x - _wide(mean)) * _wide(inverse)
    unit = Exact(value, (x.abs() + _wide(size)) * _wide(inverse), terms, value.abs() * _wide(relative))
    factor, offset = _wide(gamma), _wide(beta)
    magnitude = unit.magnitude * factor.abs() + offset.abs()
    linear = Exact(value * factor + offset, magnitude, terms, unit.slack * factor.abs())
    return Normalized(
        mean=Exact(mean, size, terms),
        variance=Exact(variance, variance, terms, slack),
        inverse=Exact(inverse, inverse, terms, inverse * relative),
        unit=unit,
        linear=linear,
        result=replace(linear, value=linear.value.relu()) if relu else linear,
    )


@torch.no_grad()
def batch_norm_gradients(
    stored: Tensor, gamma: Tensor, beta: Tensor, grad: Tensor, *, eps: float, relu: bool = True
) -> tuple[Exact, Exact, Exact]:
    """Gradients of `batch_norm` for stored (N, C, H, W), gamma (C,) and beta (C,), given that of its result.

    Where the value before ReLU is within its own allowed error of 0, a right kernel may let the gradient through or
    not. The oracle does what the exact value says, leaves no element out, and gives the other choice as slack to
    everything that such an element reaches through the sums. These are few: one value in a million is within 1e-6 of 0.
    """
    forward = batch_norm(stored, gamma, beta, eps=eps, relu=relu)
    unit, linear, count = forward.unit, forward.linear, forward.mean.terms
    through, doubt = grad.detach().double(), torch.zeros_like(linear.value)
    if relu:
        doubt = through.abs() * (linear.value.abs() <= allowed(linear, stored.dtype))
        through = torch.where(linear.value <= 0, 0.0, through)
    of_gamma, of_beta = (_channel_sums(through, doubt, each) for each in (unit, None))
    mean_unit, mean_one = (_average(each) for each in (of_gamma, of_beta))
    size, factor = unit.value.abs(), _wide(gamma) * _wide(forward.inverse.value)
    value = factor * (through - mean_one.value - unit.value * mean_unit.value)
    magnitude = through.abs() + mean_one.magnitude + unit.magnitude * mean_unit.value.abs() + size * mean_unit.magnitude
    slack = doubt + mean_one.slack + size * mean_unit.slack + unit.slack * mean_unit.value.abs()
    relative = _wide(forward.inverse.slack / forward.inverse.value)
    of_stored = Exact(value, factor.abs() * magnitude, count, factor.abs() * slack + value.abs() * relative)
    return of_stored, of_gamma, of_beta


def conv_bn_relu_gradients(
    maps: Sequence[Tensor],
    weight: Tensor,
    stored: Tensor,
    gamma: Tensor,
    beta: Tensor,
    grad: Tensor,
    *,
    padding: int,
    eps: float,
    relu: bool = True,
) -> list[Exact]:
    """Gradients of convolution, batch norm in training and ReLU: of each map, then of weight, gamma and beta.

    The gradient of `stored` may be rounded to its type before it is multiplied: that is in the slack of the others.
    """
    of_stored, of_gamma, of_beta = batch_norm_gradients(stored, gamma, beta, grad, eps=eps, relu=relu)

    def convolve(*inputs: Tensor) -> Tensor:
        return functional.conv2d(torch.cat(crop_all(inputs[:-1]), 1), inputs[-1], padding=padding)

    error = allowed(of_stored, stored.dtype)
    return [*gradients(convolve, [*maps, weight], of_stored.value, error), of_gamma, of_beta]


def _accumulation(dtype: torch.dtype) -> float:
    """The unit of the type in which results of `dtype` are added up."""
    return UNIT[torch.float64 if dtype == torch.float64 else torch.float32]


def _wide(x: Tensor) -> Tensor:
    """(C,) as what meets (N, C, H, W)."""
    return x.detach().double()[:, None, None]


def _channel_sums(through: Tensor, doubt: Tensor, unit: Exact | None) -> Exact:
    """Sum over N, H and W of a gradient that is off by up to `doubt`, times `unit`, or times 1: (C,)."""
    unit = unit or Exact(torch.ones_like(through), torch.ones_like(through), 0)
    parts = (
        through * unit.value,
        through.abs() * unit.magnitude,
        doubt * unit.value.abs() + through.abs() * unit.slack,
    )
    value, magnitude, slack = (each.sum((0, 2, 3)) for each in parts)
    return Exact(value, magnitude, through[:, :1].numel(), slack)


def _average(sums: Exact) -> Exact:
    """Turn sums (C,) into averages that meet (N, C, H, W)."""
    value, magnitude, slack = (_wide(each) / sums.terms for each in (sums.value, sums.magnitude, sums.slack))
    return Exact(value, magnitude, sums.terms, slack)
