"""Every op of the kernels at one shape, on what this machine runs for it: without a GPU PyTorch's reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skipcost.kernels.dispatch.call import MERGING, MODES, Call
from skipcost.kernels.verify.table import KERNELS, operands

SOURCE = (16, 64, 64)  # (C, H, W)


def call_of(op: str) -> Call:
    """A small call of an op, in 32 bits: what a decoder node at 64x64 asks for."""
    sources = (SOURCE, SOURCE) if op in MERGING else (SOURCE,)
    mode = MODES[op.endswith("train")]
    return Call(op, 2, sources, 0 if op == "crop_concat" else 16, precision="fp32", mode=mode, factor=2)


@pytest.mark.parametrize("op", KERNELS)
def test_kernel(timed: Callable[..., None], op: str) -> None:
    """Time the op's first implementation, which every machine has."""
    call = call_of(op)
    arguments = operands(call, "cpu")
    run = next(iter(KERNELS[op].implementations.values()))

    timed(lambda: run(arguments, None), conv_macs=call.macs, compulsory_bytes=call.bytes)
