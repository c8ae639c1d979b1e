"""The store as a wide table: one row per case, a column per metric. Statistics are computed here, on reading."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from skipcost.bench.cases.case import CASE_KEYS, SPEC_KEYS
from skipcost.bench.cases.record import outcomes_of, value_of
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

WHOLE = ("depth", "width", "in_channels", "classes", "max_width", "pruned_to")  # of a spec
NAMES = ("label", "factory", "code", "asked")
COLUMNS = (*SPEC_KEYS, *NAMES, *CASE_KEYS, *METRICS, "outcome")


def wide_table(store: Store, fingerprint: str = "", chosen: Collection[str] | None = None) -> pd.DataFrame:
    """One row per case of an environment: a spec's fields, NAMES, the case's fields, METRICS, `outcome`.

    fingerprint: the environment's; by default that of the one that measured last. Index: the case id. Metrics are in
    base units (seconds, bytes, counts), whole numbers where they are counted; missing is NA. A model of a user's own
    has a factory and the hash of its state (`code`), and what is unknown of it (variant, depth, width, ...) is NA.
    `asked` is when the last run began that asked for the case, in UTC.
    Rows: the cases that are `chosen`, else the newest state of each model (`Store.results`).
    """
    import pandas as pd  # noqa: PLC0415 - most of a second, which most commands do without

    fingerprint = fingerprint or store.newest().fingerprint
    cases, runs = store.cases(), {run.run_id: run.started for run in store.runs()}
    asked = {case_id: runs[run_id] for run_id, case_id in store.asked()}
    rows: dict[str, dict[str, Any]] = {}
    for case_id, results in store.results(fingerprint, chosen).items():
        case, _ = cases[case_id]
        values = {name: value_of(result) for name, result in results.items()}
        own = {"factory": case.factory.call, "code": case.factory.state} if case.factory else {}
        names = {"label": case.spec.label, "asked": asked[case_id], **own}
        rows[case_id] = {**case.flat(), **names, **values, "outcome": outcomes_of(results)}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    frame.index.name = "case_id"
    whole = [name for name, metric in METRICS.items() if metric.exact]
    frame = frame.astype(dict.fromkeys([*whole, *WHOLE], "Int64") | {"bias": "boolean"})
    return frame.sort_values(["variant", "depth", "width", "skip", "label", "mode"], kind="stable")
