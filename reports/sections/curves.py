"""The context of the figure sections: which rows each figure shows, what to read from it, and its table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from skipcost.bench.measure.metrics import METRICS
from skipcost.reports.compare import LEAST
from skipcost.reports.data import Cost, Data, records
from skipcost.reports.drawings.charts import Axis, doubtful, on_front, scaling, scatter
from skipcost.reports.findings import rank_correlation
from skipcost.reports.grid import Cell, Grid, Plot, number, whole, words
from skipcost.unet_models import VARIANTS


def scaling_context(data: Data) -> dict[str, Any]:
    """Curves over depth and over width, for every cost that has rows."""
    plots = [plot for axis, other in (("depth", "width"), ("width", "depth")) if (plot := _curves(data, axis, other))]
    cells = data.cells(None)
    again = cells[cells["same_as"] != ""]
    pairs = sorted({(row["variant"], row["skip"], *row["same_as"].split("/")[0:4:3]) for row in records(again)})
    same = [f"{VARIANTS[v].title} {skip} is {VARIANTS[base].title} {base_skip}" for v, skip, base, base_skip in pairs]
    settings = list(data.settings.values())
    others = int((~data.frame["setting"].isin(settings)).sum())
    return {"plots": plots, "same": same, "settings": settings, "others": others}


def _curves(data: Data, axis: str, other: str) -> Plot | None:
    """One figure: `other` is held where most cells are, the largest such value."""
    costs = data.costs
    cells = data.cells(None)
    spread = {int(value): cells.loc[cells[other] == value, axis].nunique() for value in set(cells[other])}
    if not costs or max(spread.values(), default=0) < 2:  # noqa: PLR2004 - a curve takes two points
        return None
    held = max(value for value, count in spread.items() if count == max(spread.values()))
    long = pd.concat([_long(data, cost, at) for at, cost in enumerate(costs)])
    long = long[long[other] == held]
    shown = [cost for at, cost in enumerate(costs) if (long["at"] == at).any()]
    long["at"] = long["at"].map({costs.index(cost): at for at, cost in enumerate(shown)})
    title = f"Cost over {axis} at {other} {held}"
    described = (
        f"{', '.join(cost.word for cost in shown)} against {axis}, a column of panels per variant, "
        "a line per skip scheme"
    )
    caption = (
        f"Each row of panels shares its scale, so lines can be compared across variants; {other} is {held} throughout. "
        "Scales are logarithmic: equal steps are equal factors."
    )
    if any(cost.metric == "latency_s" for cost in shown):
        caption += " Latency is the median, the band spans the quartiles of the raw samples."
    if long["doubtful"].any():
        caption += " Hollow points carry a doubt and are left out of the lines."
    if data.failures():
        caption += " Where a line ends early there is no number: see the failures."
    svg = scaling(long, shown, axis, f"over-{axis}", (title, described))
    return Plot(f"over-{axis}", title, svg, caption, _curve_table(data, shown, axis, other, held))


def _long(data: Data, cost: Cost, at: int) -> pd.DataFrame:
    cells = data.cells(cost.mode).dropna(subset=[cost.metric])
    timed = cost.metric == "latency_s"
    return cells[["variant", "depth", "width", "skip"]].assign(
        value=cells[cost.metric],
        at=at,
        low=cells["latency_q1"] if timed else float("nan"),
        high=cells["latency_q3"] if timed else float("nan"),
        doubtful=data.doubtful(cells, cost.metric),
    )


def _curve_table(data: Data, costs: list[Cost], axis: str, other: str, held: int) -> Grid:
    columns = ("variant", "skip", axis, *(cost.word for cost in costs), "same network as")
    values: dict[tuple[Any, ...], dict[int, Cell]] = {}
    same: dict[tuple[Any, ...], str] = {}
    for at, cost in enumerate(costs):
        cells = data.cells(cost.mode)
        cells = cells[cells[other] == held]
        for row in records(cells.assign(doubtful=data.doubtful(cells, cost.metric))):
            key = (row["variant_order"], row["skip_order"], row[axis], row["variant"], row["skip"])
            values.setdefault(key, {})[at] = number(row[cost.metric], cost.unit, doubtful=row["doubtful"])
            same[key] = row["same_as"]
    rows = [
        (words(VARIANTS[key[3]].title), words(key[4]), whole(key[2]),
         *(cells_at.get(at, number(None, "count")) for at in range(len(costs))), words(same[key]))
        for key, cells_at in sorted(values.items())
    ]  # fmt: skip
    return Grid(columns, tuple(rows))


def tradeoff_context(data: Data) -> dict[str, Any]:
    """Cost against cost, and cost against what it buys."""
    found = [_cost_against_cost(data), _receptive(data), _scores(data)]
    quality = data.quality
    return {"plots": [plot for plot in found if plot], "quality": quality}


_KNOWN = (
    Axis("params", "parameters (counted)", "count"),
    Axis("conv_macs", "MACs (counted)", "macs"),
    Axis("peak_memory_predicted_bytes", "peak memory (predicted)", "bytes"),
)
_LATENCY = Axis("latency_s", "latency (measured)", "seconds")
_AGAINST = (_LATENCY, _KNOWN[2], _KNOWN[1])  # what a gain is paid with


def _pointed(data: Data, rows: pd.DataFrame, up: str, across: tuple[Axis, ...]) -> tuple[pd.DataFrame, list[Axis]]:
    """The rows that have a number `up` and one across, with the doubt of each; and the axes across that any has."""
    rows = rows.dropna(subset=[up])
    present = [axis for axis in across if rows[axis.column].notna().any()]
    rows = rows.dropna(subset=[axis.column for axis in present], how="all") if present else rows
    return rows.assign(**{axis.doubt: data.doubtful(rows, axis.column) for axis in (*_KNOWN, _LATENCY)}), present


def _cost_against_cost(data: Data) -> Plot | None:
    points = data.points(None)
    costs = [axis for axis in (*_KNOWN, _LATENCY) if points[axis.column].notna().any()]
    if len(costs) < 2:  # noqa: PLR2004 - a plot has two sides
        return None
    up = costs[-1]
    rows, across = _pointed(data, points, up.column, tuple(costs[:-1]))
    if len(rows) < 3 or not across:  # noqa: PLR2004 - fewer points are read better in the table
        return None
    axes = [*across, up]
    sound = rows[~doubtful(rows, *axes) & rows["variant"].notna()].dropna(subset=[axis.column for axis in axes])
    ranks = [
        f"{rank_correlation(sound[axis.column], sound[up.column]):.2f} for {METRICS[axis.column].title}"
        for axis in across
        if len(sound) >= LEAST
    ]
    what = up.label.split(" (")[0]
    title = f"{what} against what can be known beforehand"
    title = title[0].upper() + title[1:]
    caption = (
        f"A tight band means that the cost below foretells {what}; a wide one means that it misleads. Rank correlation "
        f"over {len(sound)} points: {', '.join(ranks) or 'too few'}. Lower left is better in every panel, so no front "
        "is drawn."
    )
    if doubtful(rows, *axes).any():
        caption += " Hollow points carry a doubt and are left out of the correlation."
    caption += _own_words(rows)
    described = f"{len(rows)} networks, colour is the variant, shape is the skip scheme"
    svg = scatter(rows, across, up, "cost-cost", (title, described), best=False)
    return Plot("cost-cost", title, svg, caption, _point_table(rows, axes))


def _own_words(rows: pd.DataFrame) -> str:
    if rows["variant"].notna().all():
        return ""
    return " Stars are models that are not of the suite; the correlation leaves them out."


def _front_words(rows: pd.DataFrame, axes: list[Axis]) -> str:
    """What a caption says of doubts: which numbers have them, and that no front rests on one."""
    names = [axis.label.split(" (")[0] for axis in axes if doubtful(rows, axis).any()]
    return f" Hollow points carry a doubt in their {' or '.join(names)} and are on no front by it." if names else ""


def _receptive(data: Data) -> Plot | None:
    reach = Axis("receptive_field", "receptive field, pixels (counted)", "pixels", log=False)
    rows, present = _pointed(data, data.points(None), reach.column, _AGAINST)
    if data.networks(None)["receptive_field"].nunique() < 2 or not present:  # noqa: PLR2004 - a front takes two heights
        return None
    title = "What a receptive field costs"
    caption = (
        "Here the axes pull against each other: up is better, left is cheaper. The dashed front joins the networks "
        "that no other one beats in both; its members are marked in the table. A receptive field is what an output "
        "pixel could see, not what a trained network uses."
    )
    caption += _front_words(rows, present)
    described = f"{len(rows)} networks; the front runs from the cheapest to the one with the largest receptive field"
    svg = scatter(rows, present, reach, "reach", (title, described), best=True)
    return Plot("reach", title, svg, caption, _point_table(rows, [*present, reach], reach))


def _scores(data: Data) -> Plot | None:
    if not data.quality or not data.quality.scores:
        return None
    scores = data.quality.scores
    both = [rows for rows in (data.cells(None), data.own_models(None)) if len(rows)]
    cells = pd.concat(both, ignore_index=True) if both else data.cells(None)
    cells = cells[cells["label"].isin(scores)]
    named = cells["label"]
    cells = cells.assign(
        score=named.map(lambda label: scores[label].mean), low=named.map(lambda label: scores[label].low),
        high=named.map(lambda label: scores[label].high),
    )  # fmt: skip
    rows, present = _pointed(data, cells, "score", _AGAINST)
    if rows.empty or not present:
        return None
    up = Axis("score", f"score ({data.quality.name})", "count", log=False)
    title = "What a score costs"
    caption = (
        f"Scores are the mean over seeds from {data.quality.name}, whiskers their range; they were measured elsewhere "
        "and are taken as given, higher as better. The dashed front joins the networks that no other one beats in both."
    )
    caption += _front_words(rows, present)
    svg = scatter(rows, present, up, "score", (title, f"{len(rows)} networks with a score"), best=True)
    return Plot("score", title, svg, caption, _point_table(rows, [*present, up], up))


def _point_table(rows: pd.DataFrame, axes: list[Axis], gain: Axis | None = None) -> Grid:
    """The points of a scatter plot, doubts marked number by number; with a `gain`, which of them are on which front."""
    costs = [axis for axis in axes if axis is not gain]
    ahead = {axis: set(on_front(rows, axis, gain).index) for axis in costs} if gain else {}
    columns = ("network", *(axis.label for axis in axes), *(["on the front of"] if gain else []), "doubt")
    table = []
    for at, row in zip(rows.index, records(rows), strict=True):
        members = ", ".join(axis.label.split(" (")[0] for axis in costs if at in ahead.get(axis, set()))
        unsure = ", ".join(axis.label.split(" (")[0] for axis in axes if row.get(axis.doubt))
        values = (_value(row, axis) for axis in axes)
        table.append((words(row["label"]), *values, *([words(members)] if gain else []), words(unsure)))
    return Grid(columns, tuple(table))


def _value(row: dict[str, Any], axis: Axis) -> Cell:
    if axis.column == "score":
        return Cell(f"{row['score']:.4f} ({row['low']:.4f} to {row['high']:.4f})", float(row["score"]))
    return number(row[axis.column], axis.unit, doubtful=bool(row.get(axis.doubt)))
