"""How many operators a step dispatches, by name: what an eager program's overhead and its `.clone()`s show up in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.modules import compiled_note
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.tracing import trace
from skipcost.bench.measure.watching import Watching

STEPS = {"inference": 1, "training": 2}  # the first training step makes the optimizer's state


def count_operators(case: Case) -> Result:
    """Run steps without data and count the operators of the last one."""
    (counts, compiled), note = trace(
        case, lambda subject: (_count(subject.step, STEPS[case.mode]), compiled_note(subject.network))
    )
    note = "; ".join(filter(None, (note, compiled)))
    by_operator = dict(sorted(counts.items()))
    return Result("operators", samples=(counts.total(),), note=note, detail={"by_operator": by_operator})


def _count(step: Callable[[], object], steps: int) -> Counter[str]:
    for _ in range(steps - 1):
        step()
    counts: Counter[str] = Counter()
    with Watching(lambda func, _args, _result: counts.update([str(func)])):
        step()
    return counts
