"""Ratios between cells that differ in one thing alone: median, range, and how many cells there were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pandas as pd

from skipcost.reports.data import AXES

TIMES = "\u00d7"


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
    def span(self) -> str:
        """The range in brackets; empty where it says no more than the median."""
        low, high = times(self.low), times(self.high)
        return "" if low == high else f" ({low} to {high})"


def ratios(cells: pd.DataFrame, metric: str, axis: str, top: str, bottom: str, **fixed: str) -> Spread | None:
    """The metric at axis=top over axis=bottom, matched on the other axes; None where no cell has both."""
    rest = [name for name in AXES if name != axis]
    known = cells.dropna(subset=[metric])
    for name, value in fixed.items():
        known = known[known[name] == value]
    over = known[known[axis] == top].set_index(rest)[metric]
    under = known[known[axis] == bottom].set_index(rest)[metric]
    found = (over / under).dropna()
    return Spread.of(found) if len(found) else None


def depth_steps(cells: pd.DataFrame, metric: str) -> Spread | None:
    """The metric at depth d+1 over depth d, all else equal."""
    return _steps(cells.assign(depth=cells["depth"] - 1), cells, metric)


def width_doublings(cells: pd.DataFrame, metric: str) -> Spread | None:
    """The metric at twice the width over the width, all else equal."""
    return _steps(cells.assign(width=cells["width"] / 2), cells, metric)


def _steps(moved: pd.DataFrame, cells: pd.DataFrame, metric: str) -> Spread | None:
    over, under = (each.dropna(subset=[metric]).set_index(list(AXES))[metric] for each in (moved, cells))
    found = (over / under).dropna()
    return Spread.of(found) if len(found) else None
