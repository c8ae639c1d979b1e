"""What the rows say, in sentences: each number with where it comes from and on how many cells it rests.

Nothing here is written for one store. A finding whose rows are missing does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from skipcost.bench import figures
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
    times,
    together,
    where_of,
    width_doublings,
)
from skipcost.reports.data import BASE, REFERENCE_SKIP, Cost, Data, records
from skipcost.unet_models import SKIPS, VARIANTS
from skipcost.unet_models.costs import costs

MISLEADS = 1.25  # parameters mislead where their ratio is off the MACs' by more than this factor
SETTING = [name for name in CASE_KEYS if name != "backend"]


def find(data: Data) -> list[Finding]:
    """Every finding that the rows support, in the order of FINDERS."""
    return [finding for finder in FINDERS for finding in finder(data)]


def _title(variant: str) -> str:
    return VARIANTS[variant].title


def _variants(data: Data) -> list[str]:
    present = set(data.frame["variant"])
    return [name for name in VARIANTS if name in present]


def _costs(data: Data, axis: str, names: Sequence[str], needed: str, **fixed: Any) -> list[list[Matched]]:
    """Every cost of these alternatives, in groups of equal cells: each group may stand in one sentence."""
    return together(matched(data, cost, axis, names, needed, fixed) for cost in data.costs)


def _basis(group: list[Matched], what: str = "matched cell") -> str:
    """How many cells a sentence rests on, and which alternatives it is silent about."""
    out = group[0].left_out
    return plural(len(group[0].table), what) + (f", without {' and '.join(out)}: too few in common" if out else "")


def _ranked(
    group: list[Matched], names: Sequence[str], end: str, base: str, titles: Callable[[str], str] = str
) -> list[Part]:
    """Who is "the cheapest" or "the dearest" of `names` by the costs of a group, with how many times the base's it is.

    Several are named together where they are equal in every cell, or where none is at that end in every cell.
    """
    found: dict[tuple[tuple[str, ...], str], list[list[Part]]] = {}
    for each in group:
        who, always = each.least(names) if end == "the cheapest" else each.most(names)
        item: list[Part] = [each.cost.word]
        if always and base not in who:
            item += [" (", Number(times(each.over(who[0], base).median), each.cost.origin), ")"]
        found.setdefault((tuple(who), _relation(who, end, each.cost.origin, always=always)), []).append(item)
    return listed([
        [*listed([[titles(name)] for name in who]), relation, *listed(items)]
        for (who, relation), items in found.items()
    ])  # fmt: skip


def _relation(who: Sequence[str], end: str, origin: str, *, always: bool) -> str:
    if always:
        return f" is {end} in " if len(who) == 1 else f" are equally {end} in "
    return f" cannot be told apart as {end} in " if origin == "measured" else f", each in some cells, are {end} in "


def in_short(data: Data) -> Iterator[Finding]:
    """Which variant is the cheapest and which the dearest in every cell, by every cost."""
    for group in _costs(data, "variant", _variants(data), BASE, skip=REFERENCE_SKIP):
        names = [name for name in _variants(data) if name in group[0].table.columns]
        lows, highs = (_ranked(group, names, end, BASE, _title) for end in ("the cheapest", "the dearest"))
        parts = ("At equal depth and width ", *lows, "; ", *highs, ".")
        yield Finding("In short", parts, f"times {_title(BASE)}; medians over {_basis(group)}, skip {REFERENCE_SKIP}")


def variant_costs(data: Data) -> Iterator[Finding]:
    """Each variant against U-Net at equal depth and width, all with the papers' own skips."""
    for variant in _variants(data):
        for group in _costs(data, "variant", (variant, BASE), BASE, skip=REFERENCE_SKIP) if variant != BASE else []:
            parts = (f"{_title(variant)} takes ", *range_words(group, variant, BASE), f" of {_title(BASE)}.")
            basis = f"median and range over {_basis(group)} of equal depth and width, skip {REFERENCE_SKIP}"
            yield Finding("Variants", parts, basis)


def misleading_parameters(data: Data) -> Iterator[Finding]:
    """Where, in every cell, the parameter ratio and the MAC ratio tell different stories."""
    for variant in _variants(data):
        found = [] if variant == BASE else _costs(data, "variant", (variant, BASE), BASE, skip=REFERENCE_SKIP)
        for by in ({each.cost.metric: each for each in group if each.cost.mode is None} for group in found):
            if not {"params", "conv_macs"} <= set(by):
                continue
            params, macs = (by[name].table[variant] / by[name].table[BASE] for name in ("params", "conv_macs"))
            gap = Spread.of(macs / params)
            off = max(gap.median, 1 / gap.median)
            if off < MISLEADS or gap.either_way:
                continue
            judged = f" its MACs: judged by parameters its cost is {'under' if gap.median > 1 else 'over'}stated by "
            parts = (
                *(f"{_title(variant)} has ", Number(times(params.median()), "counted")),
                *(f" the parameters of {_title(BASE)} but ", Number(times(macs.median()), "counted")),
                *(judged, Number(times(off), "counted"), "."),
            )
            yield Finding("Parameters mislead", parts, f"medians over {plural(gap.cells)}, skip {REFERENCE_SKIP}")


def skip_costs(data: Data) -> Iterator[Finding]:
    """The papers' own skips against none, per variant."""
    for variant in _variants(data):
        for group in _costs(data, "skip", (REFERENCE_SKIP, "none"), "none", variant=variant):
            parts = (f"The skips of {_title(variant)}, concatenated, make it take ",
                     *range_words(group, REFERENCE_SKIP, "none"), " of the same variant without skips.")  # fmt: skip
            yield Finding("What skips cost", parts, f"median and range over {_basis(group)}")


def cheapest_scheme(data: Data) -> Iterator[Finding]:
    """Per variant, the scheme that keeps skips and costs least in every cell, by each cost."""
    for variant in _variants(data):
        for group in _costs(data, "skip", tuple(SKIPS), "none", variant=variant):
            names = [name for name in SKIPS if name in group[0].table.columns and name != "none"]
            if len(names) < 2:  # noqa: PLR2004 - one scheme is no choice
                continue
            parts = (f"Of {', '.join(names[:-1])} and {names[-1]}, in {_title(variant)} ",
                     *_ranked(group, names, "the cheapest", "none"), ".")  # fmt: skip
            yield Finding("Cheapest skips", parts, f"times no skips; medians over {_basis(group)}")


def growth(data: Data) -> Iterator[Finding]:
    """What one more level and twice the width do to each cost."""
    for change, pairs, words in (
        ("One more level", depth_steps, "of equal variant, width and skip"),
        ("Twice the width", width_doublings, "of equal variant, depth and skip"),
    ):
        for group in together(pairs(data, cost) for cost in data.costs):
            parts = (f"{change} takes ", *range_words(group, "over", "under"), ".")
            yield Finding("Growth", parts, f"median and range over {_basis(group, 'pair')} {words}")


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
    yield Finding("Where the cost is", parts, f"{len(split.edges)} edges at {case.height}x{case.width} pixels")


def what_latency_follows(data: Data) -> Iterator[Finding]:
    """Rank correlation of latency with every cost that is known without measuring."""
    for mode in ("inference", "training"):
        cells = data.networks(mode, sound=True).dropna(subset=["latency_s"])
        names = ("conv_macs", "activations", "params", "peak_memory_predicted_bytes")
        known = [name for name in names if cells[name].notna().all() and len(set(cells[name])) > 1]
        if len(cells) < LEAST or not known or len(set(cells["latency_s"])) < 2:  # noqa: PLR2004 - one rank is no order
            continue
        rank = {name: rank_correlation(cells[name], cells["latency_s"]) for name in known}
        order = sorted(known, key=lambda name: -rank[name])
        items: list[list[Part]] = [
            [Number(f"{rank[name]:.2f}", "measured"), f" with {METRICS[name].title}"] for name in order
        ]
        yield Finding(
            "What latency follows",
            (f"The rank correlation of {mode} latency is ", *listed(items), "."),
            f"Spearman, {len(cells)} networks without a doubt",
        )


def rank_correlation(left: pd.Series[float], right: pd.Series[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank."""
    return float(left.rank().corr(right.rank()))


def memory_gap(data: Data) -> Iterator[Finding]:
    """Predicted peak memory against what the GPU's allocator measured."""
    for mode in ("inference", "training"):
        cells = data.networks(mode, sound=True)
        share = (cells["peak_memory_allocated_bytes"] / cells["peak_memory_predicted_bytes"]).dropna()
        if len(share) >= LEAST:
            spread = Spread.of(share)
            parts: tuple[Part, ...] = (
                f"In {mode} the allocator's peak is ", ratio(spread, "measured"), " the predicted one.",
            )  # fmt: skip
            yield Finding("Memory", parts, f"{spread.cells} networks")


def same_networks(data: Data) -> Iterator[Finding]:
    """How many cells are one network under two names."""
    cells = data.cells(None)
    again = int((cells["same_as"] != "").sum())
    if again:
        count = Number(str(again), "counted")
        parts = (count, f" of {len(cells)} cells are the same network as another one and were measured once.")
        yield Finding("Same networks", parts, "equal graphs after pruning what nothing reads")


def extent(data: Data) -> Iterator[Finding]:
    """The span of each cost over the networks of its main setting that have it without a doubt: what there is."""
    spans: dict[tuple[frozenset[str], tuple[str, ...]], list[list[Part]]] = {}
    for cost in data.costs:
        rows = data.networks(cost.mode, sound=True).dropna(subset=[cost.metric])
        values = rows[cost.metric]
        if len(values) < 2:  # noqa: PLR2004 - one network spans nothing
            continue
        low, high = (figures.text(float(value), cost.unit) for value in (values.min(), values.max()))
        basis = frozenset(rows["label"]), where_of(rows)
        spans.setdefault(basis, []).append([f"{cost.word} ", Number(f"{low} to {high}", cost.origin)])
    for (labels, _), items in spans.items():
        parts = ("The networks here span ", *listed(items), ".")
        yield Finding("Span", parts, f"{len(labels)} networks, numbers with a doubt left out")


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


FINDERS: tuple[Callable[[Data], Iterator[Finding]], ...] = (
    in_short,
    variant_costs,
    misleading_parameters,
    skip_costs,
    cheapest_scheme,
    growth,
    what_latency_follows,
    dearest_edge,
    rewriting_saves,
    memory_gap,
    same_networks,
    extent,
)


MEASURED = (
    Cost("latency_s", "inference", "latency"),
    Cost("latency_s", "training", "training step"),
    Cost("peak_memory_predicted_bytes", "inference", "memory"),
    Cost("peak_memory_predicted_bytes", "training", "training memory"),
    Cost("peak_memory_allocated_bytes", "inference", "allocated memory"),
    Cost("peak_memory_allocated_bytes", "training", "allocated training memory"),
)
