"""The section on predicted GPU memory: how far it was from what the card reported, row by row where it was furthest."""

from __future__ import annotations

from typing import Any

from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.predictions.accuracy import (
    AIM_MEAN,
    AIM_NETWORKS,
    AIM_UNDER,
    AIM_WORST,
    Comparison,
    Summary,
    compare,
    device_of,
)
from skipcost.reports.data import Data
from skipcost.reports.grid import Cell, Grid, number, whole, words

WORST_ROWS = 10


def accuracy_context(data: Data) -> dict[str, Any]:
    """The error table of the newest environment, and the rows furthest off; a plain sentence where there are none."""
    cases = {case_id: case for case_id, (case, _) in data.cases.items()}
    found = compare(cases, data.results, device_of(data.run))
    heads = ("figure", "rows", "networks", "mean error", "worst", "rows under", "most under", "rows inside", "aim")
    return {
        "why_none": found.why_none,
        "device": device_of(data.run),
        "aim": {"mean": AIM_MEAN, "worst": AIM_WORST, "under": AIM_UNDER, "networks": AIM_NETWORKS},
        "table": Grid(heads, tuple(_row(each) for each in found.summaries())),
        "worst": Grid(
            ("case", "figure", "predicted", "at least", "at most", "measured", "error"),
            tuple(_worst(each) for each in found.worst(WORST_ROWS)),
        ),
        "left_out": Grid(
            ("figures", "why they were not compared"),
            tuple((whole(count), words(reason)) for reason, count in found.left_out.items()),
        ),
    }


def _row(each: Summary) -> tuple[Cell, ...]:
    return (
        words(METRICS[each.metric].title),
        whole(each.rows),
        whole(each.networks),
        Cell(f"{each.mean:.1%}", each.mean),
        Cell(f"{each.worst:+.1%}", each.worst),
        Cell(f"{each.under:.0%}", each.under),
        Cell(f"{each.most_under:.1%}", each.most_under),
        Cell(f"{each.inside:.0%}", each.inside),
        words(each.verdict),
    )


def _worst(each: Comparison) -> tuple[Cell, ...]:
    sizes = (each.predicted, each.low, each.high, each.measured)
    return (
        words(each.case.name),
        words(METRICS[each.metric].title),
        *(number(size, "bytes") for size in sizes),
        Cell(f"{each.error:+.1%}", each.error),
    )
