"""The context of the choice: its form's fields, and for who has no script the best network at a row of round limits.

The best is the one with the highest score, where somebody brought scores; else the one that sees farthest, the
receptive field, then the widest; of equal ones that with the fewest MACs. That is the order of `skipcost fit`, over the
networks that were measured. Without scores nothing tells what a skip scheme is worth, and the cheapest would win, which
is none at all: so only the papers' own is chosen from, until the reader allows all. With a script, `choose.js` answers
the reader's own limits by the same order, from the rows that the page carries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from skipcost.bench import figures
from skipcost.reports.data import COSTS, REFERENCE_SKIP, Cost, Data, records
from skipcost.reports.grid import Cell, Grid, number, words
from skipcost.unet_models import SKIPS, VARIANTS

LEAST = 3  # networks; fewer are read better in the table of all rows
MOST = 8  # limits in a table
MEMORY = ("peak_memory_allocated_bytes", "peak_memory_predicted_bytes")  # what a device said comes first
FIGURES = ("conv_macs", "params")  # beside what is limited
SHAPES = ("disc", "square", "triangle", "thick cross", "diamond", "hanging triangle")  # of plot.js, as in the figures
FINE = (1, 2, 5)  # times powers of ten


@dataclass(frozen=True, slots=True)
class Choice:
    """A table of the best networks under limits on one cost."""

    cost: Cost
    setting: str
    table: Grid


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the form: a cost that the reader may limit. `key` is its name in the address of a view."""

    key: str
    title: str
    cost: Cost
    example: str  # a limit as people write it, which some networks here keep


def choose_context(data: Data) -> dict[str, Any]:
    """The form's fields; a table for memory and one for latency, at inference and in training, of what has rows."""
    choices = [found for mode in data.settings for cost in _limited(data, mode) if (found := _choice(data, cost))]
    fields = [field for cost in _asked(data) if (field := _field(data, cost))]
    keys = [field.key for field in fields]
    schemes = set(data.frame["skip"])
    return {
        "choices": choices,
        "scores": data.quality.name if data.quality else "",
        "reference": REFERENCE_SKIP,
        "fields": fields,
        "across": "latency" if "latency" in keys else next(iter(keys), ""),
        "settings": data.settings,
        "variants": {name: VARIANTS[name].title for name in VARIANTS},
        "skips": list(SKIPS),
        "shapes": dict(zip(SKIPS, SHAPES, strict=True)),
        "others": bool(len(data.own)),
        "schemes": [name for name in SKIPS if name in schemes],
    }


def _asked(data: Data) -> Iterator[Cost]:
    """The costs that a reader may limit, in the order of the form."""
    by_mode = [list(_limited(data, mode)) for mode in data.settings]
    yield from sorted((cost for costs in by_mode for cost in costs), key=lambda cost: cost.metric == "latency_s")
    yield from (cost for cost in COSTS if cost.metric in FIGURES and cost in data.costs)


def _field(data: Data, cost: Cost) -> Field | None:
    """A cost's field; None where too few networks have it."""
    values = sorted(data.points(cost.mode)[cost.metric].dropna())
    if len(values) < LEAST or values[0] <= 0:
        return None
    limits = _limits(values[0], values[-1], cost.unit)
    text = figures.text(limits[len(limits) // 2], cost.unit, 4)  # with four digits no minutes, which nobody types
    example = re.sub(r"\.0+(?= )| |MAC", "", text)
    title = f"{cost.word} at inference" if cost.mode == "inference" else cost.word
    return Field(cost.word.replace(" ", "-"), title, cost, example)


def _limited(data: Data, mode: str) -> Iterator[Cost]:
    """The costs that a table limits: memory, allocated where a device told it, and time."""
    here = {cost.metric: cost for cost in COSTS if cost.mode == mode and cost in data.costs}
    yield from [here[name] for name in MEMORY if name in here][:1]
    yield from [here["latency_s"]] if "latency_s" in here else []


def _choice(data: Data, cost: Cost) -> Choice | None:
    networks = data.networks(cost.mode)
    known = networks[networks[cost.metric].notna() & networks["receptive_field"].notna()]
    known = known[~data.doubtful(known, cost.metric)]
    if data.quality is None:
        known = known[known["skip"] == REFERENCE_SKIP]
    if len(known) < LEAST:
        return None
    rank = _rank(data)
    rows = sorted(records(known), key=lambda row: (row[cost.metric], rank(row)))
    shown = [cost, *(each for each in _limited(data, str(cost.mode)) if each != cost)]
    shown += [each for each in COSTS if each.metric in FIGURES and each in data.costs]
    doubts = {each.metric: set(networks["case_id"][data.doubtful(networks, each.metric)]) for each in shown}
    limits = _limits(rows[0][cost.metric], rows[-1][cost.metric], cost.unit)
    best = [(limit, max((row for row in rows if row[cost.metric] <= limit), key=rank)) for limit in limits]
    lines = []
    for limit, row in _where_it_changes(best):
        costs = [number(row[each.metric], each.unit, doubtful=row["case_id"] in doubts[each.metric]) for each in shown]
        sees = Cell(figures.text(row["receptive_field"], "pixels"), float(row["receptive_field"]))
        ends = [*([_score(data, row)] if data.quality else []), words(_next(rows, row, cost))]
        lines.append((number(limit, cost.unit), words(row["label"]), *costs, sees, *ends))
    heads = ("at most", "best network", *(each.word for each in shown), "sees", *(["score"] if data.quality else []))
    return Choice(cost, data.settings[str(cost.mode)], Grid((*heads, "one step more"), tuple(lines)))


def _rank(data: Data) -> Callable[[dict[str, Any]], tuple[float, ...]]:
    """What makes a network the better one: its score, how far it sees, its width; then that it does less."""
    scores = data.quality.scores if data.quality else {}

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        score = scores[row["label"]].mean if row["label"] in scores else -math.inf
        less = [-row[name] if pd.notna(row[name]) else -math.inf for name in FIGURES]
        return (score, row["receptive_field"], row["width"], *less)

    return rank


def _score(data: Data, row: dict[str, Any]) -> Cell:
    known = data.quality.scores.get(row["label"]) if data.quality else None
    return Cell(f"{known.mean:.4g}", known.mean) if known else Cell("\u2013", math.inf)


def _limits(low: float, high: float, unit: str) -> list[float]:
    """Round limits from the first that any network keeps to the first that all keep: doubles, or 1, 2, 5 and 10."""
    if unit == "bytes":
        first = math.ceil(math.log2(low))
        steps = [2.0**power for power in range(first, math.ceil(math.log2(high)) + 1)]
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [fine * 10.0**power for power in powers for fine in FINE]
    kept = [step for step in steps if step >= low]
    return [step for at, step in enumerate(kept) if not at or kept[at - 1] < high]


def _where_it_changes(best: list[tuple[float, dict[str, Any]]]) -> list[tuple[float, dict[str, Any]]]:
    """The lines whose network is another one than at the limit before, the last ones where there are many."""
    changed = [each for at, each in enumerate(best) if not at or each[1]["label"] != best[at - 1][1]["label"]]
    return changed[-MOST:]


def _next(rows: list[dict[str, Any]], row: dict[str, Any], cost: Cost) -> str:
    """What the next wider and the next deeper network of the same kind take, in words."""
    told = []
    for axis, word in (("width", "wider"), ("depth", "deeper")):
        alike = [name for name in ("variant", "depth", "width", "skip") if name != axis]
        more = [each for each in rows if each[axis] > row[axis] and all(each[name] == row[name] for name in alike)]
        if more:
            after = min(more, key=lambda each: each[axis])
            told.append(f"{word} ({axis} {after[axis]:.0f}): {figures.text(after[cost.metric], cost.unit)}")
    return "; ".join(told)
