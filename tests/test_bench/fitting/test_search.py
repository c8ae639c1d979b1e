"""The search of `fit`: its rows are those that looking at every network would give, and its borders are real ones."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipcost.bench.cases.case import Case
from skipcost.bench.fitting.lattice import lattice, read_axes
from skipcost.bench.fitting.limits import LIMITS, Limits, Source, counted
from skipcost.bench.fitting.search import Candidate, Found, last_true, ranked, refusal
from skipcost.unet_models import ModelSpec

FIXED = {"device": "cpu", "mode": "training", "size": "64", "precision": "fp32"}
AXES = {"depth": ["1..3"], "width": ["8..48"]}


@dataclass(frozen=True)
class Affine:
    """Peak bytes that grow with the batch; what `bench.liveness.Envelope` is in earnest."""

    fixed: int
    per_image: int

    def peak(self, batch: int) -> int:
        return self.fixed + batch * self.per_image

    def largest_batch(self, limit_bytes: int) -> int:
        return max(0, (limit_bytes - self.fixed) // self.per_image)


def floor(case: Case) -> Affine:
    """A stand-in for live bytes: weights and all activations."""
    graph = case.graph()
    return Affine(4 * graph.params(), 4 * graph.activations(case.height, case.width))


def memory(case: Case) -> float:
    """A stand-in for what a process takes: more than the floor, by an amount that depends on the case."""
    return 1.1 * floor(case).peak(case.batch) + 1000


def latency(case: Case) -> float:
    """A stand-in for time: a fixed part and MACs."""
    return 1e-3 + case.batch * case.graph().conv_macs(case.height, case.width) / 1e11


SOURCE = Source(counted() | {"memory": memory, "latency": latency}, dict.fromkeys(LIMITS, "here"), floor)


def found(limits: Limits, settings: dict[str, Any] = AXES, *, search_batch: bool = False) -> list[Found]:
    """Every network that the search yields, in its order."""
    candidates = [Candidate(line, line.widths) for line in lattice(read_axes(settings), FIXED, None).lines]
    return list(ranked(candidates, limits, search_batch=search_batch, tell=lambda *_: None))


def by_looking_at_all(limits: Limits, settings: dict[str, Any]) -> list[tuple[str, int]]:
    """The oracle: each line's widest network that fits, ranked by receptive field, width, and the order of the axes."""
    rows = []
    for number, line in enumerate(lattice(read_axes(settings), FIXED, None).lines):
        fitting = [width for width in line.widths if limits.fits(line.at(width))]
        if fitting:
            case = line.at(fitting[-1])
            rows.append((-case.graph().receptive_field(), -case.spec.width, number, case.spec.label))
    return [(label, -width) for _, width, _, label in sorted(rows)]


LOW_AND_HIGH = [
    {"params": 40_000.0},
    {"macs": 3e8},
    {"memory": 6e6},
    {"latency": 3e-3},
    {"params": 200_000.0, "macs": 1e9, "memory": 2e7, "latency": 8e-3},
    {"memory": 1e12},
]


@pytest.mark.parametrize("most", LOW_AND_HIGH, ids="+".join)
@pytest.mark.parametrize("settings", [AXES, AXES | {"max_width": ["32", "48"], "upsample": ["bilinear"]}])
def test_the_ranking_is_that_of_looking_at_every_network(most: dict[str, float], settings: dict[str, Any]) -> None:
    """Best-first with bounds leaves out no network and changes no place, capped widths included."""
    limits = Limits(most, SOURCE)

    rows = found(limits, settings)

    labels = [label for label, _ in by_looking_at_all(limits, settings)]
    assert [row.here.case.spec.label for row in rows] == list(dict.fromkeys(labels))


@pytest.mark.parametrize("limit", [3e6, 6e6, 2e7])
def test_a_figure_that_falls_with_the_width_somewhere_is_not_bisected(limit: float) -> None:
    """An allocator's segments may make a wider network fit where a narrower one does not: the widest is found."""

    def jagged(case: Case) -> float:
        return memory(case) * (1 if case.suite_spec.width % 24 == 0 else 1.6)

    limits = Limits({"memory": limit}, replace(SOURCE, measures=dict(SOURCE.measures) | {"memory": jagged}, even=False))

    rows = found(limits)

    assert [row.here.case.spec.label for row in rows] == [label for label, _ in by_looking_at_all(limits, AXES)]


def test_a_line_is_walked_only_as_far_as_the_ranking_needs() -> None:
    """A line that never fits is left at the width at which another one leads: replays are what a search costs."""
    asked: list[int] = []

    def only_without_skips(case: Case) -> float:
        if case.suite_spec.skip == "none":
            return 0.0 if case.suite_spec.width <= 40 else math.inf
        asked.append(case.suite_spec.width)
        return math.inf

    source = replace(SOURCE, measures=dict(SOURCE.measures) | {"memory": only_without_skips}, even=False)
    settings = {"variant": ["unet"], "skip": ["concat", "none"], "depth": ["2"], "width": ["8..64"]}
    candidates = [Candidate(line, line.widths) for line in lattice(read_axes(settings), FIXED, None).lines]

    first = next(ranked(candidates, Limits({"memory": 1e12}, source), search_batch=False, tell=lambda *_: None))

    assert first.here.case.spec.label == "unet/d2/w40/none"
    assert asked == [64, 56, 48, 40]


@pytest.mark.parametrize("most", LOW_AND_HIGH, ids="+".join)
def test_what_lies_inside_fits_and_what_lies_outside_does_not(most: dict[str, float]) -> None:
    """Of each row the network itself and the one inside keep every limit; the next wider and the next batch do not."""
    limits = Limits(most, SOURCE)

    for row in found(limits, search_batch=True):
        assert limits.fits(row.here.case)
        assert limits.fits(row.inside.case)
        for outside in (row.outside, row.more_images):
            assert outside is None or (outside.broken and not limits.fits(outside.case))
        assert row.more_images is None or row.more_images.case == replace(row.here.case, batch=row.here.case.batch + 1)
        assert (row.outside is None) == (row.inside.case.spec.width == 48)


@pytest.mark.parametrize("most", [{"memory": 5e7}, {"latency": 5e-2}, {"memory": 5e7, "latency": 5e-2}])
def test_the_batch_is_the_largest_that_fits(most: dict[str, float]) -> None:
    """Found by bisection between the least batch and what the floor allows, it is what trying each batch gives."""
    limits = Limits(most, SOURCE)

    for row in found(limits, search_batch=True)[::7]:
        case = row.here.case
        fitting = itertools.takewhile(lambda b: limits.fits(replace(case, batch=b)), itertools.count(1))  # noqa: B023
        assert case.batch == max(fitting)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_kept_by_what_equals_it(name: str) -> None:
    """At most means at most: the figure itself is allowed, anything above is not."""
    case = lattice(read_axes(AXES), FIXED, None).lines[0].first
    figure = SOURCE.measures[name](case)

    assert Limits({name: figure}, SOURCE).fits(case)
    assert Limits({name: figure}, SOURCE).may_fit(case)
    assert Limits({name: figure}, SOURCE).standing(case).broken == ()
    assert Limits({name: figure * 0.999}, SOURCE).standing(case).broken == (name,)


def test_without_a_limit_that_depends_on_it_the_batch_stays() -> None:
    """Parameters and MACs of one image say nothing about a batch: it is the least, and no larger one is a proof."""
    rows = found(Limits({"params": 1e6}, SOURCE), search_batch=True)

    assert {row.here.case.batch for row in rows} == {1}
    assert {row.more_images for row in rows} == {None}


def test_running_is_asked_for_last_and_from_the_narrow_end() -> None:
    """A figure that takes running a network is never asked of one that cannot fit, and begins with narrow ones."""
    ran: list[int] = []

    def run(case: Case) -> float:
        assert memory(case) <= 6e6
        ran.append(case.spec.width)
        return latency(case)

    source = replace(SOURCE, measures=dict(SOURCE.measures) | {"latency": run}, by_running=("latency",))
    most = {"memory": 6e6, "latency": 2e-3}

    rows = found(Limits(most, source), {"variant": ["unet"], "skip": ["concat"], "depth": ["2"], "width": ["8..48"]})

    assert [row.here.case.spec.label for row in rows] == ["unet/d2/w16/concat"]
    assert ran[0] == 8


def test_scores_come_before_everything_else() -> None:
    """Scored networks are ranked by score, whatever their width; the rest follow by receptive field."""
    lines = lattice(read_axes({"variant": ["unet"], "skip": ["concat"], "depth": ["1..2"]}), FIXED, None).lines
    scored = [Candidate(lines[0], (16,), 0.7), Candidate(lines[1], (8,), 0.9), Candidate(lines[1], (1024,), 0.99)]
    limits = Limits({"params": 500_000.0}, SOURCE)

    rows = list(
        ranked([*scored, *(Candidate(line, line.widths) for line in lines)], limits, search_batch=False, tell=print)
    )

    assert [(row.score, row.here.case.spec.label) for row in rows[:2]] == [
        (0.9, "unet/d2/w8/concat"),
        (0.7, "unet/d1/w16/concat"),
    ]
    assert [row.score for row in rows[2:]] == [None, None]
    assert rows[0].inside.case.spec == rows[2].here.case.spec


def test_a_network_is_shown_once() -> None:
    """A cap that caps nothing, and a second label, make no second row."""
    settings = {"variant": ["unet", "unet++"], "skip": ["concat", "same"], "depth": ["2"], "width": ["8..32"]}

    rows = found(Limits({"params": 200_000.0}, SOURCE), settings | {"max_width": ["none", "512"]})

    graphs = [row.here.case.graph() for row in rows]
    assert len(set(graphs)) == len(graphs) == 2
    assert {"unet/d2/w16/same", "unet++/d2/w16/same"} <= {alias for row in rows for alias in row.aliases}


def test_each_step_tells_the_best_so_far() -> None:
    """What is told is a network that fits, and ends with the first row."""
    told: list[tuple[int, str]] = []
    limits = Limits({"macs": 3e8}, SOURCE)
    candidates = [Candidate(line, line.widths) for line in lattice(read_axes(AXES), FIXED, None).lines]

    rows = list(ranked(candidates, limits, search_batch=False, tell=lambda *step: told.append(step)))

    assert told[-1] == (len(candidates), rows[0].here.case.spec.label)
    assert all(not label or limits.fits(replace(rows[0].here.case, spec=ModelSpec.parse(label))) for _, label in told)


@pytest.mark.parametrize(
    ("most", "sentence"),
    [
        (
            {"params": 100.0},
            r"no network has parameters of 100 or less: the least is \S+ k, of unet/d1/w8/",
        ),
        ({"memory": 1000.0}, r"no network has memory of 1000 B or less: the least is .* KiB, of unet/d1/w8/"),
        ({"latency": 1e-4}, r"no network has latency of 100 µs or less: the least is 1\.\d+ ms"),
        (
            {"params": 4000.0, "latency": 1e-4},
            r"no network has parameters of 4.00 k or less.*; no network has latency of 100 µs or less",
        ),
    ],
)
def test_a_limit_that_nothing_keeps_is_named_with_the_least_there_is(most: dict[str, float], sentence: str) -> None:
    """The sentence says which limit is too low, and the smallest network's figure."""
    candidates = [Candidate(line, line.widths) for line in lattice(read_axes(AXES), FIXED, None).lines]

    error = refusal(candidates, Limits(most, SOURCE))

    assert error.exit_code == 2
    with pytest.raises(type(error), match=sentence):
        raise error


def test_limits_that_exclude_each_other_are_told_apart_from_limits_too_low() -> None:
    """Where each limit alone can be kept, the least network for each is named with what it breaks."""
    settings = {"variant": ["unet"], "skip": ["concat"], "depth": ["1,3"], "width": ["8"]}
    source = replace(SOURCE, measures=dict(SOURCE.measures) | {"latency": lambda case: 1.0 / case.spec.depth})
    line_1, line_3 = (lattice(read_axes(settings | {"depth": [depth]}), FIXED, None).lines[0] for depth in "13")
    candidates = [Candidate(line, line.widths) for line in (line_1, line_3)]
    most = {"params": line_1.first.graph().params(), "latency": 0.5}

    error = refusal(candidates, Limits(most, source))

    assert "no network keeps all of them at once" in str(error)
    assert "unet/d1/w8/concat, the least in parameters, breaks latency (1.00 s, at most 500 ms)" in str(error)


def test_the_least_memory_is_exact_although_the_floor_ranks_otherwise() -> None:
    """The floor orders the candidates; the figure that is checked decides which is the least."""

    def odd(case: Case) -> float:
        return memory(case) * (3 if case.spec.variant == "unet" else 1)

    source = replace(SOURCE, measures=dict(SOURCE.measures) | {"memory": odd})
    candidates = [Candidate(line, line.widths) for line in lattice(read_axes(AXES), FIXED, None).lines]
    least = min((each.line.first for each in candidates), key=odd)

    error = refusal(candidates, Limits({"memory": 10.0}, source))

    assert f"of {least.spec.label} at batch 1" in str(error)


@given(st.integers(-5, 40), st.integers(0, 60), st.integers(-10, 70), st.booleans())
def test_the_last_number_that_passes_is_found(low: int, count: int, border: int, upwards: bool) -> None:  # noqa: FBT001
    """From either end, with few calls, and without asking outside the range."""
    asked: list[int] = []

    def passes(number: int) -> bool:
        assert low <= number < low + count
        asked.append(number)
        return number <= border

    found_at = last_true(low, low + count, passes, upwards=upwards)

    assert found_at == max([low - 1, *(n for n in range(low, low + count) if n <= border)])
    assert len(set(asked)) == len(asked) <= 2 * math.log2(count + 1) + 2
