"""The sections of the report. SECTIONS at the bottom is the one place to add one: a row there, a template beside it.

A section's function takes Data and returns what its template, `templates/<name>.html.j2`, shows.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skipcost.bench.cases.record import Result
from skipcost.bench.measure.metrics import METRICS
from skipcost.reports.compare import Matched, Spread, matched
from skipcost.reports.data import BASE, REFERENCE_SKIP, Cost, Data
from skipcost.reports.findings import find
from skipcost.reports.grid import Cell, Grid, whole, words
from skipcost.reports.sections.accuracy import accuracy_context
from skipcost.reports.sections.changes import regressions_context
from skipcost.reports.sections.choose import choose_context
from skipcost.reports.sections.curves import scaling_context, tradeoff_context
from skipcost.reports.sections.kernels import kernels_context
from skipcost.reports.sections.limits import roofline_context
from skipcost.reports.sections.networks import networks_context
from skipcost.reports.sections.others import others_context
from skipcost.reports.sections.provenance import provenance_context
from skipcost.reports.sections.rows import rows_context
from skipcost.unet_models import SKIPS, VARIANTS

NO_REASON = "no reason was recorded"


@dataclass(frozen=True, slots=True)
class Section:
    """A row of SECTIONS; `name` is the section's id in the page and its template's name."""

    name: str
    title: str
    short: str  # for the navigation
    context: Callable[[Data], dict[str, Any]]


def overview_context(data: Data) -> dict[str, Any]:
    """The answer first: variants against U-Net, then every finding, then the skip schemes against none."""
    costs = data.costs
    variants = [name for name in VARIANTS if (data.frame["variant"] == name).any()]
    found = [_matched(data, cost, "variant", variants, BASE, skip=REFERENCE_SKIP) for cost in costs]
    against = [
        (VARIANTS[name].title, [_spread(each, name, BASE) for each in found]) for name in variants if name != BASE
    ]
    schemes = []
    for variant in variants:
        of_variant = [_matched(data, cost, "skip", tuple(SKIPS), "none", variant=variant) for cost in costs]
        rows = [(skip, [_spread(each, skip, "none") for each in of_variant]) for skip in SKIPS if skip != "none"]
        schemes.append((VARIANTS[variant].title, rows))
    return {
        "findings": find(data),
        "costs": costs,
        "base": VARIANTS[BASE].title,
        "reference": REFERENCE_SKIP,
        "against": [(title, row) for title, row in against if any(row)],
        "schemes": [(title, kept) for title, rows in schemes if (kept := [pair for pair in rows if any(pair[1])])],
    }


def _matched(data: Data, cost: Cost, axis: str, names: Sequence[str], needed: str, **fixed: Any) -> Matched | None:
    """What a column of ratios compares, in equal cells; in as few as there are where no findings rest on them."""
    enough = matched(data, cost, axis, names, needed, fixed)
    return enough or matched(data, cost, axis, names, needed, fixed, least=1)


def _spread(found: Matched | None, name: str, base: str) -> Spread | None:
    return found.over(name, base) if found and name in found.table.columns else None


def failures_context(data: Data) -> dict[str, Any]:
    """Every result that is not ok, summed up by reason first, and every number that carries a doubt."""
    failures = data.failures()
    reasons = Counter((result.outcome, result.note) for _, result in failures)
    summary = tuple(
        (words(outcome), words(note or NO_REASON), whole(count)) for (outcome, note), count in sorted(reasons.items())
    )
    return {
        "summary": Grid(("outcome", "why", "results"), summary),
        "failures": _notes(data, failures, "outcome"),
        "doubts": _notes(data, data.doubts(), "doubt"),
        "total": sum(len(results) for results in data.results.values()),
    }


def _notes(data: Data, found: list[tuple[str, Result]], kind: str) -> Grid:
    rows = [
        (words(data.cases[case_id][0].name), words(METRICS[result.metric].title),
         *([words(result.outcome)] if kind == "outcome" else []), words(result.note or NO_REASON))
        for case_id, result in found
    ]  # fmt: skip
    return Grid(("case", "metric", *(["outcome"] if kind == "outcome" else []), "why"), tuple(rows))


def metrics_context(data: Data) -> dict[str, Any]:
    """How each number was made, and what fvcore leaves out."""
    counts = {name: sum(name in results for results in data.results.values()) for name in METRICS}
    rows = [
        (
            Cell(metric.title, note=name),
            words(metric.unit),
            words(metric.origin),
            words(metric.how),
            words(f"above {metric.threshold:.0%}" if metric.threshold else "any change"),
            whole(counts[name]),
        )
        for name, metric in METRICS.items()
    ]
    columns = ("metric", "unit", "origin", "how", "change that counts", "results")
    return {"table": Grid(columns, tuple(rows)), **_fvcore(data)}


def _fvcore(data: Data) -> dict[str, Any]:
    """Operators that fvcore did not count, over all cases, and its total over the exact convolution MACs."""
    missed: dict[str, list[int]] = {}
    shares, equal = [], 0
    for case_id, results in data.results.items():
        theirs, ours = results.get("fvcore_flops"), results.get("conv_macs")
        if theirs is None or ours is None or not (theirs.samples and ours.samples):
            continue
        shares.append(theirs.samples[0] / ours.samples[0] - 1)
        equal += theirs.detail.get("by_operator", {}).get("conv", 0) * data.cases[case_id][0].batch == ours.samples[0]
        for name, count in theirs.detail.get("not_counted", {}).items():
            missed.setdefault(name, []).append(count)
    rows = [
        (words(name), whole(len(counts)), whole(min(counts)), whole(max(counts)))
        for name, counts in sorted(missed.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return {
        "missed": Grid(("operator", "in networks", "times, at least", "at most"), tuple(rows)),
        "shares": (min(shares), statistics.median(shares), max(shares)) if shares else None,
        "equal": equal,
        "compared": len(shares),
    }


SECTIONS: tuple[Section, ...] = (
    Section("choose", "Which network to take", "Choose", choose_context),
    Section("overview", "What was found", "Findings", overview_context),
    Section("regressions", "What a change made costlier", "Changes", regressions_context),
    Section("scaling", "How cost grows", "Scaling", scaling_context),
    Section("tradeoffs", "What is traded for what", "Trade-offs", tradeoff_context),
    Section("networks", "Where in the network the cost is", "Networks", networks_context),
    Section("roofline", "How far from the limits of the device", "Limits", roofline_context),
    Section("kernels", "What fused kernels can win", "Kernels", kernels_context),
    Section("accuracy", "How far predicted GPU memory is off", "Accuracy", accuracy_context),
    Section("others", "Models that are not of the suite", "Other models", others_context),
    Section("rows", "All rows", "All rows", rows_context),
    Section("failures", "Failures and doubts", "Failures", failures_context),
    Section("metrics", "How each number was made", "Metrics", metrics_context),
    Section("provenance", "Provenance", "Provenance", provenance_context),
)
