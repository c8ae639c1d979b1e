"""Comparisons of cells that differ in one thing alone: everything that is compared is compared in the same cells.

Sentences are made of words and numbers with where they come from. A front of Pareto is drawn only for axes that pull
against each other: two costs have no front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

import pandas as pd

from skipcost.reports.data import AXES, Cost, Data

TIMES = "\u00d7"
LEAST = 5  # cells: if nothing differed, five of five would favour one side once in 32 times, four of four once in 16


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a sentence, marked as counted, predicted or measured; `span` is its range, where it has one."""

    text: str
    origin: str
    span: str = ""


Part = str | Number


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence or a few; `basis` says which rows they rest on, `anchor` is the id of the figure or table of them."""

    topic: str
    parts: tuple[Part, ...]
    basis: str
    anchor: str

    @property
    def text(self) -> str:
        """The sentence as plain text, the origin behind each number."""
        words = [part if isinstance(part, str) else f"{part.text}{part.span} [{part.origin}]" for part in self.parts]
        return f"{self.topic}: {''.join(words)} ({self.basis})"


def listed(items: list[list[Part]]) -> list[Part]:
    """Join with commas and a final "and"."""
    parts: list[Part] = []
    for at, item in enumerate(items):
        if at:
            parts.append(" and " if at == len(items) - 1 else ", ")
        parts += item
    return parts


def plural(count: int, what: str = "matched cell") -> str:
    """Count things in words."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def times(value: float) -> str:
    """A ratio with three significant figures: 0.87, 1.94, 12.3, 104, each with the multiplication sign."""
    return f"{value:.0f}{TIMES}" if value >= 100 else f"{value:#.3g}{TIMES}"  # noqa: PLR2004 - three figures


@dataclass(frozen=True, slots=True)
class Spread:
    """Ratios of matched cells."""

    median: float
    low: float
    high: float
    cells: int

    @classmethod
    def of(cls, values: pd.Series[float]) -> Self:
        """Summarise at least one ratio."""
        return cls(float(values.median()), float(values.min()), float(values.max()), len(values))

    @property
    def range(self) -> str:
        """The lowest and the highest."""
        return f"{times(self.low)} to {times(self.high)}"

    @property
    def span(self) -> str:
        """The range in brackets; empty where it says no more than the median."""
        return "" if times(self.low) == times(self.high) else f" ({self.range})"

    @property
    def either_way(self) -> bool:
        """Whether some cells have more and some less."""
        return self.low < 1 < self.high


@dataclass(frozen=True, slots=True)
class Matched:
    """A cost of two or more alternatives, in the cells where each of them has a number without a doubt.

    `table` has a row per cell and a column per alternative, in base units; `left_out` are alternatives that were
    asked for and have too few numbers in common with the others; `where` is the device and the backend of all of them.
    """

    cost: Cost
    table: pd.DataFrame
    where: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def basis(self) -> tuple[object, ...]:
        """What is equal for costs that may stand in one sentence: cells, alternatives, device and backend."""
        return frozenset(self.table.index), tuple(self.table.columns), self.left_out, self.where

    def over(self, top: str, bottom: str) -> Spread:
        """One alternative over another, cell by cell."""
        return Spread.of(self.table[top] / self.table[bottom])

    def least(self, names: Sequence[str]) -> tuple[list[str], bool]:
        """Which of `names` no other undercuts in any cell, several where they are equal in all, and True.

        Where there is none: all that nothing undercuts in some cell, and False, since they cannot be told apart.
        """
        costs = self.table[list(names)]
        lowest = costs.eq(costs.min(axis="columns"), axis="index")
        always = [name for name in names if lowest[name].all()]
        return (always, True) if always else ([name for name in names if lowest[name].any()], False)


def matched(
    data: Data, cost: Cost, axis: str, names: Sequence[str], needed: str, fixed: dict[str, str], least: int = LEAST
) -> Matched | None:
    """A cost of as many of `names` along `axis` as have `least` cells in common, `needed` among them; None for fewer.

    The cells are those of the cost's main setting with the `fixed` values, without doubts and failures. Of several sets
    of as many alternatives, it is the one with most cells, then the first in the order of `names`.
    """
    cells = data.cells(cost.mode, sound=True)
    for name, value in fixed.items():
        cells = cells[cells[name] == value]
    asked, cells = set(cells[axis]), cells.dropna(subset=[cost.metric])
    rest = [name for name in AXES if name != axis]
    table = cells.pivot(index=rest, columns=axis, values=cost.metric)  # noqa: PD010 - two of one cell are no average
    known = table.notna()
    others = [name for name in names if name in table.columns and name != needed]
    for count in range(len(others) if needed in table.columns else 0, 0, -1):
        some = max(combinations(others, count), key=lambda some: int(known[[needed, *some]].to_numpy().all(1).sum()))
        common = table[[needed, *some]].dropna()
        if len(common) >= least:
            left_out = tuple(name for name in names if name in asked and name not in common.columns)
            return Matched(cost, common, where_of(cells), left_out)
    return None


def where_of(cells: pd.DataFrame) -> tuple[str, ...]:
    """The device and the backend of cells of one setting; empty of none."""
    return tuple(str(cells[name].iloc[0]) for name in ("device", "backend")) if len(cells) else ()


def together(found: Iterable[Matched | None]) -> list[list[Matched]]:
    """Costs in groups of equal cells, in the order of the first of each: a group is a sentence."""
    groups: dict[tuple[object, ...], list[Matched]] = {}
    for each in found:
        if each is not None:
            groups.setdefault(each.basis, []).append(each)
    return list(groups.values())


def depth_steps(data: Data, cost: Cost) -> Matched | None:
    """A cost at depth d+1 beside depth d, all else equal."""
    return _steps(data, cost, lambda cells: cells.assign(depth=cells["depth"] - 1))


def width_doublings(data: Data, cost: Cost) -> Matched | None:
    """A cost at twice the width beside the width, all else equal."""
    return _steps(data, cost, lambda cells: cells.assign(width=cells["width"] / 2))


def _steps(data: Data, cost: Cost, move: Callable[[pd.DataFrame], pd.DataFrame]) -> Matched | None:
    cells = data.networks(cost.mode, sound=True).dropna(subset=[cost.metric])
    over, under = (each.set_index(list(AXES))[cost.metric] for each in (move(cells), cells))
    return pairs_of(cost, over, under, cells)


def pairs_of(cost: Cost, over: pd.Series[float], under: pd.Series[float], cells: pd.DataFrame) -> Matched | None:
    """Pairs of equal index, as the alternatives "over" and "under"; None where they are too few."""
    values = pd.concat({"over": over, "under": under}, axis="columns", join="inner")
    return Matched(cost, values, where_of(cells)) if len(values) >= LEAST else None


def ratio(spread: Spread, origin: str) -> Number:
    """A ratio of a sentence: median and range; where that has 1 in it the range alone, a median would hide it."""
    return Number(spread.range, origin) if spread.either_way else Number(times(spread.median), origin, spread.span)


def range_words(group: list[Matched], top: str, bottom: str) -> list[Part]:
    """The ratio of two alternatives by every cost of a group."""
    return listed([_range(each, top, bottom) for each in group])


def _range(each: Matched, top: str, bottom: str) -> list[Part]:
    """One cost's; where some cells have more and some less, the depths at which, or that it is so."""
    spread, cost = each.over(top, bottom), each.cost
    if not spread.either_way:
        return [ratio(spread, cost.origin), f" the {cost.word}"]
    if cost.origin == "measured":
        return [f"a {cost.word} that cannot be told apart (", ratio(spread, cost.origin), ")"]
    ratios = each.table[top] / each.table[bottom]
    depths = {str(depth): Spread.of(some) for depth, some in ratios.groupby(level="depth", sort=True)}
    if any(some.either_way for some in depths.values()):
        return [ratio(spread, cost.origin), f" the {cost.word}, more in some cells and less in others"]
    by_depth: list[list[Part]] = [[ratio(some, cost.origin), f" at depth {depth}"] for depth, some in depths.items()]
    return [f"{cost.word} either way by depth (", *listed(by_depth), ")"]


def front(costs: Sequence[float], benefits: Sequence[float]) -> list[int]:
    """Positions of the points that no other point beats, cheapest first.

    A point beats another if it costs no more, gives no less, and is better in one of the two. Equal points do not
    beat each other, so all of them are on the front or none is.
    """
    kept: list[int] = []
    for at in sorted(range(len(costs)), key=lambda each: (costs[each], -benefits[each], each)):
        last = kept[-1] if kept else None
        if last is None or benefits[at] > benefits[last] or (costs[at], benefits[at]) == (costs[last], benefits[last]):
            kept.append(at)
    return kept
