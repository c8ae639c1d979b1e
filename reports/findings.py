"""What the rows say, in sentences: each number with where it comes from and on how many cells it rests.

Nothing here is written for one store. A finding whose rows are missing does not appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from skipcost.bench import figures
from skipcost.bench.metrics import METRICS
from skipcost.reports.compare import Spread, depth_steps, ratios, times, width_doublings
from skipcost.reports.data import BASE, REFERENCE_SKIP, Cost, Data, records
from skipcost.reports.rewriting import rewriting_saves
from skipcost.reports.sentences import Finding, Number, Part, listed, plural
from skipcost.unet_models import SKIPS, VARIANTS
from skipcost.unet_models.costs import costs

MISLEADS = 1.25  # parameters mislead where their ratio is off the MACs' by more than this factor


def find(data: Data) -> list[Finding]:
    """Every finding that the rows support, in the order of FINDERS."""
    return [finding for finder in FINDERS for finding in finder(data)]


def _title(variant: str) -> str:
    return VARIANTS[variant].title


def _variants(data: Data) -> list[str]:
    present = set(data.frame["variant"])
    return [name for name in VARIANTS if name in present]


def _cells(found: list[tuple[Cost, Spread]], what: str = "matched cell") -> str:
    """How many cells the ratios rest on; costs that have fewer are named."""
    most = max(spread.cells for _, spread in found)
    fewer = [f"{cost.word}: {spread.cells}" for cost, spread in found if spread.cells < most]
    return plural(most, what) + (f" ({', '.join(fewer)}, without failures and doubts)" if fewer else "")


def _spreads(data: Data, axis: str, top: str, bottom: str, **fixed: str) -> list[tuple[Cost, Spread]]:
    """The ratio top/bottom along an axis for every cost that has matched cells."""
    found = []
    for cost in data.costs:
        spread = ratios(data.cells(cost.mode, sound=True), cost.metric, axis, top, bottom, **fixed)
        if spread:
            found.append((cost, spread))
    return found


def _range_words(found: list[tuple[Cost, Spread]]) -> list[Part]:
    return listed([[_ratio(spread, cost.origin), f" the {cost.word}"] for cost, spread in found])


def _ratio(spread: Spread, origin: str) -> Number:
    return Number(times(spread.median), origin, spread.span)


def in_short(data: Data) -> Iterator[Finding]:
    """Which variant is the cheapest and which the dearest, by every cost that all of them have."""
    variants = _variants(data)
    found = {name: dict(_spreads(data, "variant", name, BASE, skip=REFERENCE_SKIP)) for name in variants}
    shared = [cost for cost in data.costs if all(cost in spreads for spreads in found.values())]
    if len(variants) < 2 or not shared:  # noqa: PLR2004 - one variant is no choice
        return
    least: dict[str, list[list[Part]]] = {}
    most: dict[str, list[list[Part]]] = {}
    for cost in shared:
        by = {name: found[name][cost].median for name in variants}
        least.setdefault(min(by, key=by.__getitem__), []).append([cost.word])
        dearest = max(by, key=by.__getitem__)
        most.setdefault(dearest, []).append([f"{cost.word} (", Number(times(by[dearest]), cost.origin), ")"])
    lows = listed([[f"{_title(name)} is the cheapest in ", *listed(items)] for name, items in least.items()])
    highs = listed([[f"{_title(name)} the dearest in ", *listed(items)] for name, items in most.items()])
    parts = ("At equal depth and width ", *lows, "; ", *highs, ".")
    rests = [(cost, min((found[name][cost] for name in variants), key=lambda spread: spread.cells)) for cost in shared]
    yield Finding("In short", parts, f"times {_title(BASE)}; medians over {_cells(rests)}, skip {REFERENCE_SKIP}")


def variant_costs(data: Data) -> Iterator[Finding]:
    """Each variant against U-Net at equal depth and width, all with the papers' own skips."""
    for variant in _variants(data):
        found = _spreads(data, "variant", variant, BASE, skip=REFERENCE_SKIP) if variant != BASE else []
        if found:
            parts = (f"{_title(variant)} takes ", *_range_words(found), f" of {_title(BASE)}.")
            basis = f"median and range over {_cells(found)} of equal depth and width, skip {REFERENCE_SKIP}"
            yield Finding("Variants", parts, basis)


def misleading_parameters(data: Data) -> Iterator[Finding]:
    """Where the parameter ratio and the MAC ratio tell different stories."""
    for variant in _variants(data):
        found = _spreads(data, "variant", variant, BASE, skip=REFERENCE_SKIP) if variant != BASE else []
        by = {cost.metric: spread for cost, spread in found if cost.mode is None}
        if not {"params", "conv_macs"} <= set(by):
            continue
        params, macs = by["params"], by["conv_macs"]
        gap = macs.median / params.median
        if max(gap, 1 / gap) < MISLEADS:
            continue
        judged = f" its MACs: judged by parameters its cost is {'under' if gap > 1 else 'over'}stated by "
        parts = (
            *(f"{_title(variant)} has ", Number(times(params.median), "counted")),
            *(f" the parameters of {_title(BASE)} but ", Number(times(macs.median), "counted")),
            *(judged, Number(times(max(gap, 1 / gap)), "counted"), "."),
        )
        yield Finding("Parameters mislead", parts, f"medians over {plural(macs.cells)}, skip {REFERENCE_SKIP}")


def skip_costs(data: Data) -> Iterator[Finding]:
    """The papers' own skips against none, per variant."""
    for variant in _variants(data):
        found = _spreads(data, "skip", REFERENCE_SKIP, "none", variant=variant)
        if found:
            parts = (f"The skips of {_title(variant)}, concatenated, make it take ", *_range_words(found),
                     " of the same variant without skips.")  # fmt: skip
            yield Finding("What skips cost", parts, f"median and range over {_cells(found)}")


def cheapest_scheme(data: Data) -> Iterator[Finding]:
    """Per variant, the scheme that keeps skips and costs least over `none`, by each cost."""
    for variant in _variants(data):
        best: dict[str, list[tuple[Cost, Spread]]] = {}
        for cost in data.costs:
            cells = data.cells(cost.mode, sound=True)
            found = {name: ratios(cells, cost.metric, "skip", name, "none", variant=variant) for name in SKIPS}
            spreads = {name: spread for name, spread in found.items() if spread and name != "none"}
            if len(spreads) > 1:  # one scheme is no choice
                name = min(spreads, key=lambda each: spreads[each].median)
                best.setdefault(name, []).append((cost, spreads[name]))
        if best:
            items = [_medians(name, won, everything=len(best) == 1) for name, won in best.items()]
            parts = (f"Of the schemes that keep skips, in {_title(variant)} ", *listed(items), ".")
            basis = f"times no skips; medians over {_cells([pair for won in best.values() for pair in won])}"
            yield Finding("Cheapest skips", parts, basis)


def _medians(scheme: str, won: list[tuple[Cost, Spread]], *, everything: bool) -> list[Part]:
    numbers: list[list[Part]] = [[f"{cost.word} ", Number(times(spread.median), cost.origin)] for cost, spread in won]
    return [f"{scheme} is the cheapest {'in everything' if everything else 'in'} (" if everything else
            f"{scheme} is the cheapest in ", *listed(numbers), ")" if everything else ""]  # fmt: skip


def growth(data: Data) -> Iterator[Finding]:
    """What one more level and twice the width do to each cost."""
    for change, pairs, words in (
        ("One more level", depth_steps, "of equal variant, width and skip"),
        ("Twice the width", width_doublings, "of equal variant, depth and skip"),
    ):
        found = [(cost, pairs(data.networks(cost.mode, sound=True), cost.metric)) for cost in data.costs]
        spreads = [(cost, spread) for cost, spread in found if spread]
        if spreads:
            parts = (f"{change} takes ", *_range_words(spreads), ".")
            yield Finding("Growth", parts, f"median and range over {_cells(spreads, 'pair')} {words}")


def dearest_edge(data: Data) -> Iterator[Finding]:
    """The edge with the largest share of the MACs in the network with the most MACs."""
    networks = data.frame[data.frame["same_as"] == ""]
    per_image = (networks["conv_macs"] / networks["batch"]).dropna()
    if per_image.empty:
        return
    case, _ = data.cases[records(networks.loc[per_image.index[per_image == per_image.max()]])[0]["case_id"]]
    split = costs(case.graph(), case.height, case.width)
    edge = max(split.edges, key=lambda each: each.all_macs)
    share = f"{edge.all_macs / split.total_macs:.1%}"
    skips = f"{sum(each.all_macs for each in split.edges if each.skip) / split.total_macs:.1%}"
    way = f"{edge.source} to {edge.target} ({'a skip' if edge.skip else 'no skip'}; {edge.how})"
    parts = (
        f"In {case.spec.label}, the dearest network here, the single edge {way} holds ",
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
        if len(cells) < 5 or not known or len(set(cells["latency_s"])) < 2:  # noqa: PLR2004 - too few ranks to speak of
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
        if len(share):
            spread = Spread.of(share)
            parts: tuple[Part, ...] = (
                f"In {mode} the allocator's peak is ", _ratio(spread, "measured"), " the predicted one.",
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
    """The span of each cost over the whole store: what there is to choose from."""
    items: list[list[Part]] = []
    for cost in data.costs:
        values = data.networks(cost.mode, sound=True)[cost.metric].dropna()
        if len(values) < 2:  # noqa: PLR2004 - one network spans nothing
            continue
        low, high = (figures.text(float(value), cost.unit) for value in (values.min(), values.max()))
        items.append([f"{cost.word} ", Number(f"{low} to {high}", cost.origin)])
    if items:
        parts = ("The networks here span ", *listed(items), ".")
        yield Finding("Span", parts, f"{len(data.networks(None))} networks, numbers with a doubt left out")


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
