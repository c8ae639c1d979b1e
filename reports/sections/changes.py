"""The section on changes: what `skipcost gate` and `skipcost ab` said, how sure, and how far a latency verdict goes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from skipcost.bench.compare.verdicts import VERDICTS, Verdict, sentence
from skipcost.reports.data import Data
from skipcost.reports.drawings.svg import FAINT, INK, PALETTE, SOFT, drawing_style, to_svg
from skipcost.reports.grid import Cell, Grid, Plot, words

SELF_TEST = Path(__file__).parents[1] / "published" / "self-test.json"  # written by `skipcost ab --self-test --json`
COLOURS = {"regressed": PALETTE[1], "improved": PALETTE[2], "inconclusive": FAINT}
PIXELS_A_CASE = 0.2  # inches


def regressions_context(data: Data) -> dict[str, Any]:
    """Every verdict that is not "unchanged", those that fail first; the latencies drawn; the self-test's table."""
    notable = sorted(
        (each for each in data.verdicts if each.verdict != "unchanged"), key=lambda each: (not each.fails, -_size(each))
    )
    timed = [each for each in data.verdicts if each.metric == "latency_s" and each.ratio and each.interval]
    columns = ("case", "metric", "base", "now", "change", "verdict", "where it comes from")
    return {
        "sentence": sentence(data.verdicts),
        "given": bool(data.verdicts),
        "fails": sum(each.fails for each in data.verdicts),
        "notable": Grid(columns, tuple(map(_row, notable))),
        "meanings": [(word, VERDICTS[word]) for word in dict.fromkeys(each.verdict for each in notable)],
        "plot": _plot(timed) if timed else None,
        "self_test": _self_test(json.loads(SELF_TEST.read_text())) if SELF_TEST.exists() else None,
    }


def _size(each: Verdict) -> float:
    """How large a change is, either way; one without two numbers comes first."""
    if each.ratio:
        return abs(math.log(each.ratio))
    if each.base and each.now:
        return abs(math.log(each.now / each.base))
    return math.inf


def _row(each: Verdict) -> tuple[Cell, ...]:
    case, metric, base, now, change, verdict, why = each.cells()
    return (
        words(case),
        words(metric),
        Cell(base, each.base if each.base is not None else math.inf),
        Cell(now, each.now if each.now is not None else math.inf),
        Cell(change or "\u2013", _size(each)),
        words(verdict),
        words(why),
    )


def _plot(timed: Sequence[Verdict]) -> Plot:
    """Every latency's change with its interval, in the order of the cases."""
    with drawing_style():
        drawing, axes = plt.subplots(figsize=(6.6, 0.6 + PIXELS_A_CASE * len(timed)))
        axes.axvline(0, color=SOFT, linewidth=0.8)
        for at, each in enumerate(timed):
            assert each.ratio
            assert each.interval
            colour = COLOURS.get(each.verdict, INK)
            low, high = (100 * (end - 1) for end in each.interval)
            axes.plot([low, high], [at, at], color=colour, linewidth=1.4)
            axes.plot([100 * (each.ratio - 1)], [at], marker="o", markersize=4.5, color=colour)
        axes.set_yticks(range(len(timed)), [each.case for each in timed])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.set_xlabel("change of latency, %")
        axes.yaxis.grid(visible=False)
        told = f"{len(timed)} cases; {sum(each.verdict == 'regressed' for each in timed)} regressed"
        svg = to_svg(drawing, "changes", "Change of latency by case", told)
    table = Grid(
        ("case", "change", "verdict"),
        tuple((words(each.case), Cell(each.change, each.ratio), words(each.verdict)) for each in timed),
    )
    caption = (
        "Measured in turns by both revisions, so that drift falls on both. A line is the 95 % interval of a case's "
        "change; a verdict takes more: beyond the floor, at one error rate for all cases, and again on fresh processes."
    )
    return Plot("changes", "Latency, now over base", svg, caption, table)


def _self_test(stored: dict[str, Any]) -> dict[str, Any]:
    """The table of a stored self-test, and the machine and the rules that it holds for."""
    rows = []
    for each in stored["findings"]:
        low, high = each["interval"]
        share, unit = each["found"] / each["trials"], "cases" if each["slowdown"] else "runs"
        rows.append((
            words("equal code" if each["slowdown"] == 0 else f"+{each['slowdown']:.0%}"),
            Cell(f"{each['found']} of {each['trials']} {unit}", float(each["found"])),
            Cell(f"{share:.1%}", share),
            Cell(f"{low:.1%} to {high:.1%}", low),
            Cell(f"{each['seconds']:.0f} s", each["seconds"]),
        ))  # fmt: skip
    return {
        "table": Grid(("injected", "called changed", "share", "95 % interval", "time a case"), tuple(rows)),
        "machine": f"{stored['cpu']}, {stored['cpus']} CPUs, torch {stored['torch']}",
        "day": stored["day"],
        "cases": stored["cases"],
        "rules": stored["rules"],
    }
