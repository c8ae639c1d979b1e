"""The gradients of `up_conv` in Triton's interpreter, which runs the kernels on CPU tensors without a GPU.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_up_conv_gradients_interpreted.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from kernel_checks import kept_in_16_bits
from torch import Tensor
from torch.nn import functional
from up_conv_cases import Case, cases, no_tf32  # noqa: F401 - a fixture, named below

from skipcost.kernels.ops.up_conv import up_conv_concat
from skipcost.kernels.verify import exact as validate
from skipcost.unet_models import ops as reference_ops

pytestmark = pytest.mark.usefixtures("no_tf32")


@pytest.mark.parametrize("beyond", [(), ((2, 0, 1), (1, 3, 0))], ids=str)
def test_gradcheck_passes_in_float64(beyond: tuple[tuple[int, int, int], ...]) -> None:
    """The gradients agree with finite differences of the kernels themselves, cropped or not."""
    case = Case(1, (2, 2, 3), 3, "fp64", beyond=beyond)
    inputs = [each.detach().requires_grad_() for each in (*case.maps(), *case.inputs()) if each is not None]

    def function(*inputs: Tensor) -> Tensor:
        return up_conv_concat(inputs[:-3], *inputs[-3:])

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@settings(max_examples=15)
@given(cases().filter(lambda case: case.batch > 0 and case.precision != "tf32"))
@example(Case(2, (5, 3, 4), 3, "bf16", beyond=((3, 1, 0), (1, 2, 2))))
def test_the_gradients_are_within_the_bound(case: Case) -> None:
    """Any sizes, strides and types: the gradients are those of the reference in float64, to their own rounding.

    That of the weight, which is ATen's, to a rounding of each further image where a CPU adds images up in 16 bits.
    """
    given = [each for each in (*case.maps(), *case.inputs()) if each is not None]
    leaves = [each.detach().requires_grad_() for each in given]
    count = len(case.beyond)

    def reference(*inputs: Tensor) -> Tensor:
        x, weight, *bias = inputs[count:]
        up = functional.conv_transpose2d(x, weight, bias[0] if bias else None, stride=2)
        return reference_ops.merge([*inputs[:count], up], "concat")

    result = up_conv_concat(leaves[:count], *leaves[count:])
    grad = torch.randn(result.shape).to(result.dtype)

    grads = torch.autograd.grad(result, leaves, grad)
    for index, (actual, exact) in enumerate(zip(grads, validate.gradients(reference, given, grad), strict=True)):
        roundings = kept_in_16_bits(case.dtype, case.batch) if index == count + 1 else 0
        assert validate.worst(actual, exact.value, validate.allowed(exact, actual.dtype, roundings=roundings)) <= 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_passes(gradients: bool) -> None:  # noqa: FBT001 - a parameter of the check
    """Schema, fake tensors, autograd and tracing of the ops are sound where the kernels run."""
    case = Case(2, (3, 2, 3), 2, "fp32", beyond=((3, 1, 0), (1, 2, 2)))
    maps, inputs = case.maps(), case.inputs()
    maps = [each.clone().requires_grad_(gradients) for each in maps]
    x, weight, bias = (each.clone().requires_grad_(gradients) for each in inputs if each is not None)
    buffer = torch.zeros(2, 4, 4, 6).contiguous(memory_format=torch.channels_last)

    torch.library.opcheck(torch.ops.skipcost.up_conv.default, (x, weight, bias, False))
    torch.library.opcheck(torch.ops.skipcost.up_conv_concat.default, (maps, x, weight, bias, False))
    if not gradients:
        torch.library.opcheck(torch.ops.skipcost.up_conv_into.default, (x, weight, bias, buffer, 1, False))
