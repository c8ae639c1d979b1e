"""How a result is judged: the worst element, NaN and infinity, what is empty, and where that works."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.verify import exact as validate
from skipcost.kernels.verify.canaries import DATA
from skipcost.kernels.verify.exact import Exact, allowed, worst

NAN, INF = math.nan, math.inf


def ratio(actual: Tensor, exact: Exact) -> float:
    """The largest error as a share of what is allowed."""
    return worst(actual, exact.value, allowed(exact, actual.dtype))


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (1.5, 1.0, 0.5),
        (1.0, 1.0, 0.0),
        (NAN, NAN, 0.0),
        (INF, INF, 0.0),
        (-INF, -INF, 0.0),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
        (INF, 1.0, INF),
        (1.0, INF, INF),
        (INF, -INF, INF),
        (NAN, INF, INF),
        (INF, NAN, INF),
    ],
)
def test_the_worst_element_decides(actual: float, expected: float, error: float) -> None:
    """Amid right elements, one that is off counts by its share of what is allowed, and one that is no number fully."""
    found, exact = (torch.full((2, 3), 7.0, dtype=dtype) for dtype in (torch.float32, torch.float64))
    found[1, 1], exact[1, 1] = actual, expected

    assert worst(found, exact, torch.ones_like(exact)) == error


@pytest.mark.parametrize(
    ("actual", "expected", "right"),
    [
        (INF, 70000.0, True),
        (INF, 65530.0, True),  # beyond 65520, halfway from the largest number to the next one
        (INF, 65500.0, True),  # the sum may have been 65520 before it was rounded
        (INF, 65400.0, False),
        (65504.0, 70000.0, False),
        (-INF, 70000.0, False),
        (-INF, -70000.0, True),
    ],
)
def test_what_is_beyond_a_type_is_infinite_in_it(actual: float, expected: float, *, right: bool) -> None:
    """Float16 ends at 65504."""
    found, exact = torch.tensor([actual], dtype=torch.float16), torch.tensor([expected], dtype=torch.float64)

    error = worst(found, exact, torch.full_like(exact, 32.0))

    assert (error <= 1) == right
    assert right or error > 100


def test_infinite_and_missing_bounds_accept_nothing_but_the_value_itself() -> None:
    """A magnitude that is not finite comes of NaN or infinity in the inputs; then only equal results are right."""
    exact = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    for bound in (INF, NAN, 0.0):
        assert worst(torch.zeros(4), exact, torch.full_like(exact, bound)) == 0
        assert worst(torch.full((4,), 1e-30), exact, torch.full_like(exact, bound)) == INF


def test_nan_and_infinity_in_a_map_stay_where_they_are() -> None:
    """Convolved, they reach the taps around them only; a result that has NaN elsewhere, or nowhere, is rejected."""
    x = DATA["normal"]((1, 3, 7, 8), torch.float32, 0)
    x[0, 1, 3, 3], x[0, 2, 6, 7] = NAN, -INF
    weight = DATA["normal"]((2, 3, 3, 3), torch.float32, 1)
    exact = validate.conv([x], weight, padding=1, relu=True)

    result = functional.conv2d(x, weight, padding=1).relu()

    assert ratio(result, exact) <= 1
    assert ratio(result.nan_to_num(), exact) == INF
    assert ratio(result.roll(1, 3), exact) == INF


def test_nothing_is_right() -> None:
    """An empty batch has no error, forwards and backwards."""
    x, weight = torch.empty(0, 3, 6, 5), torch.empty(4, 3, 3, 3)
    exact = validate.conv([x], weight, padding=1)

    assert ratio(torch.empty(0, 4, 6, 5), exact) == 0
    of_x, of_weight = validate.gradients(
        lambda *each: functional.conv2d(each[0], each[1], padding=1), (x, weight), exact.value
    )
    assert ratio(torch.empty(0, 3, 6, 5), of_x) == 0
    assert ratio(torch.zeros_like(weight), of_weight) == 0


def test_shapes_that_differ_are_refused() -> None:
    """A result that broadcasting would match with the oracle's is not compared."""
    with pytest.raises(
        ValueError, match=r"worst got a result \(3, 1\), expected values \(3, 4\) and allowed errors \(3, 4\)"
    ):
        worst(torch.ones(3, 1), torch.ones(3, 4), torch.ones(3, 4))


def test_bits_tell_what_equality_does_not() -> None:
    """NaN has the bits of NaN, and -0.0 has not those of 0.0, whatever the strides."""
    x = torch.tensor([[0.0, NAN, 1.0], [2.0, 3.0, -0.0]])

    assert torch.equal(validate.bits(x), validate.bits(x.t().contiguous().t()))
    assert not torch.equal(validate.bits(x), validate.bits(x + 0.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_oracles_are_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    """Values and bounds computed on a GPU are a CPU's, and a GPU's convolution without tf32 is within them."""
    x, weight = DATA["positive"]((2, 64, 20, 21), dtype, 0), DATA["positive"]((32, 64, 3, 3), dtype, 1)
    exact, there = (validate.conv([x.to(where)], weight.to(where), padding=1) for where in ("cpu", "cuda"))

    with torch.backends.cudnn.flags(allow_tf32=False):
        result = functional.conv2d(x.cuda(), weight.cuda(), padding=1)

    torch.testing.assert_close(there.value.cpu(), exact.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(allowed(there, dtype).cpu(), allowed(exact, dtype), rtol=1e-12, atol=0)
    assert ratio(result, there) <= 1
