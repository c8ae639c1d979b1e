"""What torch.compile is told of a function, without loading it: `torch.compiler` imports Dynamo to set one mark."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that a compiler calls while it traces, and whose answer it takes for a constant.

    The mark of `torch.compiler.assume_constant_result`, whose import takes every process 2 s.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001 - what Dynamo looks for
    return function
