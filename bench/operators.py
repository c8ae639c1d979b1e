"""How many operators a step dispatches, by name: what an eager program's overhead and its `.clone()`s show up in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from skipcost.bench.cases import Case
from skipcost.bench.records import Result
from skipcost.bench.tracing import trace

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
    """Run steps without data and count the operators of the last one."""
    counts, note = trace(case, lambda subject: _count(subject.step, STEPS[case.mode]))
    by_operator = dict(sorted(counts.items()))
    return Result("operators", samples=(counts.total(),), note=note, detail={"by_operator": by_operator})


def _count(step: Callable[[], object], steps: int) -> Counter[str]:
    for _ in range(steps - 1):
        step()
    with Operators() as operators:
        step()
    counts: Counter[str] = operators.counts
    return counts
