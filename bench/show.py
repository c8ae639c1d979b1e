"""`skipcost show`: filter, sort and write the wide table."""

from __future__ import annotations

import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from skipcost.bench import figures
from skipcost.bench.errors import BenchError
from skipcost.bench.metrics import METRICS
from skipcost.bench.store import Store
from skipcost.bench.tables import newest_environment, wide_table
from skipcost.unet_models.spec import suggest


def select(store: Store, where: str | None, sort: str | None) -> pd.DataFrame:
    """The wide table of the newest environment, filtered and sorted; BenchError for a column that is not there."""
    frame = wide_table(store, newest_environment(store).fingerprint)
    if where:
        try:
            frame = frame.query(where, engine="python")
        except Exception as error:  # noqa: BLE001 - pandas raises errors of many kinds for a bad expression
            message = f"--where {where!r} cannot be worked out ({error}); columns are: {', '.join(frame.columns)}"
            raise BenchError(message) from None
    if sort:
        if sort not in frame.columns:
            raise BenchError(suggest("column", sort, frame.columns))
        frame = frame.sort_values(sort, kind="stable")
    return frame


def write(frame: pd.DataFrame, form: str, console: Console) -> None:
    """Write the table to stdout: for people, or with every column as CSV, JSON or Parquet."""
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
            console.print(_for_people(frame))


def _for_people(frame: pd.DataFrame) -> Table:
    """Only what differs between rows, and metrics that any row has, in readable units."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    fields = [name for name in frame.columns if name not in METRICS and name != "outcome"]
    shown = [name for name in fields if len(set(frame[name])) > 1] or ["variant"]
    metrics = [name for name in METRICS if frame[name].notna().any()]
    for name in shown:
        table.add_column(name, no_wrap=True)
    for name in metrics:
        table.add_column(name.removesuffix("_s").removesuffix("_bytes").replace("peak_memory_", ""), justify="right")
    table.add_column("outcome", ratio=1)
    for _, row in frame.iterrows():
        values = [figures.text(row[name], METRICS[name].unit) for name in metrics]
        table.add_row(*[str(row[name]) for name in shown], *values, str(row["outcome"]))
    return table
