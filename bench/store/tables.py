"""The store as a wide table: one row per case, a column per metric. Statistics are computed here, on reading."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from skipcost.bench.cases.case import CASE_KEYS, SPEC_KEYS
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Run, Store

if TYPE_CHECKING:
    import pandas as pd

WHOLE = ("depth", "width", "in_channels", "classes", "max_width", "pruned_to")  # of a spec
NAMES = ("label", "factory", "code", "asked")
NAMED = 3  # networks beside a reason
COLUMNS = (*SPEC_KEYS, *NAMES, *CASE_KEYS, *METRICS, "outcome")


def newest_environment(store: Store) -> Run:
    """The last run of the environment that measured last; BenchError where the store has no run."""
    runs = store.runs()
    if not runs:
        message = "the store holds no run yet: `skipcost sweep` fills it"
        raise BenchError(message)
    return runs[-1]


def newest_states(store: Store, fingerprint: str) -> set[str]:
    """The ids of an environment's cases; of a user's own model in several states the one that was asked for last."""
    return {states[-1].case_id for states in store.states(fingerprint).values()}


def results_by_case(
    store: Store, fingerprint: str, chosen: Collection[str] | None = None
) -> dict[str, dict[str, Result]]:
    """Every result of an environment, by case and metric; of the cases that are `chosen`, else of the newest states."""
    ids = newest_states(store, fingerprint) if chosen is None else chosen
    table: dict[str, dict[str, Result]] = defaultdict(dict)
    for row in store.rows():
        if row.fingerprint == fingerprint and row.case_id in ids:
            table[row.case_id][row.result.metric] = row.result
    return dict(table)


def reasons_of(results: Iterable[tuple[str, Result]]) -> list[str]:
    """A line for each reason why results are not ok, the most frequent first: how many, of which networks, and why."""
    failed = ((label, each.outcome, each.note or "no reason is known") for label, each in results if not _is_ok(each))
    return _each_once(failed)


def notes_of(results: Iterable[tuple[str, Result]]) -> list[str]:
    """The same of what is to be known of numbers that there are: of which metric, of which networks, and what."""
    return _each_once((label, each.metric, each.note) for label, each in results if _is_ok(each) and each.note)


def _is_ok(result: Result) -> bool:
    return result.outcome == "ok"


def _each_once(said: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of (label, word, text): each word with a text once, with how many and the first labels."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for label, word, text in said:
        found[word, text].append(label)
    lines = []
    for (word, text), labels in sorted(found.items(), key=lambda item: -len(item[1])):
        names = list(dict.fromkeys(labels))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"{len(labels)} {word} ({', '.join(names[:NAMED])}{more}): {text}")
    return lines


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


def wide_table(store: Store, fingerprint: str = "", chosen: Collection[str] | None = None) -> pd.DataFrame:
    """One row per case of an environment: a spec's fields, NAMES, the case's fields, METRICS, `outcome`.

    fingerprint: the environment's; by default that of the one that measured last. Index: the case id. Metrics are in
    base units (seconds, bytes, counts), whole numbers where they are counted; missing is NA. A model of a user's own
    has a factory and the hash of its state (`code`), and what is unknown of it (variant, depth, width, ...) is NA.
    `asked` is when the last run began that asked for the case, in UTC.
    Rows: the cases that are `chosen`, else the newest state of each model (`results_by_case`).
    """
    import pandas as pd  # noqa: PLC0415 - most of a second, which most commands do without

    fingerprint = fingerprint or newest_environment(store).fingerprint
    cases, runs = store.cases(), {run.run_id: run.started for run in store.runs()}
    asked = {case_id: runs[run_id] for run_id, case_id in store.asked()}
    rows: dict[str, dict[str, Any]] = {}
    for case_id, results in results_by_case(store, fingerprint, chosen).items():
        case, _ = cases[case_id]
        values = {name: value_of(result) for name, result in results.items()}
        own = {"factory": case.factory.call, "code": case.factory.state} if case.factory else {}
        names = {"label": case.spec.label, "asked": asked[case_id], **own}
        rows[case_id] = {**case.flat(), **names, **values, "outcome": outcome_of(results)}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    frame.index.name = "case_id"
    whole = [name for name, metric in METRICS.items() if metric.exact]
    frame = frame.astype(dict.fromkeys([*whole, *WHOLE], "Int64") | {"bias": "boolean"})
    return frame.sort_values(["variant", "depth", "width", "skip", "label", "mode"], kind="stable")
