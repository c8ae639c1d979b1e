"""Every sentence of a store worked out once more: by loops over its results, with no function of the report."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small_store import ENVIRONMENT, make_store

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import Store, create_store, open_store
from skipcost.reports.data import load
from skipcost.reports.findings import FINDERS, rewriting_saves
from skipcost.unet_models import ModelSpec

TIMES = "\u00d7"
TITLES = {"unet": "U-Net", "unet++": "UNet++", "unet3+": "UNet 3+"}
SCHEMES = ("concat", "sum", "gated", "none", "same", "nearest")
AXES = ("variant", "depth", "width", "skip")
COSTS = (  # metric, mode, word, origin
    ("params", None, "parameters", "counted"),
    ("conv_macs", None, "MACs", "counted"),
    ("latency_s", "inference", "latency", "measured"),
    ("latency_s", "training", "training step", "measured"),
    ("peak_memory_predicted_bytes", "inference", "memory", "predicted"),
    ("peak_memory_predicted_bytes", "training", "training memory", "predicted"),
    ("peak_memory_allocated_bytes", "inference", "allocated memory", "measured"),
    ("peak_memory_allocated_bytes", "training", "allocated training memory", "measured"),
)
BRIEFLY = ("conv_macs", "latency_s", "peak_memory_predicted_bytes")
TOPICS = ("Variants", "What skips cost", "Cheapest skips", "Growth", "Memory")
METRICS = sorted({cost[0] for cost in COSTS})
Cells = dict[tuple[Any, ...], float]  # by the four axes


class Rows:
    """The newest environment of a store as plain rows; a number with a doubt or a failure is none."""

    def __init__(self, path: Path) -> None:
        with open_store(path) as store:
            cases, found = store.cases(), store.results(store.runs()[-1].fingerprint)
        self.rows = []
        for case_id, results in found.items():
            case, aliases = cases[case_id]
            sound = {
                name: statistics.median(each.samples)
                for name, each in results.items()
                if each.outcome == "ok" and not each.note
            }
            setting = replace(case, spec=ModelSpec()).to_json()
            for label in (case.spec.label, *aliases):
                spec = ModelSpec.parse(label)
                self.rows.append(
                    {"at": tuple(getattr(spec, axis) for axis in AXES), "sound": sound, "setting": setting,
                     "mode": case.mode, "alias": label != case.spec.label, "where": (case.device, case.backend)}
                )  # fmt: skip
        counts = Counter((row["mode"], row["setting"]) for row in self.rows)
        self.main = {mode: key for (mode, key), _ in reversed(counts.most_common())}

    def of(self, mode: str | None, *, aliases: bool = True) -> list[dict[str, Any]]:
        main = self.main.get(mode or ("inference" if "inference" in self.main else "training"))
        return [row for row in self.rows if row["setting"] == main and (aliases or not row["alias"])]

    def cells(self, cost: tuple[Any, ...], *, aliases: bool = True) -> Cells:
        rows = self.of(cost[1], aliases=aliases)
        return {row["at"]: row["sound"][cost[0]] for row in rows if cost[0] in row["sound"]}

    def brief(self) -> list[tuple[Any, ...]]:
        main = "inference" if "inference" in self.main else "training"
        return [cost for cost in COSTS if cost[0] in BRIEFLY and cost[1] in (None, main)]

    def where(self, cost: tuple[Any, ...]) -> Any:
        return {row["where"] for row in self.of(cost[1])}.pop()


def times(value: float) -> str:
    """A ratio with three figures, as the report writes it."""
    return f"{value:.0f}{TIMES}" if value >= 100 else f"{value:#.3g}{TIMES}"


def span(values: list[float]) -> str:
    """Median and range; the range alone where there is more and less."""
    low, high = times(min(values)), times(max(values))
    if min(values) < 1 < max(values):
        return f"{low} to {high}"
    return times(statistics.median(values)) + ("" if low == high else f" ({low} to {high})")


def joined(items: list[str]) -> str:
    """Commas, and a final and."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def by_cells(found: list[tuple[Any, Any]]) -> list[list[Any]]:
    """Group (key, item): costs that rest on equal cells stand in one sentence."""
    groups: list[tuple[Any, list[Any]]] = []
    for key, item in found:
        for known, items in groups:
            if known == key:
                items.append(item)
                break
        else:
            groups.append((key, [item]))
    return [items for _, items in groups]


def alternatives(cells: Cells, axis: int, names: list[str], needed: str, fixed: dict[int, str]) -> Any:
    """(names, {cell: values by name}) of the largest set of alternatives with five cells in common, or None."""
    best: Any = None
    others = [name for name in names if name != needed]
    for count in range(1, len(others) + 1):
        for some in itertools.combinations(others, count):
            chosen, common = (needed, *some), {}
            for at in cells:
                rest = at[:axis] + at[axis + 1 :]
                spots = {name: (*at[:axis], name, *at[axis + 1 :]) for name in chosen}
                if all(at[where] == value for where, value in fixed.items()) and all(
                    s in cells for s in spots.values()
                ):
                    common[rest] = {name: cells[spot] for name, spot in spots.items()}
            if len(common) >= 5 and (best is None or (count, len(common)) > (len(best[0]) - 1, len(best[1]))):
                best = chosen, common
    return best


def groups(rows: Rows, costs: Any, axis: int, names: list[str], needed: str, fixed: dict[int, str]) -> list[list[Any]]:
    """Per group of costs with equal cells: (cost, alternatives in order, cells, those that had too few)."""
    found = []
    for cost in costs:
        best = alternatives(rows.cells(cost), axis, names, needed, fixed)
        if best:
            asked = {row["at"][axis] for row in rows.of(cost[1]) if all(row["at"][k] == v for k, v in fixed.items())}
            chosen = [name for name in names if name in best[0]]
            out = [name for name in names if name in asked and name not in chosen]
            found.append(((set(best[1]), chosen, out, rows.where(cost)), (cost, chosen, best[1], out)))
    return by_cells(found)


def ratio_words(group: list[Any], top: str, bottom: str, depth_at: int) -> str:
    """One alternative over another by every cost of a group; `depth_at` is the place of the depth in a cell."""
    items = []
    for (_, _, word, origin), _, cells, _ in group:
        ratios = {at: each[top] / each[bottom] for at, each in cells.items()}
        told = f"{span(list(ratios.values()))} [{origin}]"
        if not min(ratios.values()) < 1 < max(ratios.values()):
            items.append(f"{told} the {word}")
        elif origin == "measured":
            items.append(f"a {word} that cannot be told apart ({told})")
        else:
            depths = sorted({at[depth_at] for at in ratios})
            by_depth = {depth: [ratio for at, ratio in ratios.items() if at[depth_at] == depth] for depth in depths}
            if any(min(some) < 1 < max(some) for some in by_depth.values()):
                items.append(f"{told} the {word}, more in some cells and less in others")
            else:
                each = [f"{span(some)} [{origin}] at depth {depth}" for depth, some in by_depth.items()]
                items.append(f"{word} either way by depth ({joined(each)})")
    return joined(items)


def pairs(group: list[Any]) -> str:
    """How many cells a group has."""
    return f"({len(group[0][2])} pairs)"


def cheapest_words(group: list[Any], names: list[str]) -> str:
    """Who is the cheapest, cost by cost: in every cell, or else nobody is."""
    found: dict[str, list[str]] = {}
    for (_, _, word, origin), _, cells, _ in group:
        at_end = {name: [each[name] == min(each[n] for n in names) for each in cells.values()] for name in names}
        who = [name for name in names if all(at_end[name])]
        said = word
        if who:
            relation = " is " if len(who) == 1 else " are equally "
            ratios = [each[who[0]] / each["none"] for each in cells.values()]
            crossing = min(ratios) < 1 < max(ratios)
            said += f" ({span(ratios) if crossing else times(statistics.median(ratios))} [{origin}])"
        else:
            who = [name for name in names if any(at_end[name])]
            relation = " cannot be told apart as " if origin == "measured" else ", each in some cells, are "
        found.setdefault(f"{joined(who)}{relation}the cheapest in ", []).append(said)
    return joined([start + joined(items) for start, items in found.items()])


def variants_again(rows: Rows) -> list[str]:
    """What compares variants."""
    told = []
    for name in [name for name in TITLES if any(row["at"][0] == name for row in rows.rows)][1:]:
        said = [
            f"takes {ratio_words(group, name, 'unet', 0)}, against U-Net {pairs(group)}."
            for group in groups(rows, COSTS, 0, [name, "unet"], "unet", {3: "concat"})
        ]
        if said:
            told.append(
                f"Variants: {TITLES[name]} {' It '.join(said)} "
                "(median and range over pairs of equal depth and width, skip concat)"
            )
    return told


def schemes_again(rows: Rows) -> list[str]:
    """What compares skip schemes."""
    names = [name for name in TITLES if any(row["at"][0] == name for row in rows.rows)]
    against, cheapest, before = [], [], ""
    for name in names:
        against += [
            f"{TITLES[name]} takes {ratio_words(group, 'concat', 'none', 1)} {pairs(group)}."
            for group in groups(rows, rows.brief(), 3, ["concat", "none"], "none", {0: name})
        ]
        for group in groups(rows, rows.brief(), 3, list(SCHEMES), "none", {0: name}):
            _, chosen, cells, out = group[0]
            kept = [each for each in chosen if each != "none"]
            if len(kept) > 1:
                among = "In" if joined(kept) == before else f"Of {joined(kept)}, in"
                before = joined(kept)
                without = f", without {' and '.join(out)}: too few in common" if out else ""
                words = cheapest_words(group, kept)
                cheapest.append(f"{among} {TITLES[name]} {words} ({len(cells)} matched cells{without}).")
    told = []
    if against:
        basis = "(skip concat against none; median and range over pairs of equal depth and width)"
        told.append(f"What skips cost: {' '.join(against)} {basis}")
    if cheapest:
        told.append(f"Cheapest skips: {' '.join(cheapest)} (times no skips; medians)")
    return told


def growth_again(rows: Rows) -> list[str]:
    """What a level and a doubling take."""
    told = []
    for change, move, words in (
        ("One more level", lambda at: (at[0], at[1] + 1, at[2], at[3]), "variant, width and skip"),
        ("Twice the width", lambda at: (at[0], at[1], at[2] * 2, at[3]), "variant, depth and skip"),
    ):
        found: list[Any] = []
        for cost in [COSTS[0], *rows.brief()]:
            cells = rows.cells(cost, aliases=False)
            steps = {at: {"over": cells[move(at)], "under": cells[at]} for at in cells if move(at) in cells}
            if len(steps) >= 5:
                found.append(((set(steps), rows.where(cost)), (cost, [], steps, [])))
        said = [f"takes {ratio_words(group, 'over', 'under', 1)} {pairs(group)}." for group in by_cells(found)]
        if said:
            told.append(f"Growth: {change} {' It '.join(said)} (median and range over pairs of equal {words})")
    return told


def memory_again(rows: Rows) -> list[str]:
    """Measured over predicted."""
    said = []
    for mode in ("inference", "training"):
        both = [row["sound"] for row in rows.of(mode, aliases=False) if mode in rows.main]
        names = ("peak_memory_allocated_bytes", "peak_memory_predicted_bytes")
        shares = [each[names[0]] / each[names[1]] for each in both if set(names) <= set(each)]
        if len(shares) >= 5:
            said.append(
                f"In {mode} the allocator's peak is {span(shares)} [measured] the predicted one "
                f"({len(shares)} networks)."
            )
    return [f"Memory: {' '.join(said)} (allocated over predicted, network by network)"] if said else []


def told_again(path: Path) -> list[str]:
    """The sentences of TOPICS that a store supports."""
    rows = Rows(path)
    return [*variants_again(rows), *schemes_again(rows), *growth_again(rows), *memory_again(rows)]


@cache
def told_by_the_report(path: Path) -> list[str]:
    """The same as the report tells them; several tests look at the same store, which nobody changes."""
    data = load(path)
    finders = [finder for finder in FINDERS if finder is not rewriting_saves]  # slow, and another test's
    return [each.text for finder in finders for each in finder(data) if each.topic in TOPICS]


Spoil = Callable[[Case, str, random.Random], Result | None]


def value(case: Case, metric: str, luck: random.Random) -> float:
    """A number made up: it grows with the axes, and scatters enough for any two to cross somewhere."""
    factor = {"unet": 1.0, "unet++": 1.2, "unet3+": 1.3}[case.spec.variant] * (1 + SCHEMES.index(case.spec.skip) / 9)
    size = 4.0**case.spec.depth * case.spec.width**2 * case.batch
    if metric == "latency_s":
        return size * factor * luck.uniform(0.6, 1.4) * 1e-6
    return float(int(size * factor * luck.uniform(0.95, 1.05) * 1000))


def fill(store: Store, seed: int, spoil: Spoil, **change: Any) -> None:
    """Add every cell in both modes; `spoil` may take a number away or put another result in its place."""
    luck = random.Random(seed)  # noqa: S311 - made-up numbers, the same ones every time
    run = store.add_run("2026-01-02T03:04:05+00:00", "made up", 0, ENVIRONMENT)
    for variant, depth, width, skip, mode in itertools.product(
        TITLES, (1, 2), (4, 6, 8), ("concat", "sum", "gated", "none"), ("inference", "training")
    ):
        if (variant, skip) == ("unet++", "none"):
            continue  # that is U-Net's, below as its alias
        spec = ModelSpec(variant=variant, depth=depth, width=width, skip=skip)
        batch = 1 if mode == "inference" else 2
        case = Case(spec=spec, height=16, width=16, mode=mode, batch=batch, **change)
        alias = [spec.label.replace("unet/", "unet++/")] if (variant, skip) == ("unet", "none") else []
        store.add_case(case, alias)
        for metric in METRICS:
            sound = Result(metric, samples=(value(case, metric, luck),))
            result = spoil(case, metric, luck)
            if result is not MISSING:
                store.add_result(run, case.case_id, result or sound)


MISSING = Result("params", "crash", note="stands for no row at all")


def nothing(_case: Case, _metric: str, _luck: random.Random) -> Result | None:
    """Every number is there."""
    return None


def scattered(_case: Case, metric: str, luck: random.Random) -> Result | None:
    """Of a tenth of the numbers each: none, a failure, a doubt under which the number is absurd."""
    draw = luck.random()
    if draw < 0.1:
        return MISSING
    if draw < 0.2:
        return Result(metric, "out_of_memory", note="too large")
    return Result(metric, samples=(1e9,), note="noisy") if draw < 0.3 else None


def latency_only(case: Case, metric: str, luck: random.Random) -> Result | None:
    """Only latencies are lost."""
    return scattered(case, metric, luck) if metric == "latency_s" else None


def without_none(case: Case, metric: str, _luck: random.Random) -> Result | None:
    """No network without skips ran to its end."""
    return Result(metric, "crash", note="it fell") if case.spec.skip == "none" and metric == "latency_s" else None


def one_pair(case: Case, metric: str, _luck: random.Random) -> Result | None:
    """A single cell has a latency."""
    first = (case.spec.depth, case.spec.width) == (1, 4)
    return MISSING if metric == "latency_s" and not first else None


def all_doubtful(_case: Case, metric: str, luck: random.Random) -> Result | None:
    """Every latency has a doubt."""
    return Result(metric, samples=(luck.random(),), note="held up") if metric == "latency_s" else None


def tied(case: Case, metric: str, _luck: random.Random) -> Result | None:
    """Every scheme and every variant costs the same."""
    return Result(metric, samples=(float(case.spec.width * case.spec.depth * case.batch),))


def gated_is_rare(case: Case, metric: str, _luck: random.Random) -> Result | None:
    """One scheme has too few cells to be compared with the others."""
    return MISSING if case.spec.skip == "gated" and case.spec.width > 4 and metric == "latency_s" else None


def crossing(case: Case, metric: str, _luck: random.Random) -> Result | None:
    """UNet 3+ has more parameters at depth 1 only, and more MACs at width 4 only."""
    if case.spec.variant != "unet3+" and metric in ("params", "conv_macs"):
        return Result(metric, samples=(100.0 * case.batch,))
    if metric == "params":
        return Result(metric, samples=({1: 150.0, 2: 50.0}[case.spec.depth] * case.batch,))
    if metric == "conv_macs":
        return Result(metric, samples=({4: 200.0}.get(case.spec.width, 50.0) * case.batch,))
    return None


SPOILS = (nothing, crossing, scattered, latency_only, without_none, one_pair, all_doubtful, tied, gated_is_rare)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Stores by how they are spoilt and from which seed, each written once."""

    @cache
    def write(spoil: Spoil, seed: int) -> Path:
        path = tmp_path_factory.mktemp("made-up") / "x.sqlite"
        with create_store(path) as store:
            fill(store, seed, spoil)
        return path

    return lambda spoil, seed=0: write(spoil, seed)


@pytest.mark.parametrize(("spoil", "seed"), [*((each, 0) for each in SPOILS), (scattered, 1), (latency_only, 2)])
def test_every_sentence_is_what_loops_over_the_rows_find(spoil: Spoil, seed: int, made_up: Callable[..., Path]) -> None:
    """All of them and no other, word by word, whatever survived."""
    path = made_up(spoil, seed)

    assert sorted(told_by_the_report(path)) == sorted(told_again(path))


def test_the_small_stores_sentences_are_found_again(tmp_path: Path) -> None:
    """The store of the golden file, whose numbers come from the graphs."""
    path = make_store(tmp_path / "tiny.sqlite")

    told = told_by_the_report(path)

    assert sorted(told) == sorted(told_again(path))
    assert {text.partition(":")[0] for text in told} == {*TOPICS} - {"Memory"}


def test_two_devices_never_meet_in_a_sentence(tmp_path: Path) -> None:
    """Where inference was timed on one device and training on another, each has its sentences."""
    path = tmp_path / "x.sqlite"
    with create_store(path) as store:
        fill(store, 0, lambda case, *_: MISSING if case.mode == "training" else None)
        fill(store, 1, lambda case, *_: MISSING if case.mode == "inference" else None, device="cuda")

    told = told_by_the_report(path)

    assert sorted(told) == sorted(told_again(path))
    assert any("training step" in text for text in told)
    assert not any("the latency" in text and "training step" in text for text in told)


@pytest.mark.parametrize("spoil", [one_pair, all_doubtful])
def test_nothing_is_said_of_latencies_that_are_too_few(spoil: Spoil, made_up: Callable[..., Path]) -> None:
    """One pair is no rule, and a doubt is none; what is exact is told all the same."""
    told = told_by_the_report(made_up(spoil))

    assert not any("latency" in text or "training step" in text for text in told)
    assert any(text.startswith("Variants") and "parameters" in text for text in told)


def test_a_tie_names_all_who_tie(made_up: Callable[..., Path]) -> None:
    """Nobody wins by standing first in a table."""
    told = told_by_the_report(made_up(tied))

    assert any("concat, sum and gated are equally the cheapest in" in text for text in told)
    assert not any(" is the cheapest" in text for text in told)


def test_a_failure_without_skips_silences_what_is_told_in_its_terms(made_up: Callable[..., Path]) -> None:
    """Schemes are told as times no skips: where that has no number there is no sentence, and none over other cells."""
    told = told_by_the_report(made_up(without_none))

    of_schemes = [text for text in told if text.startswith(("What skips cost", "Cheapest skips"))]
    assert of_schemes
    assert not any("latency" in text for text in of_schemes)


def test_latencies_that_cross_have_no_cheapest(made_up: Callable[..., Path]) -> None:
    """Scattered by 40 % either way, schemes that are a tenth apart cannot be told apart, and are not."""
    told = told_by_the_report(made_up(nothing))

    assert any("cannot be told apart as the cheapest in latency" in text for text in told)
    assert not any(text.startswith("Cheapest") and "is the cheapest in latency" in text for text in told)


def test_a_scheme_with_few_cells_is_left_out_by_name(made_up: Callable[..., Path]) -> None:
    """It does not shrink what the others are compared in."""
    told = told_by_the_report(made_up(gated_is_rare))

    (text,) = (text for text in told if text.startswith("Cheapest skips"))
    sentence = next(each for each in text.split("). ") if "Of concat and sum, in U-Net" in each)
    assert " latency" in sentence
    assert sentence.endswith("(6 matched cells, without gated: too few in common")


def test_a_crossover_is_told_by_depth_and_never_pooled(made_up: Callable[..., Path]) -> None:
    """More parameters at one depth and fewer at another: no median over both, and none where width decides."""
    told = told_by_the_report(made_up(crossing))

    (text,) = (text for text in told if text.startswith("Variants: UNet 3+"))
    assert "parameters either way by depth (1.50" in text
    assert " at depth 1 and 0.500" in text
    assert f"0.500{TIMES} to 2.00{TIMES} [counted] the MACs, more in some cells and less in others" in text
