"""`skipcost show`: filter, sort and write the wide table."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from skipcost.bench import figures
from skipcost.bench.cases.case import CASE_KEYS
from skipcost.bench.console import Column, Screen
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Store
from skipcost.bench.store.tables import wide_table
from skipcost.unet_models.spec import suggest

if TYPE_CHECKING:
    import pandas as pd

KEPT = ("params", "conv_macs", "latency_s")  # metrics that a narrow table leaves out last


def select(store: Store, where: str | None, sort: str | None, *, every: bool = False) -> pd.DataFrame:
    """The wide table of the newest environment, filtered and sorted; BenchError for a column that is not there.

    every: former states of users' own models, too.
    """
    frame = wide_table(store, store.newest().fingerprint, store.cases() if every else None)
    if where is not None:
        from skipcost.bench.store.where import rows_where  # noqa: PLC0415 - pandas', as the table itself

        frame = rows_where(frame, where)
    if sort:
        if sort not in frame.columns:
            raise BenchError(suggest("column", sort, frame.columns))
        frame = frame.sort_values(sort, kind="stable")
    return frame


def former_states(store: Store) -> str:
    """Say how many states of users' own models are left out; empty where there are none."""
    fingerprint = store.newest().fingerprint
    left_out = len(set(store.results(fingerprint, store.cases())) - store.newest_states(fingerprint))
    rows = f"{left_out} row{'s' * (left_out != 1)}"
    return f"left out: {rows} of models as they were before an edit; --all shows them" if left_out else ""


def write(frame: pd.DataFrame, form: str, console: Screen, labels: dict[str, str]) -> None:
    """Write the table to stdout: for people, by its cases' labels, or with every column as CSV, JSON or Parquet."""
    match form:
        case "csv":
            frame.to_csv(sys.stdout)
        case "json":
            frame.reset_index().to_json(sys.stdout, orient="records", indent=1)
            print()  # noqa: T201 - the end of the last line of data
        case "parquet":
            try:
                frame.to_parquet(sys.stdout.buffer)
            except ImportError:
                message = "Parquet needs pyarrow: pip install skipcost[parquet], or use --format csv"
                raise BenchError(message) from None
        case _:
            _for_people(frame, labels, console)


def _for_people(frame: pd.DataFrame, labels: dict[str, str], console: Screen) -> None:
    """Only what differs between rows, and metrics that any row has, in readable units.

    Where a model is there in several states, these are told apart by their code's hash and when they were asked for.
    """
    import pandas as pd  # noqa: PLC0415 - as in `wide_table`

    several = frame["code"].nunique() > frame["factory"].nunique()
    fields = [name for name in CASE_KEYS if len(set(frame[name].dropna())) > 1] + ["code", "asked"] * several
    metrics = [name for name in METRICS if frame[name].notna().any()]
    said = [["-" if pd.isna(value) else str(value) for value in frame[name]] for name in fields]
    values = [[_figure(None if pd.isna(value) else value, name) for value in frame[name]] for name in metrics]
    outcomes = [_short(str(outcome)) for outcome in frame["outcome"]]
    rows = zip([labels[str(case_id)] for case_id in frame.index], *said, *values, outcomes, strict=True)
    less = [name for name in metrics if name not in KEPT]
    figured = [
        Column(METRICS[name].title, right=True, drop=1 + less.index(name) if name in less else 0) for name in metrics
    ]
    columns = [*map(Column, ("network", *fields)), *figured, Column("outcome", prose=True)]
    console.table(columns, rows, more="--format csv has every column")


def _figure(value: float | None, metric: str) -> str:
    """A number in a readable unit, in one word."""
    return figures.text(value, METRICS[metric].unit).replace(" ", "\u00a0")


def _short(outcome: str) -> str:
    """The outcome with its metrics counted where there are many; the other formats name them all."""
    parts = []
    for part in outcome.split("; "):
        word, _, metrics = part.partition(": ")
        several = metrics.count(",") + 1
        parts.append(f"{word}: {several} metrics" if several > 2 else part)  # noqa: PLR2004 - two names fit a line
    return "; ".join(parts)
