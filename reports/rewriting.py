"""Findings on `backend=rewritten`: what exact algebra would save in the networks of a store, and what it did save."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from skipcost.bench.cases import CASE_KEYS
from skipcost.kernels.tap_choice import executed_macs
from skipcost.reports.compare import Spread, times
from skipcost.reports.data import REFERENCE_SKIP, Cost, Data, records
from skipcost.reports.sentences import Finding, Number, Part, listed, plural
from skipcost.unet_models import VARIANTS

MEASURED = (
    Cost("latency_s", "inference", "latency"),
    Cost("latency_s", "training", "training step"),
    Cost("peak_memory_predicted_bytes", "inference", "memory"),
    Cost("peak_memory_predicted_bytes", "training", "training memory"),
    Cost("peak_memory_allocated_bytes", "inference", "allocated memory"),
    Cost("peak_memory_allocated_bytes", "training", "allocated training memory"),
)
SAME = [name for name in (*CASE_KEYS, "label") if name != "backend"]


def rewriting_saves(data: Data) -> Iterator[Finding]:
    """Per variant: the share of MACs that is left, counted, and of costs where both backends were measured."""
    for variant, entry in VARIANTS.items():
        counted = _counted(data, variant)
        if counted is None:
            continue
        parts: tuple[Part, ...] = (
            f"{entry.title} is the same function with ", Number(times(counted.median), "counted", counted.span),
            " of its MACs as backend=rewritten runs it at inference.",
        )  # fmt: skip
        found = [(cost, spread) for cost in MEASURED if (spread := _pairs(data, variant, cost))]
        if found:
            items: list[list[Part]] = [
                [Number(times(spread.median), cost.origin, spread.span), f" the {cost.word}"] for cost, spread in found
            ]
            parts += (" Beside eager it takes ", *listed(items), ".")
        pairs = f", and {plural(max(spread.cells for _, spread in found), 'pair')} of cells" if found else ""
        yield Finding(
            "Exact algebra",
            parts,
            f"median and range over {plural(counted.cells, 'network')}, skip {REFERENCE_SKIP}{pairs}",
        )


def _counted(data: Data, variant: str) -> Spread | None:
    """Executed MACs over those of the definition, in networks of the papers' own skips with something to rewrite."""
    shares = []
    for row in records(data.networks(None).dropna(subset=["conv_macs"])):
        case, _ = data.cases[row["case_id"]]
        if (row["variant"], row["skip"]) == (variant, REFERENCE_SKIP):
            graph = case.graph()
            macs = case.batch * graph.conv_macs(case.height, case.width)
            executed = executed_macs(
                graph, case.height, case.width, batch=case.batch, precision=case.precision, device=case.device
            )
            shares.append(executed / macs)
    less = pd.Series([share for share in shares if share < 1], dtype=float)
    return Spread.of(less) if len(less) else None


def _pairs(data: Data, variant: str, cost: Cost) -> Spread | None:
    """A cost as rewritten over the same as eager, in all settings that have both, without failures and doubts."""
    rows = data.sound[(data.sound["variant"] == variant) & (data.sound["mode"] == cost.mode)]
    rows = rows[rows["same_as"] == ""].dropna(subset=[cost.metric])
    over, under = (rows[rows["backend"] == name].set_index(SAME)[cost.metric] for name in ("rewritten", "eager"))
    found = (over / under).dropna()
    return Spread.of(found) if len(found) else None
