"""The exact gate: every number that equal code must reproduce, against a baseline. Any change is a verdict.

It fails closed: what is missing on either side, cannot be compared, or leaves nothing to compare, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from skipcost.bench.compare.baseline import Baseline, Entry
from skipcost.bench.compare.kernel_resources import MORE_IS_BETTER
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.measure.metrics import METRICS

NOTHING = Entry("", {})


def judge(base: Baseline, now: Baseline, reasons: dict[tuple[str, str], str] | None = None) -> list[Verdict]:
    """Compare every exact number of both sides, in the order of their names.

    reasons: by (case's canonical JSON, metric), why this side has no number where it tried, or what is wrong with it.
    """
    keys = sorted({**base.entries, **now.entries}, key=lambda key: ((now.entries | base.entries)[key].name, key))
    verdicts = []
    for key in keys:
        told = {metric: why for (case, metric), why in (reasons or {}).items() if case == key}
        found = _case(base.entries.get(key), now.entries.get(key), partial(_drift, base, now), told)
        verdicts += [replace(each, key=key) for each in found]
    return verdicts


def _drift(base: Baseline, now: Baseline, metric: str) -> str:
    """Which package that a number rests on has other versions on the two sides; "" where none has.

    A number of no metric rests on everything that its baseline names.
    """
    packages = METRICS[metric].rests_on if metric in METRICS else base.versions
    for package in packages:
        then, today = base.versions.get(package, "unknown"), now.versions.get(package, "unknown")
        if then != today:
            return f"{package} {then} in the baseline, {today} here"
    return ""


def _case(
    base: Entry | None, now: Entry | None, drift: Callable[[str], str], told: dict[str, str]
) -> Iterator[Verdict]:
    name = (base or now or NOTHING).name
    one_sided = "the whole case" if base is None or now is None else ""
    then, today = (base or NOTHING).exact, (now or NOTHING).exact
    for metric in dict.fromkeys((*METRICS, *then, *today, *told)):  # the baseline may name metrics that are no more
        if metric in then and metric in today:
            both = Verdict(name, metric, "unchanged", why=told.get(metric, ""))
            yield _pair(both, then[metric], today[metric], drift)
        elif metric in then:
            yield Verdict(name, metric, "missing", base=_number(then[metric]), why=told.get(metric, one_sided))
        elif metric in today:
            yield Verdict(name, metric, "new", now=_number(today[metric]), why=told.get(metric, one_sided))
        elif metric in told:  # a number that neither side has is no number that both have
            yield Verdict(name, metric, "not_comparable", why=f"neither side has it; here {told[metric]}")


def _pair(found: Verdict, base: float | str, now: float | str, drift: Callable[[str], str]) -> Verdict:
    then, today = _number(base), _number(now)
    if base == now:
        return replace(found, base=then, now=today, why="")
    if then is None or today is None:
        why = f"{base} in the baseline, {now} here"
        return replace(found, verdict="not_comparable", base=then, now=today, why=why)
    if drifted := drift(found.metric):
        return replace(found, verdict="not_comparable", base=then, now=today, why=drifted)
    more = METRICS[found.metric].more_is_better if found.metric in METRICS else found.metric in MORE_IS_BETTER
    return replace(found, verdict="improved" if (today > then) == more else "regressed", base=then, now=today)


def _number(value: float | str) -> float | None:
    return None if isinstance(value, str) else value


def compared(verdicts: list[Verdict]) -> int:
    """How many numbers both sides had; what both call unsupported is none."""
    return sum(
        each.verdict in ("unchanged", "improved", "regressed") and each.base is not None and each.now is not None
        for each in verdicts
    )
