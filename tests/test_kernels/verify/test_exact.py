"""The float64 oracles and the bound: they accept sums in any order, and reject what merely looks right.

Kernels are modelled here in PyTorch, with one thing wrong at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_checks import map_sizes, maps_amid_nan
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA
from skipcost.kernels.verify.exact import Exact, allowed, worst
from skipcost.unet_models.ops import crop_all

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ORDERS = ("forwards", "backwards", "random", "in blocks")
CHANNELS = 1024  # K = 9216: beyond it, an error of K units could not tell tf32 from fp32

pytestmark = pytest.mark.usefixtures("one_thread")


def ratio(actual: Tensor, exact: Exact, **options: bool | int) -> float:
    """The largest error as a share of what is allowed."""
    return worst(actual, exact.value, allowed(exact, actual.dtype, **options))


def cut_to_tf32(x: Tensor) -> Tensor:
    """Keep 10 bits of mantissa, as tensor cores do."""
    return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)


def add_up(maps: Tensor, weight: Tensor, order: str, keep: torch.dtype) -> Tensor:
    """Convolve (N, C, H, W) without padding, adding one product after the other to a sum of type `keep`."""
    height, width = (size - 2 for size in maps.shape[2:])
    columns = functional.unfold(maps.to(keep), 3)  # (N, K, pixels)
    taps = weight.to(keep).flatten(1)  # (O, K)
    count = taps.shape[1]
    turn = {
        "forwards": torch.arange(count),
        "backwards": torch.arange(count).flip(0),
        "random": torch.randperm(count, generator=torch.Generator().manual_seed(1)),
        "in blocks": torch.arange(count),
    }[order]
    block = 64 if order == "in blocks" else 1
    total = torch.zeros(len(maps), len(weight), height * width, dtype=keep)
    for start in range(0, count, block):
        chosen = turn[start : start + block]
        total = total + taps[:, chosen] @ columns[:, chosen]
    return total.unflatten(2, (height, width))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of products are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_any_order_are_accepted(dtype: torch.dtype, data: str, order: str) -> None:
    """K = 270 products of every kind of data, added up in fp32 one by one or in blocks, then rounded once."""
    x, weight = DATA[data]((2, 30, 5, 6), dtype, 0), DATA[data]((3, 30, 3, 3), dtype, 1)
    exact = validate.conv([x], weight, padding=0)

    result = add_up(x, weight, order, accumulation(dtype)).to(dtype)

    assert ratio(result, exact) <= 1


@pytest.mark.numeric
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorchs_own_results_are_accepted(dtype: torch.dtype, data: str) -> None:
    """Convolution over two cropped maps with scale, shift and ReLU, kept in fp32 or fp64 from op to op."""
    maps = maps_amid_nan(2, ((8, 9, 11), (5, 12, 13)), dtype, data=data)
    weight = DATA[data]((7, 13, 3, 3), dtype, 2)
    scale, shift = (DATA["normal"]((7,), accumulation(dtype), seed) for seed in (3, 4))
    exact = validate.conv(maps, weight, scale, shift, padding=1, relu=True)

    plain = functional.conv2d(torch.cat(crop_all(maps), 1).to(scale.dtype), weight.to(scale.dtype), padding=1)
    result = (plain * scale[:, None, None] + shift[:, None, None]).relu().to(dtype)

    assert ratio(result, exact) <= 1
    assert ratio(functional.max_pool2d(result, 2), validate.pool(exact)) <= 1


def _drop_a_tap(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:, -1, 2, 2] = 0  # one product of 9216
    return add_up(x, weight, "in blocks", torch.float32)


def _shift_a_pixel(x: Tensor, weight: Tensor) -> Tensor:
    return add_up(x.roll(1, 3), weight, "in blocks", torch.float32)


MISTAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x, weight: add_up(x, weight, "in blocks", torch.float32),
    "tf32": lambda x, weight: add_up(cut_to_tf32(x), cut_to_tf32(weight), "in blocks", torch.float32),
    "bf16 operands": lambda x, w: add_up(x.bfloat16().float(), w.bfloat16().float(), "in blocks", torch.float32),
    "fp16 sums": lambda x, weight: add_up(x, weight, "in blocks", torch.float16).float(),
    "bf16 sums": lambda x, weight: add_up(x, weight, "in blocks", torch.bfloat16).float(),
    "a dropped tap": _drop_a_tap,
    "a shifted pixel": _shift_a_pixel,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_fp32_are_rejected(mistake: str) -> None:
    """On positive data with K = 9216, where errors of one sign add up, each mistake is out of bounds."""
    x = DATA["positive"]((1, CHANNELS, 4, 5), torch.float32, 0)
    weight = (
        DATA["positive"]((4, CHANNELS, 3, 3), torch.float32, 1) / 100
    )  # sums of 60 at most: fp16 has numbers for them

    error = ratio(MISTAKES[mistake](x, weight), validate.conv([x], weight, padding=0))

    assert (error <= 1) == (mistake == "none"), error


@pytest.mark.parametrize(
    ("dtype", "mistake", "data"),
    [
        (torch.float16, "none", "positive"),
        (torch.float16, "fp16 sums", "positive"),
        (torch.float16, "a dropped tap", "normal"),  # of positive products, one in 9216 is less than the rounding
        (torch.float16, "bf16 operands", "normal"),
        (torch.bfloat16, "none", "positive"),
        (torch.bfloat16, "bf16 sums", "positive"),
        (torch.bfloat16, "a dropped tap", "normal"),
    ],
    ids=str,
)
def test_mistakes_in_16_bits_are_rejected(dtype: torch.dtype, mistake: str, data: str) -> None:
    """The rounding of a 16-bit result does not hide sums kept in 16 bits, nor one product missing of 9216."""
    x = DATA[data]((1, CHANNELS, 4, 5), dtype, 0)
    weight = DATA[data]((4, CHANNELS, 3, 3), dtype, 1) / 128

    error = ratio(MISTAKES[mistake](x.float(), weight.float()).to(dtype), validate.conv([x], weight, padding=0))

    assert (error <= 1) == (mistake == "none"), error


def test_tf32_is_accepted_only_as_tf32() -> None:
    """The same result is right where tf32 was asked for, and 41 times out of bounds where it was not."""
    x = DATA["positive"]((1, CHANNELS, 4, 5), torch.float32, 0)
    weight = DATA["positive"]((4, CHANNELS, 3, 3), torch.float32, 1)
    exact = validate.conv([x], weight, padding=0)

    result = MISTAKES["tf32"](x, weight)

    assert ratio(result, exact, tf32=True) <= 1
    assert ratio(result, exact) > 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operands_that_a_kernel_rounds_itself_are_accepted_as_such(dtype: torch.dtype) -> None:
    """An interpolated map, rounded before it is multiplied, is one rounding more of each product; scaled 3 to 1."""
    x = DATA["positive"]((2, 30, 5, 6), dtype, 0).double() / 3
    weight = DATA["positive"]((3, 30, 3, 3), dtype, 1)
    exact = validate.conv([x], weight, padding=0)

    result = add_up((x * (1 + validate.UNIT[dtype])).float(), weight.float(), "random", torch.float32).to(dtype)

    assert ratio(result, exact) > 1
    assert ratio(result, exact, roundings=1) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_kept_in_16_bits_are_accepted_only_as_such(dtype: torch.dtype) -> None:
    """As ATen adds a weight's gradient up where a CPU has no products of 16 bits: rounded at each of 16 images."""
    x, grad = (DATA["normal"]((16, channels, 5, 5), dtype, channels) for channels in (3, 4))
    weight = torch.zeros(4, 3, 3, 3, dtype=dtype)
    exact = validate.gradients(lambda *each: functional.conv2d(each[0], each[1], padding=1), (x, weight), grad)[1]

    total, before = weight, weight
    for image, upstream in zip(x.double().split(1), grad.double().split(1), strict=True):
        before, total = total, (total + conv2d_weight(image, weight.shape, upstream, padding=1)).to(dtype)

    assert ratio(total, exact) > 1
    assert ratio(total, exact, roundings=15) <= 1
    assert ratio(before, exact, roundings=15) > 1  # without the last image


def by_definition(maps: Sequence[Tensor], weight: Tensor, padding: int) -> Tensor:
    """Cut the centres out of the maps, and sum over channels and taps in float64."""
    height, width = (min(each.shape[axis] for each in maps) for axis in (2, 3))
    windows = []
    for each in maps:
        top, left = (each.shape[2] - height) // 2, (each.shape[3] - width) // 2
        windows.append(each[:, :, top : top + height, left : left + width].double())
    x = functional.pad(torch.cat(windows, 1), [padding] * 4)
    rows, columns = x.shape[2] - 2, x.shape[3] - 2
    taps = [
        torch.einsum("nchw,oc->nohw", x[:, :, r : r + rows, s : s + columns], weight[:, :, r, s].double())
        for r, s in itertools.product(range(3), repeat=2)
    ]
    return torch.stack(taps).sum(0)


@settings(max_examples=30)
@given(sizes=map_sizes(channels=(1, 2, 3)), padding=st.sampled_from((0, 1)), relu=st.booleans())
def test_the_oracle_of_the_convolution_is_its_definition(
    sizes: tuple[tuple[int, int, int], ...], padding: int, *, relu: bool
) -> None:
    """For maps of any sizes, value and magnitude are the sums over the channels and taps of the centred windows."""
    assume(padding or min(min(size[1:]) for size in sizes) > 2)
    maps = maps_amid_nan(2, sizes, torch.float32)
    weight = DATA["normal"]((4, sum(size[0] for size in sizes), 3, 3), torch.float32, 9)
    scale, shift = DATA["normal"]((2, 4), torch.float32, 8)

    exact = validate.conv(maps, weight, scale, shift, padding=padding, relu=relu)

    value = by_definition(maps, weight, padding) * scale[:, None, None] + shift[:, None, None]
    absolute = by_definition([each.abs() for each in maps], weight.abs(), padding)
    torch.testing.assert_close(exact.value, value.clamp(min=0) if relu else value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.magnitude, absolute * scale.abs()[:, None, None] + shift.abs()[:, None, None])
    assert exact.terms == weight[0].numel() + validate.EXTRA_TERMS


@pytest.mark.numeric
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_transposed_convolution_and_its_gradients(dtype: torch.dtype, data: str) -> None:
    """The oracles are PyTorch's in float64, and accept PyTorch's in fp32; each input counts its own products."""
    x, weight, bias = (DATA[data](size, dtype, 0) for size in ((2, 6, 3, 4), (6, 5, 2, 2), (5,)))
    exact = validate.up_conv(x, weight, bias)
    grad = DATA[data]((2, 5, 6, 8), dtype, 1)
    inputs = [each.to(accumulation(dtype)).requires_grad_() for each in (x, weight, bias)]

    def up_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, weight, bias, stride=2)

    result = up_conv(*inputs)
    grads = torch.autograd.grad(result, inputs, grad.to(result.dtype))

    assert ratio(result.detach().to(dtype), exact) <= 1
    of_inputs = validate.gradients(up_conv, (x, weight, bias), grad)
    assert [each.terms for each in of_inputs] == [4 * 5, 2 * 3 * 4, 2 * 6 * 8]
    for actual, each in zip(grads, of_inputs, strict=True):
        assert ratio(actual.to(dtype), each) <= 1
        assert bool((each.magnitude >= each.value.abs() * (1 - 1e-12)).all())


def test_the_terms_of_a_gradient_are_those_of_its_fullest_sum() -> None:
    """With padding a corner takes part in 4 of 9 taps, and a corner's tap in 4 * 4 of 5 * 5 pixels."""
    x, weight, grad = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3), torch.ones(2, 4, 5, 5)

    of_x, of_weight = validate.gradients(
        lambda *each: functional.conv2d(each[0], each[1], padding=1), (x, weight), grad
    )

    assert (of_x.terms, of_weight.terms) == (9 * 4, 2 * 5 * 5)


def test_an_error_of_the_upstream_gradient_is_allowed_for() -> None:
    """What the error of every element makes of a sum, at worst, is the slack."""
    x, weight, grad = (DATA["positive"](size, torch.float32, 0) for size in ((1, 2, 4, 4), (3, 2, 3, 3), (1, 3, 2, 2)))
    error = torch.full((1, 3, 2, 2), 0.25, dtype=torch.float64)

    of_x, of_weight = validate.gradients(functional.conv2d, (x, weight), grad, error)

    moved_x, moved_weight = validate.gradients(functional.conv2d, (x, weight), grad + 0.25)
    torch.testing.assert_close(of_x.slack, moved_x.value - of_x.value)
    torch.testing.assert_close(of_weight.slack, moved_weight.value - of_weight.value)
