"""The context of the section on models that are not of the suite: each beside the networks of the same setting."""

from __future__ import annotations

from typing import Any

import pandas as pd

from skipcost.bench import figures
from skipcost.bench.measure.metrics import METRICS
from skipcost.reports.compare import times
from skipcost.reports.data import Data, records
from skipcost.reports.grid import Cell, Grid, number, words

SHOWN = (
    "params",
    "conv_macs",
    "activations",
    "peak_memory_predicted_bytes",
    "peak_memory_allocated_bytes",
    "latency_s",
)
NEARBY = 6  # networks of the suite that are shown above and below a model's MACs


def others_context(data: Data) -> dict[str, Any]:
    """What they are, then for each setting their costs among the networks' nearest in MACs, and the ratio to those."""
    own = data.own[data.own["same_as"] == ""]
    facts = [_facts(data, row) for row in records(own.drop_duplicates("label"))]
    return {
        "models": _grid(("model", "how it is made", "code", "it printed"), facts),
        "settings": [_setting(data, str(name)) for name in dict.fromkeys(own["setting"])],
    }


def _facts(data: Data, row: dict[str, Any]) -> tuple[Cell, ...]:
    factory = data.cases[row["case_id"]][0].factory
    assert factory is not None
    printed = [each.detail["printed"] for each in data.results[row["case_id"]].values() if "printed" in each.detail]
    return words(row["label"]), words(factory.call), words(factory.code or "not found"), words("".join(printed[:1]))


def _setting(data: Data, name: str) -> dict[str, Any]:
    """One setting: its models among the networks of the suite that were measured under it, by their MACs."""
    own, ours = (rows[(rows["setting"] == name) & (rows["same_as"] == "")] for rows in (data.own, data.frame))
    ours = ours.dropna(subset=["conv_macs"])
    near = {index for macs in own["conv_macs"].dropna() for index in _around(ours["conv_macs"], macs)}
    parts = [rows.astype(object) for rows in (own, ours.loc[sorted(near)]) if len(rows)]
    together = pd.concat(parts, ignore_index=True).sort_values("conv_macs", kind="stable")
    shown = [metric for metric in SHOWN if together[metric].notna().any()]
    rows = [_row(data, row, shown) for row in records(together)]
    return {
        "name": name,
        "table": _grid(("network", *(_head(metric) for metric in shown), "why not"), rows),
        "alone": ours.empty,
        "beside": [sentence for row in records(own) if (sentence := _beside(data, row, ours, shown))],
        "left_out": len(ours) - len(near),
    }


def _head(metric: str) -> str:
    """A metric's title with where the number comes from, unless it says so itself."""
    title, origin = METRICS[metric].title, METRICS[metric].origin.split()[0]
    return title if origin in title else f"{title}, {origin}"


def _around(macs: pd.Series[float], value: float) -> list[Any]:
    """The rows just below and just above a value."""
    order = macs.sort_values(kind="stable")
    below, above = order[order <= value], order[order > value]
    return [*below.index[-NEARBY:], *above.index[:NEARBY]]


def _row(data: Data, row: dict[str, Any], shown: list[str]) -> tuple[Cell, ...]:
    results = {name: result for name, result in data.results[row["case_id"]].items() if name in SHOWN}
    doubtful = {name for name, result in results.items() if result.note}
    failures = dict.fromkeys(f"{each.outcome}: {each.note}" for each in results.values() if each.outcome != "ok")
    cells = (number(row[name], METRICS[name].unit, doubtful=name in doubtful) for name in shown)
    return Cell(row["label"], note="" if row["variant"] else "not of the suite"), *cells, words("; ".join(failures))


def _grid(columns: tuple[str, ...], rows: list[tuple[Cell, ...]]) -> Grid:
    """A table without its last column where that has nothing to say."""
    kept = len(columns) if any(row[-1].text for row in rows) else len(columns) - 1
    return Grid(columns[:kept], tuple(row[:kept] for row in rows))


def _beside(data: Data, row: dict[str, Any], ours: pd.DataFrame, shown: list[str]) -> str:
    """A model over the network of the suite that is nearest in MACs, in every number of which neither is doubtful."""
    if not row["conv_macs"] > 0 or ours.empty:
        return ""
    off = (ours["conv_macs"] / row["conv_macs"]).map(lambda ratio: max(ratio, 1 / ratio))
    near = records(ours.loc[[off.idxmin()]])[0]
    pair = [data.results[each["case_id"]] for each in (row, near)]
    sound = [name for name in shown if all(name in by and by[name].outcome + by[name].note == "ok" for by in pair)]
    ratios = [
        f"{times(row[name] / near[name])} its {METRICS[name].title} ({METRICS[name].origin.split()[0]})"
        for name in sound
        if row[name] > 0 and near[name] > 0
    ]
    macs = figures.text(near["conv_macs"], "macs")
    beside = f"{row['label']} beside {near['label']}, of the suite's networks here the nearest in MACs ({macs})"
    return f"{beside}: {', '.join(ratios)}." if ratios else ""
