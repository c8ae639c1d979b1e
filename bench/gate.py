"""The exact gate: every number that equal code must reproduce, against a baseline. Any change is a verdict.

It fails closed: what is missing on either side, cannot be compared, or leaves nothing to compare, fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from skipcost.bench.baseline import Baseline, Entry
from skipcost.bench.metrics import METRICS
from skipcost.bench.verdicts import Verdict

NOTHING = Entry("", {})


def judge(base: Baseline, now: Baseline, reasons: dict[tuple[str, str], str] | None = None) -> list[Verdict]:
    """Compare every exact number of both sides, in the order of their names.

    reasons: by (case's canonical JSON, metric), why this side has no number where it tried.
    """
    keys = sorted({**base.entries, **now.entries}, key=lambda key: ((now.entries | base.entries)[key].name, key))
    verdicts = []
    for key in keys:
        tried = {metric: why for (case, metric), why in (reasons or {}).items() if case == key}
        found = _case(base.entries.get(key), now.entries.get(key), _drifted(base, now), tried)
        verdicts += [replace(each, key=key) for each in found]
    return verdicts


def _drifted(base: Baseline, now: Baseline) -> dict[str, str]:
    """Metrics whose numbers rest on a package that has another version on the two sides, with the versions."""
    drifted = {}
    for name, metric in METRICS.items():
        for package in metric.rests_on:
            then, today = base.versions.get(package, "unknown"), now.versions.get(package, "unknown")
            if then != today:
                drifted[name] = f"{package} {then} in the baseline, {today} here"
    return drifted


def _case(base: Entry | None, now: Entry | None, drifted: dict[str, str], tried: dict[str, str]) -> Iterator[Verdict]:
    name = (base or now or NOTHING).name
    one_sided = "the whole case" if base is None or now is None else ""
    then, today = (base or NOTHING).exact, (now or NOTHING).exact
    for metric in dict.fromkeys((*METRICS, *then, *today)):  # the baseline may name metrics that are no more
        if metric not in then and metric not in today:
            continue
        if metric not in today:
            why = tried.get(metric, one_sided)
            yield Verdict(name, metric, "missing", base=_number(then[metric]), why=why)
        elif metric not in then:
            yield Verdict(name, metric, "new", now=_number(today[metric]), why=one_sided)
        else:
            yield _pair(name, metric, then[metric], today[metric], drifted.get(metric, ""))


def _pair(name: str, metric: str, base: float | str, now: float | str, drift: str) -> Verdict:
    then, today = _number(base), _number(now)
    if base == now:
        return Verdict(name, metric, "unchanged", then, today)
    if then is None or today is None:
        return Verdict(name, metric, "not_comparable", then, today, f"{base} in the baseline, {now} here")
    if drift:
        return Verdict(name, metric, "not_comparable", then, today, drift)
    better = (today > then) == (metric in METRICS and METRICS[metric].more_is_better)
    return Verdict(name, metric, "improved" if better else "regressed", then, today)


def _number(value: float | str) -> float | None:
    return None if isinstance(value, str) else value


def compared(verdicts: list[Verdict]) -> int:
    """How many numbers both sides had."""
    return sum(each.verdict in ("unchanged", "improved", "regressed") for each in verdicts)
