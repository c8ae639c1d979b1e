"""Max-pooling that keeps no indices: PyTorch's values and gradients, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import assert_same
from recompute_cases import FORMATS, leaf
from torch import Tensor

from skipcost.kernels.ops.max_pool import pool
from skipcost.kernels.recompute import saved_bytes
from skipcost.unet_models import ops as reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("factor", "ceil"), [(2, False), (2, True), (3, True), (4, False), (1, False)])
def test_pool_has_pytorchs_values_and_gradients(
    factor: int,
    ceil: bool,  # noqa: FBT001 - a case of the test
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Few values, so that most windows have ties; NaN, both zeros, infinities; 7 x 9 leaves incomplete windows."""
    torch.manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    x = values[torch.randint(0, 8, (2, 3, 7, 9))].to(memory_format=memory_format).requires_grad_()

    result, expected = pool(x, factor, ceil=ceil), reference.pool(x, factor, ceil=ceil)
    assert_same(result, expected)
    assert result.stride() == expected.stride()
    grad = torch.randn_like(result)
    for each in (grad, grad.mT.contiguous().mT):
        actual, wanted = (torch.autograd.grad(out, x, each, retain_graph=True)[0] for out in (result, expected))
        assert_same(actual, wanted)
        assert actual.stride() == wanted.stride()


def test_pool_keeps_no_indices() -> None:
    """It keeps its input, which is given here, and nothing else; PyTorch adds 8 bytes for each window."""
    x = leaf()

    ours, theirs = (saved_bytes(partial(op, x * 3, 2, ceil=False)) for op in (pool, reference.pool))

    assert ours == 0
    assert theirs == 8 * 18


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck_passes(memory_format: torch.memory_format) -> None:
    """Schema, fake tensors, autograd and tracing of both ops are sound."""
    x = torch.randn(2, 3, 7, 9).to(memory_format=memory_format).requires_grad_()
    grad = torch.randn(2, 3, 4, 5, requires_grad=True)

    torch.library.opcheck(torch.ops.skipcost.max_pool.default, (x, 2, True))
    torch.library.opcheck(torch.ops.skipcost.max_pool_backward.default, (grad, x, 2, True))


def test_pool_has_second_gradients() -> None:
    """Against differences; the values lie far enough apart that no step makes another pixel the largest."""
    x = torch.randperm(2 * 5 * 7).view(1, 2, 5, 7).double().requires_grad_()

    assert torch.autograd.gradcheck(lambda each: pool(each, 2, ceil=True).square(), x)
    assert torch.autograd.gradgradcheck(lambda each: pool(each, 2, ceil=True).square(), x)


@pytest.mark.parametrize(
    ("x", "factor", "ceil", "message"),
    [
        (torch.ones(3, 4, 4), 2, False, r"pool got a map of shape \(3, 4, 4\) and torch.float32: it takes floating"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), 2, False, "pool got a map .* and torch.int64: it takes floating"),
        (torch.ones(1, 1, 4, 4), 0, False, "pool got factor=0: a window has one pixel or more a side"),
        (torch.ones(1, 1, 4, 3), 4, False, "pool got a 4x3 map, in which no window of 4x4 fits: give a larger one"),
        (torch.ones(1, 1, 0, 3), 2, True, "pool got a 0x3 map, in which no window of 2x2 fits"),
    ],
    ids=["rank", "type", "factor", "small", "empty"],
)
def test_maps_that_cannot_be_pooled_are_refused(x: Tensor, factor: int, ceil: bool, message: str) -> None:  # noqa: FBT001 - a case of the test
    """One sentence says what was received and what is needed."""
    with pytest.raises(ValueError, match=message):
        pool(x, factor, ceil=ceil)
