"""In which precision PyTorch multiplies: the one place that reads, and for a while changes, its settings.

PyTorch has two names for rounding fp32 operands to tf32: `allow_tf32`, and since 2.9 `fp32_precision` of one operation
or of all. Both can be written at any time; reading the older one raises once the newer one says what it cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from skipcost.kernels.compilers import constant

CUDNN: Any = torch.backends.cudnn
MATMUL: Any = torch.backends.cuda.matmul
SETTINGS = ((CUDNN, (CUDNN.conv, CUDNN.rnn)), (MATMUL, (MATMUL,)))  # who has the older name, who the newer


def computing_type(x: Tensor) -> torch.dtype:
    """Return the type in which PyTorch's convolutions of `x` compute: autocast's where it is on, but never for fp64."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast and x.is_floating_point() and x.dtype != torch.float64 else x.dtype


def tf32_allowed() -> bool:
    """Whether PyTorch's convolutions may round fp32 operands to tf32.

    While torch.compile traces, the older name is read where it can be, since Dynamo guards on that one: a later change
    of it compiles again. What only the newer name can say is read once per compilation.
    """
    if torch.compiler.is_compiling() and _older_name_tells():
        return bool(CUDNN.allow_tf32)
    return bool(_convolutions_round())


@constant
def _older_name_tells() -> bool:
    try:
        CUDNN.allow_tf32  # noqa: B018 - raises where it cannot say what the newer name was set to
    except RuntimeError:
        return False
    return True


@constant
def _convolutions_round() -> bool:
    return bool(CUDNN.conv.fp32_precision == "tf32")


@contextmanager
def rounding(*, tf32: bool) -> Iterator[None]:
    """Let PyTorch round fp32 operands to tf32, in convolutions and matrix products, or not; restore what was set."""
    undo = [_undoing(older, *newer) for older, newer in SETTINGS]
    allow_tf32(tf32)
    try:
        yield
    finally:
        for each in undo:
            each()


def allow_tf32(allowed: bool) -> None:
    """Let PyTorch round fp32 operands to tf32, in convolutions and matrix products, or not.

    By the older name, which the most code can read; by the newer one where that does not suffice: with
    `torch.backends.fp32_precision` at "tf32", an `allow_tf32` of False leaves cuDNN's operations at what all have.
    """
    for older, newer in SETTINGS:
        older.allow_tf32 = allowed
        for each in newer:
            if (each.fp32_precision == "tf32") != allowed:
                each.fp32_precision = "tf32" if allowed else "ieee"


def _undoing(older: Any, *newer: Any) -> Callable[[], None]:
    """Return what sets back a setting to what it is now, by the name that can express it."""
    try:
        owners, name, values = (older,), "allow_tf32", [older.allow_tf32]
    except RuntimeError:
        owners, name, values = newer, "fp32_precision", [each.fp32_precision for each in newer]

    def undo() -> None:
        for owner, value in zip(owners, values, strict=True):
            setattr(owner, name, value)

    return undo
