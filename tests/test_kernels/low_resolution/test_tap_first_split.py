"""A convolution over a concatenation with an up-sampled map, as a sum of two, against the concatenation itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from skipcost.kernels.low_resolution.tap_first import seen_of, split_concat
from skipcost.unet_models.ops import merge, up_sample
from skipcost.unet_models.topology import INTERPOLATIONS

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "one map": [(3, 10, 8)],
    "several": [(3, 10, 8), (2, 10, 8)],
    "none": [],
    "larger maps": [(3, 13, 8), (2, 10, 11)],
    "smaller maps": [(3, 9, 5)],
    "one axis each": [(3, 7, 12)],
}


def _tensors(sizes: list[tuple[int, int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Maps, the map to up-sample (2, 4, 5, 4), weight and bias."""
    torch.manual_seed(0)
    channels = sum(size[0] for size in sizes) + 4
    shapes = [*((2, *size) for size in sizes), (2, 4, 5, 4), (6, channels, 3, 3), (6,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("how", INTERPOLATIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sum_is_the_convolution_of_the_concatenation(
    sizes: list[tuple[int, int, int]], how: str, padding: int
) -> None:  # fmt: skip
    """Values and every gradient in float64, to 1e-12 of the largest, with any crop on either side."""
    *maps, x, weight, bias = tensors = _tensors(sizes)
    wanted = functional.conv2d(merge([*maps, up_sample(x, 2, how)], "concat"), weight, bias, padding=padding)
    grad = torch.randn_like(wanted)
    mode, align_corners = INTERPOLATIONS[how]
    settings = {"factor": 2, "mode": mode, "align_corners": align_corners, "padding": padding}

    result = split_concat(maps, x, weight, bias, **settings)
    with torch.no_grad():
        added = split_concat(maps, x, weight, bias, **settings)

    torch.testing.assert_close(added, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())
    pairs = zip(*(torch.autograd.grad(each, tensors, grad) for each in (result, wanted)), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_gradcheck() -> None:
    """Finite differences agree, cropped on one side."""
    *maps, x, weight, bias = _tensors([(1, 7, 12)])

    assert torch.autograd.gradcheck(
        lambda *given: split_concat(given[:1], *given[1:], factor=2), (*maps, x, weight, bias)
    )


def test_what_is_seen_of_a_map_is_the_reference_crop() -> None:
    """The centre, at half the margin rounded down, of the smallest height and width."""
    assert seen_of((5, 4), 2, [(7, 12), (9, 5)]) == (1, 1, 7, 5)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_twice_at_most(dtype: torch.dtype) -> None:
    """Each term is rounded, then their sum: at most twice the reference's own error against float64."""
    *maps, x, weight, bias = (each.detach().to(dtype) for each in _tensors([(24, 20, 16)], torch.float32))
    x, weight = torch.randn(2, 32, 10, 8).to(dtype), (torch.randn(6, 56, 3, 3) / 22).to(dtype)

    def direct(to: torch.dtype) -> Tensor:
        joined = merge([maps[0].to(to), up_sample(x.to(to), 2, "bilinear")], "concat")
        return functional.conv2d(joined, weight.to(to), bias.to(to), padding=1).double()

    result = split_concat(maps, x, weight, bias, factor=2)

    exact = direct(torch.float64)
    assert (result.double() - exact).norm() <= 2 * (direct(dtype) - exact).norm()


class _Called(TorchDispatchMode):
    """Hears the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", [False, True], ids=["inference", "gradients"])
def test_second_term_is_a_map_of_its_own_only_for_gradients(asked: bool) -> None:  # noqa: FBT001 - a parameter
    """Without them it is added as it is computed: no map is made for it, and no pass adds it."""
    *maps, x, weight, bias = _tensors([(3, 10, 8)])

    with torch.set_grad_enabled(asked), _Called() as called:
        split_concat(maps, x, weight, bias, factor=2)

    assert called.names.count("aten::add_") == called.names.count("skipcost::tap_first") == asked
    assert called.names.count("skipcost::tap_first_into") == (not asked)
