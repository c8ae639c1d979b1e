"""`tap_first_into`: what `tap_first` returns, written over or added to channels of a buffer; as it runs on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.low_resolution.tap_first import tap_first, tap_first_into
from skipcost.kernels.verify import exact as validate

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _given(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    x, weight, made = torch.randn(2, 6, 5, 20), torch.randn(4, 6, 3, 3), torch.randn(4)
    return x.to(dtype), weight.to(dtype), made.to(dtype) if bias else None


def _buffer(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 9, 10, 40).to(dtype).contiguous(memory_format=layout)


@pytest.mark.numeric
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_channels_hold_the_result_and_the_others_what_they_held(
    dtype: torch.dtype,
    layout: torch.memory_format,
    add: bool,  # noqa: FBT001 - what is asked for
    bias: bool,  # noqa: FBT001
) -> None:
    """Within the bound of a sum that is rounded once, in any layout."""
    given, buffer = _given(dtype, bias=bias), _buffer(dtype, layout)
    before = buffer.clone()
    exact = validate.up_sampled_conv(*given, factor=2, padding=1)
    held = before[:, 3:7].double() * add
    exact = replace(exact, value=exact.value + held, magnitude=exact.magnitude + held.abs())

    tap_first_into(*given, buffer, 3, add=add, factor=2)

    assert validate.worst(buffer[:, 3:7], exact.value, validate.allowed(exact, dtype)) <= 1
    assert torch.equal(buffer[:, :3], before[:, :3])
    assert torch.equal(buffer[:, 7:], before[:, 7:])


def test_it_counts_what_the_other_counts() -> None:
    """FlopCounterMode sees the same products."""
    with FlopCounterMode(display=False) as other:
        tap_first(*_given(), factor=2)
    with FlopCounterMode(display=False) as into:
        tap_first_into(*_given(), _buffer(), 1, factor=2)

    assert into.get_total_flops() == other.get_total_flops() > 0


def test_opcheck() -> None:
    """Schema, mutation, fake implementation and tracing with symbolic shapes are PyTorch's to check."""
    arguments = (*_given(), _buffer(), 2, True, 2, "bilinear", False, 1, [0, 0, 10, 40])

    torch.library.opcheck(torch.ops.skipcost.tap_first_into.default, arguments)


def test_compiled_function_adds_once() -> None:
    """torch.compile keeps the mutation, and the order of what comes before and after it."""

    def both(x: Tensor, weight: Tensor) -> Tensor:
        buffer = torch.ones(2, 4, 10, 40)
        tap_first_into(x, weight, None, buffer, add=True, factor=2)
        return buffer * 2

    x, weight, _ = _given()
    with torch.no_grad():
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(x, weight)

    torch.testing.assert_close(compiled, both(x, weight))


@pytest.mark.parametrize(
    ("buffer", "changes", "message"),
    [
        (torch.ones(2, 9, 10, 40), {"channel": 6}, "4 channels from channel 6 on do not fit; give it more channels"),
        (torch.ones(2, 9, 10, 40), {"channel": -1}, "4 channels from channel -1 on do not fit"),
        (torch.ones(2, 9, 10, 39), {}, "the result has 10x40 pixels, and so must the buffer"),
        (
            torch.ones(2, 9, 10, 40).half(),
            {},
            "map 1 of tap_first_into is torch.float16 on cpu, map 0 is torch.float32",
        ),
        (torch.ones(1, 9, 10, 40), {}, "map 1 of tap_first_into has batch size 1, map 0 has 2"),
        (torch.ones(2, 9, 10, 1).expand(2, 9, 10, 40), {}, "nothing may be repeated in what is written to"),
        (torch.ones(2, 9, 10, 40).requires_grad_(), {}, "has no gradient, but an argument requires one"),
        (torch.ones(2, 9, 10, 40), {"mode": "bicubic"}, "mode='bicubic' is unknown"),
    ],
)
def test_what_it_cannot_write_to_is_refused(buffer: Tensor, changes: dict[str, Any], message: str) -> None:
    """With what was received and what is accepted, before anything is written."""
    options = {"factor": 2, **changes}

    with pytest.raises(ValueError, match=message):
        tap_first_into(*_given(), buffer, options.pop("channel", 0), **options)
