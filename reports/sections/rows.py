"""The context of the table of all rows: one row per measured network and setting."""

from __future__ import annotations

from typing import Any

from skipcost.bench.cases.case import CASE_KEYS
from skipcost.bench.measure.metrics import METRICS
from skipcost.reports.data import SHOWN_FIELDS, Data, records
from skipcost.reports.grid import Cell, Grid, number, whole, words


def rows_context(data: Data) -> dict[str, Any]:
    """Every case with its metrics in readable units, sorted by their base values."""
    own = data.everything()
    first = dict.fromkeys(cost.metric for cost in data.costs)  # what decisions are made by, then the rest
    metrics = [name for name in (first | dict.fromkeys(METRICS)) if own[name].notna().any()]
    extra = [name for name in CASE_KEYS if name not in SHOWN_FIELDS and own[name].nunique() > 1]
    heads = (
        *(Cell("network"), Cell("size"), Cell("batch", 0), Cell("mode"), Cell("precision")),
        *(Cell(name) for name in extra),
        *(Cell(METRICS[name].title, 0, METRICS[name].origin.split()[0]) for name in metrics),
        *(Cell("outcome"), Cell("doubt")),
    )
    doubts: dict[str, dict[str, str]] = {}
    for case_id, result in data.doubts():
        doubts.setdefault(case_id, {})[result.metric] = f"{METRICS[result.metric].title}: {result.note}"
    rows = tuple(_row(data, row, extra, metrics, doubts.get(row["case_id"], {})) for row in records(own))
    units = {METRICS[name].title: METRICS[name].unit for name in metrics}
    return {"heads": heads, "units": units, "table": Grid(tuple(head.text for head in heads), rows)}


def _row(
    data: Data, row: dict[str, Any], extra: list[str], metrics: list[str], doubts: dict[str, str]
) -> tuple[Cell, ...]:
    aliases = sorted(data.cases[row["case_id"]][1])
    height, width = row["image_height"], row["image_width"]
    return (
        Cell(row["label"], note=f"same network as {', '.join(aliases)}" if aliases else ""),
        Cell(f"{height}x{width}", float(height * width)),
        whole(row["batch"]),
        words(row["mode"]),
        words(row["precision"]),
        *(words(row[name]) for name in extra),
        *(number(row[name], METRICS[name].unit, doubtful=name in doubts) for name in metrics),
        words(row["outcome"]),
        words("; ".join(doubts.values())),
    )
