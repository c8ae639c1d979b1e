"""What the rows say, in sentences: each number with where it comes from and on how many cells it rests.

Nothing here is written for one store. A finding whose rows are missing does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from skipcost.bench.cases.case import CASE_KEYS
from skipcost.bench.measure.metrics import METRICS
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.reports.compare import (
    LEAST,
    Finding,
    Matched,
    Number,
    Part,
    Spread,
    depth_steps,
    listed,
    matched,
    pairs_of,
    plural,
    range_words,
    ratio,
    together,
    width_doublings,
)
from skipcost.reports.data import BASE, REFERENCE_SKIP, Cost, Data, records
from skipcost.unet_models import SKIPS, VARIANTS
from skipcost.unet_models.costs import costs

MOST = 8  # findings of a page
BRIEFLY = ("conv_macs", "latency_s", "peak_memory_predicted_bytes")  # what skips and growth are told by
SETTING = [name for name in CASE_KEYS if name != "backend"]


def find(data: Data) -> list[Finding]:
    """The first findings that the rows support, in the order of FINDERS."""
    return [finding for finder in FINDERS for finding in finder(data)][:MOST]


def _title(variant: str) -> str:
    return VARIANTS[variant].title


def _variants(data: Data) -> list[str]:
    present = set(data.frame["variant"])
    return [name for name in VARIANTS if name in present]


def _brief(data: Data) -> list[Cost]:
    """The costs of BRIEFLY, in the mode that most is told of."""
    main = next(iter(data.settings), None)
    return [cost for cost in data.costs if cost.metric in BRIEFLY and cost.mode in (None, main)]


def _groups(
    data: Data, costs: Sequence[Cost], axis: str, names: Sequence[str], needed: str, **fixed: Any
) -> list[list[Matched]]:
    """Costs of these alternatives, in groups of equal cells: each group may stand in one sentence."""
    return together(matched(data, cost, axis, names, needed, fixed) for cost in costs)


def _pairs_words(group: list[Matched], what: str = "pair") -> str:
    return f"({plural(len(group[0].table), what)})"


def variant_costs(data: Data) -> Iterator[Finding]:
    """Each variant against U-Net at equal depth and width, all with the papers' own skips."""
    for variant in (name for name in _variants(data) if name != BASE):
        parts: list[Part] = []
        for group in _groups(data, data.costs, "variant", (variant, BASE), BASE, skip=REFERENCE_SKIP):
            who = " It" if parts else _title(variant)
            words = range_words(group, variant, BASE)
            parts += [f"{who} takes ", *words, f", against {_title(BASE)} {_pairs_words(group)}."]
        if parts:
            basis = f"median and range over pairs of equal depth and width, skip {REFERENCE_SKIP}"
            yield Finding("Variants", tuple(parts), basis, "against")


def skip_costs(data: Data) -> Iterator[Finding]:
    """The papers' own skips against none, variant by variant."""
    parts: list[Part] = []
    for variant in _variants(data):
        for group in _groups(data, _brief(data), "skip", (REFERENCE_SKIP, "none"), "none", variant=variant):
            words = range_words(group, REFERENCE_SKIP, "none")
            parts += [" " * bool(parts), f"{_title(variant)} takes ", *words, f" {_pairs_words(group)}."]
    if parts:
        basis = f"skip {REFERENCE_SKIP} against none; median and range over pairs of equal depth and width"
        yield Finding("What skips cost", tuple(parts), basis, "skip-schemes")


def cheapest_scheme(data: Data) -> Iterator[Finding]:
    """Variant by variant, the scheme that keeps skips and costs least in every cell."""
    parts: list[Part] = []
    before: list[str] = []
    for variant in _variants(data):
        for group in _groups(data, _brief(data), "skip", tuple(SKIPS), "none", variant=variant):
            names = [name for name in SKIPS if name in group[0].table.columns and name != "none"]
            if len(names) < 2:  # noqa: PLR2004 - one scheme is no choice
                continue
            among: list[Part] = ["Of ", *listed([[name] for name in names]), ", in "] if names != before else ["In "]
            parts += [" " * bool(parts), *among, f"{_title(variant)} ", *_cheapest(group, names)]
            before = names
            left_out = group[0].left_out
            without = f", without {' and '.join(left_out)}: too few in common" if left_out else ""
            parts.append(f" ({plural(len(group[0].table))}{without}).")
    if parts:
        yield Finding("Cheapest skips", tuple(parts), "times no skips; medians", "skip-schemes")


def _cheapest(group: list[Matched], names: Sequence[str]) -> list[Part]:
    """Who of `names` is the cheapest by the costs of a group, with how many times no skips it takes.

    Several are named together where they are equal in every cell, or where none is the cheapest in every cell.
    """
    found: dict[tuple[tuple[str, ...], str], list[list[Part]]] = {}
    for each in group:
        who, always = each.least(names)
        item: list[Part] = [each.cost.word]
        if always:
            spread = each.over(who[0], "none")
            item += [" (", replace(ratio(spread, each.cost.origin), span=""), ")"]
        found.setdefault((tuple(who), _relation(who, each.cost.origin, always=always)), []).append(item)
    return listed([[*listed([[name] for name in who]), relation, *listed(items)]
                   for (who, relation), items in found.items()])  # fmt: skip


def _relation(who: Sequence[str], origin: str, *, always: bool) -> str:
    if always:
        return " is the cheapest in " if len(who) == 1 else " are equally the cheapest in "
    told = " cannot be told apart as the cheapest in "
    return told if origin == "measured" else ", each in some cells, are the cheapest in "


def growth(data: Data) -> Iterator[Finding]:
    """What one more level and twice the width do to parameters and the costs that are told briefly."""
    costs = [cost for cost in data.costs if cost.metric == "params"] + _brief(data)
    for change, pairs, axis, words in (
        ("One more level", depth_steps, "depth", "of equal variant, width and skip"),
        ("Twice the width", width_doublings, "width", "of equal variant, depth and skip"),
    ):
        parts: list[Part] = []
        for group in together(pairs(data, cost) for cost in costs):
            start = " It" if parts else change
            parts += [f"{start} takes ", *range_words(group, "over", "under"), f" {_pairs_words(group)}."]
        if parts:
            yield Finding("Growth", tuple(parts), f"median and range over pairs {words}", _curve(data, axis))


def _curve(data: Data, axis: str) -> str:
    """The figure over an axis, or where it would be: it is of the mode that most is told of."""
    other = "width" if axis == "depth" else "depth"
    drawn = data.cells(None).groupby(other)[axis].nunique().max() > 1
    return f"over-{axis}" if drawn else "scaling"


def dearest_edge(data: Data) -> Iterator[Finding]:
    """The edge with the largest share of the MACs in the network with the most MACs."""
    networks = data.frame[data.frame["same_as"] == ""]
    per_image = (networks["conv_macs"] / networks["batch"]).dropna()
    if per_image.empty:
        return
    first = networks.loc[per_image.index[per_image == per_image.max()]]
    case, _ = data.cases[records(first)[0]["case_id"]]
    equal = first["label"].nunique()
    split = costs(case.graph(), case.height, case.width)
    edge = max(split.edges, key=lambda each: each.all_macs)
    alike = sum(each.all_macs == edge.all_macs for each in split.edges)
    share = f"{edge.all_macs / split.total_macs:.1%}"
    skips = f"{sum(each.all_macs for each in split.edges if each.skip) / split.total_macs:.1%}"
    way = f"{edge.source} to {edge.target} ({'a skip' if edge.skip else 'no skip'}; {edge.how})"
    place = "the dearest network" if equal == 1 else f"one of the {equal} dearest networks"
    which = f"the single edge {way}" if alike == 1 else f"each of {alike} edges, one of them {way},"
    parts = (
        f"In {case.spec.label}, {place} here, {which} holds ",
        Number(share, "counted"),
        " of all MACs; all skips together, with what they feed, ",
        Number(skips, "counted"),
        ".",
    )
    basis = f"{len(split.edges)} edges at {case.height}x{case.width} pixels"
    yield Finding("Where the cost is", parts, basis, "networks")


def what_latency_follows(data: Data) -> Iterator[Finding]:
    """Rank correlation of latency with every cost that is known without measuring, in the mode most is told of."""
    mode = next(iter(data.settings), None)
    cells = data.networks(mode, sound=True).dropna(subset=["latency_s"])
    names = ("conv_macs", "activations", "params", "peak_memory_predicted_bytes")
    known = [name for name in names if cells[name].notna().all() and len(set(cells[name])) > 1]
    if len(cells) < LEAST or not known or len(set(cells["latency_s"])) < 2:  # noqa: PLR2004 - one rank is no order
        return
    rank = {name: rank_correlation(cells[name], cells["latency_s"]) for name in known}
    items: list[list[Part]] = [
        [Number(f"{rank[name]:.2f}", "measured"), f" with {METRICS[name].title}"]
        for name in sorted(known, key=lambda name: -rank[name])
    ]
    told = (f"The rank correlation of {mode} latency is ", *listed(items), ".")
    yield Finding("What latency follows", told, f"Spearman, {len(cells)} networks without a doubt", "cost-cost")


def rank_correlation(left: pd.Series[float], right: pd.Series[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank."""
    return float(left.rank().corr(right.rank()))


def memory_gap(data: Data) -> Iterator[Finding]:
    """Predicted peak memory against what the GPU's allocator measured."""
    parts: list[Part] = []
    for mode in data.settings:
        cells = data.networks(mode, sound=True)
        share = (cells["peak_memory_allocated_bytes"] / cells["peak_memory_predicted_bytes"]).dropna()
        if len(share) >= LEAST:
            told = ratio(Spread.of(share), "measured")
            start = f"{' ' * bool(parts)}In {mode} the allocator's peak is "
            parts += [start, told, f" the predicted one ({plural(len(share), 'network')})."]
    if parts:
        yield Finding("Memory", tuple(parts), "allocated over predicted, network by network", "accuracy")


def rewriting_measured(data: Data) -> Iterator[Finding]:
    """Per variant, the costs for which both backends were measured."""
    parts: list[Part] = []
    for variant in VARIANTS:
        for group in together(_pairs(data, variant, cost) for cost in MEASURED):
            words = range_words(group, "over", "under")
            parts += [f"{' ' * bool(parts)}{_title(variant)} takes ", *words, f" {_pairs_words(group)}."]
    if parts:
        basis = "backend=rewritten against eager; median and range over pairs of cells of one setting"
        yield Finding("Exact algebra", tuple(parts), basis, "rows")


def rewriting_saves(data: Data) -> Iterator[Finding]:
    """The share of MACs that is left where maps that were only just up-sampled are convolved before, counted."""
    items: list[list[Part]] = []
    for variant, entry in VARIANTS.items():
        less = pd.Series([share for share in _counted(data, variant) if share < 1], dtype=float)
        if len(less) >= LEAST:
            items.append([f"{entry.title} ", ratio(Spread.of(less), "counted"), f" ({plural(len(less), 'network')})"])
    if items:
        parts = (
            "As backend=rewritten runs them at inference, the same functions take of their MACs: ",
            *listed(items),
            ".",
        )
        yield Finding("Exact algebra", parts, f"median and range, skip {REFERENCE_SKIP}", "rows")


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


FINDERS: tuple[Callable[[Data], Iterator[Finding]], ...] = (
    variant_costs,
    skip_costs,
    cheapest_scheme,
    growth,
    what_latency_follows,
    memory_gap,
    rewriting_measured,
    dearest_edge,
    rewriting_saves,
)


MEASURED = (
    Cost("latency_s", "inference", "latency"),
    Cost("latency_s", "training", "training step"),
    Cost("peak_memory_predicted_bytes", "inference", "memory"),
    Cost("peak_memory_predicted_bytes", "training", "training memory"),
    Cost("peak_memory_allocated_bytes", "inference", "allocated memory"),
    Cost("peak_memory_allocated_bytes", "training", "allocated training memory"),
)
