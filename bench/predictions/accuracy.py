"""How far predicted GPU memory was from measured, over every row of a store that has both. Arithmetic only.

A pair is a metric that was measured on a GPU and its prediction, `peak_memory_X` and `peak_memory_predicted_X`. An
error is predicted over measured less 1: below 0 is under, which is what makes a job die. Nothing is left out in
silence: what could not be compared is counted by reason.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result, value_of
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Run, Store

PAIRS = {
    name.replace("_predicted_", "_"): name
    for name in METRICS
    if name.startswith("peak_memory_predicted_") and name.replace("_predicted_", "_") in METRICS
}
# What the suite aims at on a GPU: mean error, worst error, most that a prediction may be under, networks.
AIM_MEAN, AIM_WORST, AIM_UNDER, AIM_NETWORKS = 0.03, 0.08, 0.02, 60
NOT_MEASURED = "not measured yet: no GPU row in this store"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one case, predicted (with its claimed interval) and measured, in bytes."""

    device: str
    case: Case
    metric: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether what was measured lies in the claimed interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure on one device over all its comparisons; shares and errors are fractions, `worst` has its sign."""

    device: str
    metric: str
    rows: int
    networks: int
    mean: float
    worst: float
    under: float
    most_under: float
    inside: float

    @property
    def verdict(self) -> str:
        """Whether the aim is met, or how many networks that takes."""
        if self.networks < AIM_NETWORKS:
            return f"too few networks: {AIM_NETWORKS} are needed"
        met = self.mean <= AIM_MEAN and abs(self.worst) <= AIM_WORST and self.most_under <= AIM_UNDER
        return "met" if met else "missed"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Every comparison, and by reason how many measured figures have none."""

    comparisons: tuple[Comparison, ...]
    left_out: dict[str, int]

    @property
    def why_none(self) -> str:
        """One sentence where there is nothing to show; empty where there is."""
        if self.comparisons:
            return ""
        if not self.left_out:
            return NOT_MEASURED
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.left_out.items())
        return f"not compared yet: no row has a prediction and a measurement ({reasons})"

    def summaries(self) -> list[Summary]:
        """One for each device and figure, in the order of METRICS."""
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for each in self.comparisons:
            groups.setdefault((each.device, each.metric), []).append(each)
        devices = sorted({device for device, _ in groups})
        asked = [(device, metric) for device in devices for metric in PAIRS]
        return [
            _summary(device, metric, groups[device, metric]) for device, metric in asked if (device, metric) in groups
        ]

    def worst(self, count: int) -> list[Comparison]:
        """The rows furthest off, in either direction."""
        return sorted(self.comparisons, key=lambda each: -abs(each.error))[:count]


def _summary(device: str, metric: str, rows: list[Comparison]) -> Summary:
    errors = [each.error for each in rows]
    return Summary(
        device=device,
        metric=metric,
        rows=len(rows),
        networks=len({each.case.spec for each in rows}),
        mean=statistics.fmean(abs(error) for error in errors),
        worst=max(errors, key=abs),
        under=statistics.fmean(error < 0 for error in errors),
        most_under=max(0.0, -min(errors)),
        inside=statistics.fmean(each.inside for each in rows),
    )


def accuracy_of_store(store: Store) -> Accuracy:
    """Compare within each environment of a store."""
    newest = {run.fingerprint: run for run in store.runs()}
    cases = {case_id: case for case_id, (case, _) in store.cases().items()}
    return _joined(compare(cases, store.results(fingerprint), device_of(run)) for fingerprint, run in newest.items())


def device_of(run: Run) -> str:
    """The GPU of a run's environment."""
    gpus = run.environment.get("gpus") or [{}]
    return str(gpus[0].get("name", "unknown GPU"))


def _joined(parts: Iterable[Accuracy]) -> Accuracy:
    found = list(parts)
    left_out: Counter[str] = Counter()
    for part in found:
        left_out.update(part.left_out)
    return Accuracy(tuple(each for part in found for each in part.comparisons), dict(left_out))


def compare(cases: dict[str, Case], results: dict[str, dict[str, Result]], device: str) -> Accuracy:
    """Pair what was measured on a device with what was predicted for it; `results` by case id and metric."""
    comparisons = []
    left_out: Counter[str] = Counter()
    for case_id, row in results.items():
        for metric, name in PAIRS.items():
            measured = row.get(metric)
            if measured is None or measured.outcome == "unsupported":
                continue  # nobody measured here: there is nothing to compare with
            reason = _why_not(measured, row.get(name))
            if reason:
                left_out[reason] += 1
                continue
            prediction, low, high = _claim(row[name])
            comparisons.append(
                Comparison(device, cases[case_id], metric, prediction, low, high, value_of(measured) or 0.0)
            )
    return Accuracy(tuple(comparisons), dict(left_out))


def _why_not(measured: Result, predicted: Result | None) -> str:
    """Why a measured figure cannot be compared; empty where it can."""
    if measured.outcome != "ok" or not _usable(value_of(measured)):
        return f"measured: {measured.outcome}" if measured.outcome != "ok" else "measured: no number above 0"
    if predicted is None:
        return "no prediction beside it: sweep again with this version of skipcost"
    if predicted.outcome != "ok":
        return f"predicted: {predicted.outcome}, {predicted.note}"
    return "" if all(_usable(each) for each in _claim(predicted)) else "predicted: no interval of numbers above 0"


def _claim(predicted: Result) -> tuple[float, float, float]:
    """A prediction's value and its interval; NaN where one is missing."""
    value = value_of(predicted)
    low, high = (float(predicted.detail.get(name, math.nan)) for name in ("low", "high"))
    return math.nan if value is None else value, low, high


def _usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def to_json(found: Accuracy, worst: int) -> dict[str, Any]:
    """Everything the command shows, for a program."""
    return {
        "note": found.why_none,
        "compared": len(found.comparisons),
        "left_out": found.left_out,
        "aim": {"mean": AIM_MEAN, "worst": AIM_WORST, "under": AIM_UNDER, "networks": AIM_NETWORKS},
        "figures": [asdict(each) | {"verdict": each.verdict} for each in found.summaries()],
        "worst": [
            {
                "device": each.device,
                "case": each.case.name,
                "metric": each.metric,
                "predicted": each.predicted,
                "low": each.low,
                "high": each.high,
                "measured": each.measured,
                "error": each.error,
            }
            for each in found.worst(worst)
        ],
    }
