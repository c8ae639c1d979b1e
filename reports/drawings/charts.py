"""The figures: scaling curves as small multiples, and one number against another. Drawn with seaborn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from skipcost.bench import figures
from skipcost.reports.compare import front
from skipcost.reports.data import Cost
from skipcost.reports.drawings.svg import FAINT, INK, PALETTE, SOFT, drawing_style, to_svg
from skipcost.unet_models import SKIPS, VARIANTS

SKIP_COLOURS = dict(zip(SKIPS, PALETTE * len(SKIPS), strict=False))
VARIANT_COLOURS = dict(zip(VARIANTS, PALETTE * len(VARIANTS), strict=False))
SHAPES = ("o", "s", "^", "X", "D", "v", "P", "*")
SKIP_SHAPES = dict(zip(SKIPS, SHAPES * len(SKIPS), strict=False))
DASHES: tuple[Any, ...] = ("", (4, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 1, 1, 1, 1, 1), (8, 2))
SKIP_DASHES = dict(zip(SKIPS, DASHES * len(SKIPS), strict=False))
MOST_TICKS = 5
LONGEST_NAME = 24  # characters beside a star; the table has the whole
MOST_ENTRIES = 8  # of a legend's line


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of a scatter plot: a column of the frame, its unit, and whether the scale is logarithmic."""

    column: str
    label: str
    unit: str
    log: bool = True

    @property
    def doubt(self) -> str:
        """The column of truth values that says where the number carries a doubt; absent where none can."""
        return f"{self.column} doubtful"


def doubtful(rows: pd.DataFrame, *axes: Axis) -> pd.Series[bool]:
    """Which points have a doubt in any of these of their numbers: a doubt is one number's, not its network's."""
    columns = [axis.doubt for axis in axes if axis.doubt in rows]
    return rows[columns].any(axis="columns").astype(bool)


def on_front(rows: pd.DataFrame, cost: Axis, gain: Axis) -> pd.DataFrame:
    """The points without a doubt in either number that no other one beats in low cost and high gain, cheapest first."""
    sound = rows[~doubtful(rows, cost, gain)].dropna(subset=[cost.column, gain.column])
    return sound.iloc[front(sound[cost.column].tolist(), sound[gain.column].tolist())]


_HALVES = ([1 + at / 16 for at in range(16)], (1, 1.25, 1.5, 1.75), (1, 1.5), (1,))
_LEADS = ([at / 10 for at in range(10, 100)], [at / 2 for at in range(2, 20)], range(1, 10), (1, 2, 5), (1, 3), (1,))


def ticks(low: float, high: float, unit: str, most: int = MOST_TICKS) -> list[float]:
    """Round values for a logarithmic axis, the densest set of at most `most`; bytes in powers of 2."""
    if unit == "bytes":
        powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        sets = [[2.0**power * lead for power in powers for lead in leads] for leads in _HALVES]
        sets += [[2.0**power for power in powers if power % step == 0] for step in (2, 3, 5, 10)]
    else:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        sets = [[10.0**ten * lead for ten in tens for lead in leads] for leads in _LEADS]
        sets += [[10.0**ten for ten in tens if ten % step == 0] for step in (2, 3, 5)]
    inside = [[value for value in values if low <= value <= high] for values in sets]
    return next((values for values in inside if len(values) <= most), inside[-1])


def tick_text(value: float, unit: str) -> str:
    """A tick's label: the value in words, without zeros that say nothing; the axis says that MACs are MACs."""
    text = figures.text(value, "count" if unit == "macs" else unit)
    return re.sub(r"\.0+(?= |$)|(\.\d*?)0+(?= |$)", r"\1", text)


def scaling(long: pd.DataFrame, costs: Sequence[Cost], axis: str, name: str, words: tuple[str, str]) -> Markup:
    """A row of panels per cost, a column per variant, a line per skip scheme; `axis` is depth or width.

    `long` has variant, skip, the axis, `at` (the cost's position), value, low, high and doubtful: doubtful values are
    left out of the line and drawn as hollow points.
    """
    variants = [v for v in VARIANTS if (long["variant"] == v).any()]
    skips = [s for s in SKIPS if (long["skip"] == s).any()]
    with drawing_style():
        drawing, grid = plt.subplots(
            len(costs), len(variants), figsize=(9.2, 1.3 * len(costs) + 0.5), sharex=True, sharey="row", squeeze=False,
            gridspec_kw={"hspace": 0.16, "wspace": 0.06},
        )  # fmt: skip
        for row, cost in enumerate(costs):
            of_cost = long[long["at"] == row]
            for axes, variant in zip(grid[row], variants, strict=True):
                _panel(axes, of_cost[of_cost["variant"] == variant], axis, skips)
            set_log(
                grid[row][0],
                "y",
                (of_cost[["value", "low"]].min().min(), of_cost[["value", "high"]].max().max()),
                cost.unit,
            )
            _name_row(grid[row][0], cost)
        for axes, variant in zip(grid[0], variants, strict=True):
            axes.set_title(VARIANTS[variant].title, loc="left", fontweight="bold")
        for axes in grid[-1]:
            axes.set_xlabel("depth" if axis == "depth" else "width, channels at level 0")
        _whole_ticks(grid[0][0], sorted(set(long[axis])), log=axis == "width")
        _legend(grid[0][0], [(skip, SKIP_COLOURS[skip], SKIP_SHAPES[skip], SKIP_DASHES[skip]) for skip in skips], 1.24)
        return to_svg(drawing, name, *words)


def _name_row(axes: Axes, cost: Cost) -> None:
    for text, colour, above in ((cost.word, INK, 2), (cost.origin, SOFT, -9)):
        axes.annotate(text, (0, 0.5), xytext=(-46, above), xycoords="axes fraction", textcoords="offset points",
                      ha="right", color=colour)  # fmt: skip


def _panel(axes: Axes, rows: pd.DataFrame, axis: str, skips: list[str]) -> None:
    sound, doubtful = rows[~rows["doubtful"]], rows[rows["doubtful"]]
    for skip in skips:
        spread = sound[sound["skip"] == skip].dropna(subset=["low"]).sort_values(axis)
        axes.fill_between(
            spread[axis], spread["low"], spread["high"], color=SKIP_COLOURS[skip], alpha=0.13, linewidth=0
        )
        odd = doubtful[doubtful["skip"] == skip]
        axes.plot(odd[axis], odd["value"], SKIP_SHAPES[skip], markersize=4, fillstyle="none", color=SKIP_COLOURS[skip],
                  markeredgewidth=0.8)  # fmt: skip
    axes.set(xlabel="", ylabel="", title="")
    if sound.empty:
        return
    sns.lineplot(
        sound, x=axis, y="value", hue="skip", style="skip", hue_order=skips, style_order=skips, palette=SKIP_COLOURS,
        markers=SKIP_SHAPES, dashes=SKIP_DASHES, markersize=5, markeredgewidth=0, linewidth=1.4, errorbar=None,
        legend=False, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="", ylabel="", title="")


def set_log(axes: Axes, side: str, span: tuple[float, float], unit: str, most: int = MOST_TICKS) -> None:
    """Make one side logarithmic with ticks in readable units."""
    room = (span[1] / span[0]) ** 0.07 if span[1] > span[0] else 1.3
    low, high = span[0] / room, span[1] * room
    at = ticks(low, high, unit, most)
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    axes.set(**{f"{side}ticks": at, f"{side}ticklabels": [tick_text(value, unit) for value in at]})
    getattr(axes, f"{side}axis").set_minor_locator(NullLocator())


def _whole_ticks(axes: Axes, values: list[int], *, log: bool) -> None:
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    room = (values[-1] - values[0]) * 0.08 or 0.5
    axes.set_xlim(*((values[0] / 1.2, values[-1] * 1.2) if log else (values[0] - room, values[-1] + room)))


def _legend(axes: Axes, entries: list[tuple[str, str, str, Any]], above: float) -> None:
    """A line of (label, colour, shape, dashes) over the first panel; two lines where there are many."""
    handles = []
    for label, colour, shape, dashes in entries:
        line = Line2D([], [], color=colour, marker=shape, markersize=5, markeredgewidth=0, linewidth=1.4, label=label)
        if dashes is None:
            line.set_linestyle("none")
        elif dashes:
            line.set_dashes(dashes)
        handles.append(line)
    columns = len(handles) if len(handles) <= MOST_ENTRIES else -(-len(handles) // 2)
    length = 2.4 if entries[0][3] is not None else 1.0
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, above), ncols=columns, handlelength=length,
                handletextpad=0.5, columnspacing=1.4, borderaxespad=0, borderpad=0)  # fmt: skip


def scatter(
    rows: pd.DataFrame, across: Sequence[Axis], up: Axis, name: str, words: tuple[str, str], *, best: bool
) -> Markup:
    """A panel per axis of `across`, sharing `up`; colour is the variant, shape the skip scheme, hollow is doubtful.

    A panel shows the rows that have its two numbers, hollow where one of these carries a doubt. Rows without a variant
    are models that are not of the suite: stars, with their names. `best` draws the front of low cost and high `up`.
    Columns `low` and `high`, if there, are the range of `up`.
    """
    variants = [v for v in VARIANTS if (rows["variant"] == v).any()]
    skips = [s for s in SKIPS if (rows["skip"] == s).any()]
    with drawing_style():
        drawing, grid = plt.subplots(
            1, len(across), figsize=(9.2, 3.0), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08}
        )
        for axes, axis in zip(grid[0], across, strict=True):
            here = rows.dropna(subset=[axis.column, up.column])
            _points(axes, here, axis, up, variants)
            _stars(axes, here[here["variant"].isna()], axis, up)
            if best:
                _front_line(axes, here, axis, up)
            axes.set(title="", xlabel=axis.label, ylabel="")
        if up.log:
            set_log(grid[0][0], "y", (rows[up.column].min(), rows[up.column].max()), up.unit)
        grid[0][0].set_ylabel(up.label)
        entries: list[tuple[str, str, str, Any]] = [
            (VARIANTS[v].title, VARIANT_COLOURS[v], "o", None) for v in variants
        ]
        entries += [(skip, INK, SKIP_SHAPES[skip], None) for skip in skips]
        entries += [("not of the suite", INK, "*", None)] if rows["variant"].isna().any() else []
        _legend(grid[0][0], [*entries, *([("front", INK, "", (2, 1.5))] if best else [])], 1.04)
        return to_svg(drawing, name, *words)


def _points(axes: Axes, rows: pd.DataFrame, axis: Axis, up: Axis, variants: list[str]) -> None:
    skips = [s for s in SKIPS if (rows["skip"] == s).any()]
    if "low" in rows:
        axes.vlines(rows[axis.column], rows["low"], rows["high"], color=FAINT, linewidth=0.8)
    unsure = doubtful(rows, axis, up)
    for (variant, skip), odd in rows[unsure].groupby(["variant", "skip"], sort=True):
        axes.plot(odd[axis.column], odd[up.column], SKIP_SHAPES[str(skip)], markersize=4, fillstyle="none",
                  color=VARIANT_COLOURS[str(variant)], markeredgewidth=0.7)  # fmt: skip
    sound = rows[~unsure & rows["variant"].notna()]
    if len(sound):
        sns.scatterplot(
            sound, x=axis.column, y=up.column, hue="variant", style="skip", hue_order=variants, style_order=skips,
            palette=VARIANT_COLOURS, markers=SKIP_SHAPES, s=26, linewidth=0, legend=False, ax=axes,
        )  # fmt: skip
    if axis.log:
        set_log(axes, "x", (rows[axis.column].min(), rows[axis.column].max()), axis.unit, 4)


def _stars(axes: Axes, rows: pd.DataFrame, axis: Axis, up: Axis) -> None:
    for row in rows.assign(doubtful=doubtful(rows, axis, up)).to_dict("records"):
        at = (row[axis.column], row[up.column])
        style = "none" if row["doubtful"] else "full"
        axes.plot(*at, "*", markersize=8, fillstyle=style, color=INK, markeredgewidth=0.7, zorder=3)
        name = str(row["label"]).partition("(")[0].rpartition(":")[2]
        right = (axes.transScale + axes.transLimits).transform(at)[0] > 0.5  # noqa: PLR2004 - of the panel's width
        name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\u2026"
        axes.annotate(name, at, xytext=(-4 if right else 4, 4), textcoords="offset points", fontsize=8, color=INK,
                      ha="right" if right else "left")  # fmt: skip


def _front_line(axes: Axes, rows: pd.DataFrame, axis: Axis, up: Axis) -> None:
    kept = on_front(rows, axis, up)
    axes.step(kept[axis.column], kept[up.column], where="post", color=INK, linewidth=1, dashes=(2, 1.5), zorder=1)
