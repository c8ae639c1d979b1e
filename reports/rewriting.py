"""Findings on `backend=rewritten`: what exact algebra would save in the networks of a store, and what it did save."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from skipcost.bench.cases.case import CASE_KEYS
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.reports.compare import LEAST, Matched, Spread, pairs_of, range_words, times, together
from skipcost.reports.data import REFERENCE_SKIP, Cost, Data, records
from skipcost.reports.sentences import Finding, Number, Part, plural
from skipcost.unet_models import VARIANTS

MEASURED = (
    Cost("latency_s", "inference", "latency"),
    Cost("latency_s", "training", "training step"),
    Cost("peak_memory_predicted_bytes", "inference", "memory"),
    Cost("peak_memory_predicted_bytes", "training", "training memory"),
    Cost("peak_memory_allocated_bytes", "inference", "allocated memory"),
    Cost("peak_memory_allocated_bytes", "training", "allocated training memory"),
)
SETTING = [name for name in CASE_KEYS if name != "backend"]


def rewriting_saves(data: Data) -> Iterator[Finding]:
    """Per variant: the share of MACs that is left, counted; then the costs for which both backends were measured."""
    for variant, entry in VARIANTS.items():
        shares = _counted(data, variant)
        less = pd.Series([share for share in shares if share < 1], dtype=float)
        if len(less) >= LEAST:
            spread = Spread.of(less)
            parts: tuple[Part, ...] = (
                f"{entry.title} is the same function with ", Number(times(spread.median), "counted", spread.span),
                " of its MACs as backend=rewritten runs it at inference.",
            )  # fmt: skip
            of_all = "" if len(less) == len(shares) else f" of {len(shares)}, the others have nothing to rewrite"
            basis = f"median and range over {plural(len(less), 'network')}{of_all}, skip {REFERENCE_SKIP}"
            yield Finding("Exact algebra", parts, basis)
        for group in together(_pairs(data, variant, cost) for cost in MEASURED):
            words = range_words(group, "over", "under")
            pairs = plural(len(group[0].table), "pair")
            parts = (f"{entry.title} under backend=rewritten takes ", *words, " of what eager takes.")
            yield Finding("Exact algebra", parts, f"median and range over {pairs} of cells of one setting")


def _counted(data: Data, variant: str) -> list[float]:
    """Executed MACs over those of the definition, in every network of the variant with the papers' own skips."""
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
    return shares


def _pairs(data: Data, variant: str, cost: Cost) -> Matched | None:
    """A cost as rewritten beside the same as eager, without failures and doubts, in the setting that has most pairs.

    Settings are told apart by everything but the network and the backend; of several with as many pairs, the first.
    """
    rows = data.sound[(data.sound["variant"] == variant) & (data.sound["mode"] == cost.mode)]
    rows = rows[rows["same_as"] == ""].dropna(subset=[cost.metric])
    best: Matched | None = None
    for _, alike in rows.groupby(SETTING, dropna=False, sort=True):
        of = {name: part.set_index("label")[cost.metric] for name, part in alike.groupby("backend")}
        if not {"rewritten", "eager"} <= set(of):
            continue
        found = pairs_of(cost, of["rewritten"], of["eager"], alike)
        if found and (best is None or len(found.table) > len(best.table)):
            best = found
    return best
