"""How many operators a step dispatches, by name: what an eager program's overhead and its `.clone()`s show up in."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from skipcost.bench.cases import Case
from skipcost.bench.records import Result
from skipcost.bench.subject import AUTOCAST, make_subject

STEPS = {"inference": 1, "training": 2}  # the first training step makes the optimizer's state


class Operators(TorchDispatchMode):
    """Count every operator below autograd, views included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operators(case: Case) -> Result:
    """Run steps on the meta device (mixed precision on fake CPU tensors) and count the operators of the last one."""
    amp = case.precision in AUTOCAST
    with FakeTensorMode() if amp else contextlib.nullcontext():
        step = make_subject(case, "cpu" if amp else "meta", traced=True).step
        for _ in range(STEPS[case.mode]):
            with Operators() as operators:
                step()
    by_operator = dict(sorted(operators.counts.items()))
    return Result("operators", samples=(operators.counts.total(),), detail={"by_operator": by_operator})
