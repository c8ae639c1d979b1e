"""The store as a wide table: one row per case, a column per metric. Statistics are computed here, on reading."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import pandas as pd

from skipcost.bench.cases import CASE_KEYS, SPEC_KEYS
from skipcost.bench.errors import BenchError
from skipcost.bench.metrics import METRICS
from skipcost.bench.records import Result
from skipcost.bench.store import Run, Store

WHOLE = ("depth", "width", "in_channels", "classes", "max_width", "pruned_to")  # of a spec
NAMES = ("label", "factory")
COLUMNS = (*SPEC_KEYS, *NAMES, *CASE_KEYS, *METRICS, "outcome")


def newest_environment(store: Store) -> Run:
    """The last run of the environment that measured last; BenchError where the store has no run."""
    runs = store.runs()
    if not runs:
        message = "the store holds no run yet: `skipcost sweep` fills it"
        raise BenchError(message)
    return runs[-1]


def results_by_case(store: Store, fingerprint: str) -> dict[str, dict[str, Result]]:
    """Every result of an environment, by case and metric."""
    table: dict[str, dict[str, Result]] = defaultdict(dict)
    for row in store.rows():
        if row.fingerprint == fingerprint:
            table[row.case_id][row.result.metric] = row.result
    return dict(table)


def value_of(result: Result) -> float | None:
    """What a table shows of a result: the median of its samples, or None where there is none, or none is a cost."""
    value = statistics.median(result.samples) if result.samples else math.nan
    return value if math.isfinite(value) and value >= 0 else None


def outcome_of(results: dict[str, Result]) -> str:
    """One word for a case: ok, or the outcomes that are not, each with its metrics."""
    failed: dict[str, list[str]] = defaultdict(list)
    for name, result in results.items():
        if result.outcome != "ok":
            failed[result.outcome].append(name)
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in failed.items()) or "ok"


def wide_table(store: Store, fingerprint: str) -> pd.DataFrame:
    """One row per case of an environment: a spec's fields, label and factory, the case's fields, METRICS, `outcome`.

    Index: the case id. Metrics are in base units (seconds, bytes, counts), whole numbers where they are counted;
    missing is NA. A model of a user's own has a factory, and what is unknown of it (variant, depth, width, ...) is NA.
    """
    cases = store.cases()
    rows: dict[str, dict[str, Any]] = {}
    for case_id, results in results_by_case(store, fingerprint).items():
        case, _ = cases[case_id]
        values = {name: value_of(result) for name, result in results.items()}
        names = {"label": case.spec.label, "factory": case.factory.call if case.factory else None}
        rows[case_id] = {**case.flat(), **names, **values, "outcome": outcome_of(results)}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    frame.index.name = "case_id"
    whole = [name for name, metric in METRICS.items() if metric.exact]
    frame = frame.astype(dict.fromkeys([*whole, *WHOLE], "Int64") | {"bias": "boolean"})
    return frame.sort_values(["variant", "depth", "width", "skip", "label", "mode"], kind="stable")
