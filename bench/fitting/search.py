"""The search of `skipcost fit`: the best networks within the limits, each with what lies just inside and just outside.

Best-first over lines of networks: a line's place in the ranking is bounded from above, first by its widest network,
then by the widest that the cheap figures allow, and only a line that leads the ranking is worked out exactly. So the
rows are what looking at every network would give (a test does), at the cost of the few lines that matter. Where figures
grow along a line the border is found by bisection; where they need not, it is walked to from the wide end. The largest
batch is always bisected: with it fits, with one image more it does not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from skipcost.bench.cases.case import Case
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.limits import LIMITS, Limits, Order, Standing
from skipcost.bench.units import MAX_BATCH
from skipcost.unet_models import ModelSpec, SkipGraph

if TYPE_CHECKING:
    from skipcost.bench.fitting.lattice import Line

TOUCHED_BY_BATCH = ("memory", "latency")  # the limits that a larger batch can break: MACs count for one image


@dataclass(frozen=True, slots=True)
class Candidate:
    """A line and the widths on it that may be chosen: all, or the one that has a score."""

    line: Line
    widths: tuple[int, ...]
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A row of the answer: the network, and its line's border.

    `inside` is the widest network of the line that fits, `outside` the next one, None where there is no wider on the
    lattice; `more_images` is the network itself with one image more, where the batch is searched.
    """

    here: Standing
    receptive_field: int
    score: float | None
    aliases: tuple[str, ...]
    inside: Standing
    outside: Standing | None
    more_images: Standing | None


@dataclass(order=True, slots=True)
class _Entry:
    """A candidate in the queue, by its best possible place: `stage` tests have been applied to its widths."""

    key: tuple[float, ...]
    candidate: Candidate = field(compare=False)
    widths: tuple[int, ...] = field(compare=False)
    stage: int = field(compare=False, default=0)


def last_true(low: int, high: int, test: Callable[[int], bool], *, upwards: bool = False) -> int:
    """Return the last number of range(low, high) that passes a test which numbers pass up to one and then fail.

    `low - 1` where none passes. Strides that double, from the top or `upwards`, find an interval to bisect, so that few
    calls are needed where the answer lies near that end.
    """
    passed, failed, stride = low - 1, high, 1
    while failed - passed > 1 and stride:
        at = min(passed + stride, failed - 1) if upwards else max(failed - stride, passed + 1)
        if test(at):
            passed = at
            stride = 2 * stride if upwards else 0
        else:
            failed = at
            stride = 0 if upwards else 2 * stride
    while failed - passed > 1:
        middle = (passed + failed) // 2
        passed, failed = (middle, failed) if test(middle) else (passed, middle)
    return passed


def widest(line: Line, widths: Sequence[int], test: Callable[[Case], bool], order: Order = "bisect") -> int:
    """Position in `widths` of the widest network of the line that passes; -1 where none does.

    A line that is uneven is walked from its wide end, whatever the order.
    """

    def passes(index: int) -> bool:
        return test(line.at(widths[index]))

    if line.uneven or order == "walk":
        return next((index for index in reversed(range(len(widths))) if passes(index)), -1)
    return last_true(0, len(widths), passes, upwards=order == "upwards")


def largest_batch(case: Case, limits: Limits) -> int:
    """The largest batch with which a case that fits still fits; its own where no limit depends on the batch."""
    if not any(name in limits.most for name in TOUCHED_BY_BATCH):
        return case.batch
    bound = MAX_BATCH
    if "memory" in limits.most:
        bound = min(bound, limits.source.floor(case).largest_batch(int(limits.most["memory"])))
    return last_true(
        case.batch,
        bound + 1,
        lambda batch: limits.fits(replace(case, batch=batch)),
        upwards=bool(limits.source.by_running),
    )


def ranked(
    candidates: Sequence[Candidate], limits: Limits, *, search_batch: bool, tell: Callable[[int, str], None]
) -> Iterator[Found]:
    """Yield the networks that fit, best first: by score where there is one, then receptive field, then width.

    Of networks that rank alike, the earlier candidate comes first. `tell` hears after every step how many candidates
    were looked at and the label of the best network known to fit, empty at first.
    """
    fields = _receptive_fields(candidates)
    queue = [
        _Entry(_key(each, fields[index], each.widths[-1], index), each, each.widths)
        for index, each in enumerate(candidates)
    ]
    heapq.heapify(queue)
    seen: set[tuple[SkipGraph, str]] = set()
    looked_at, best = 0, _Entry((math.inf,), candidates[0], ())
    while queue:
        entry = heapq.heappop(queue)
        candidate, index = entry.candidate, int(entry.key[-1])
        if entry.stage == len(limits.tests):
            found = _found(candidate, entry.widths[-1], fields[index], limits, search_batch=search_batch)
            if (identity := _identity(found.here.case)) not in seen:
                seen.add(identity)
                yield found
            continue
        looked_at += not entry.stage and entry.widths == candidate.widths
        if following := _tested(entry, fields[index], limits):
            heapq.heappush(queue, following)
            best = min(best, following) if following.stage == len(limits.tests) else best
        tell(looked_at, best.candidate.line.at(best.widths[-1]).spec.label if best.widths else "")


def _tested(entry: _Entry, receptive_field: int, limits: Limits) -> _Entry | None:
    """The entry after a step of its next test; None where no width is left.

    Where a line has to be walked, a step is one width: another line may lead the ranking before this one's end.
    """
    candidate, index = entry.candidate, int(entry.key[-1])
    test, order = limits.tests[entry.stage]
    if candidate.line.uneven or order == "walk":
        passed = test(candidate.line.at(entry.widths[-1]))
        kept = entry.widths if passed else entry.widths[:-1]
    else:
        passed = True
        kept = entry.widths[: widest(candidate.line, entry.widths, test, order) + 1]
    if not kept:
        return None
    return _Entry(_key(candidate, receptive_field, kept[-1], index), candidate, kept, entry.stage + passed)


def _key(candidate: Candidate, receptive_field: int, width: int, index: int) -> tuple[float, ...]:
    unscored = candidate.score is None
    return (unscored, 0.0 if candidate.score is None else -candidate.score, -receptive_field, -width, index)


def _receptive_fields(candidates: Sequence[Candidate]) -> list[int]:
    """Each candidate's receptive field, worked out once for lines that differ in channels, norm or bias alone."""
    known: dict[ModelSpec, int] = {}
    result = []
    for each in candidates:
        spec = each.line.first.suite_spec
        bare = replace(spec, width=1, max_width=None, norm="none", bias=True, in_channels=1, classes=1)
        if bare not in known:
            known[bare] = each.line.first.with_spec(bare).graph().receptive_field()
        result.append(known[bare])
    return result


def _identity(case: Case) -> tuple[SkipGraph, str]:
    """What makes two rows the same: the network and what is done with it, whatever its label."""
    return case.graph(), replace(case, spec=ModelSpec(), outputs="all").to_json()


def _found(candidate: Candidate, width: int, receptive_field: int, limits: Limits, *, search_batch: bool) -> Found:
    line = candidate.line
    case = line.at(width)
    more_images = None
    if search_batch:
        case = replace(case, batch=largest_batch(case, limits))
        if any(name in limits.most for name in TOUCHED_BY_BATCH) and case.batch < MAX_BATCH:
            more_images = limits.standing(replace(case, batch=case.batch + 1))
    here = limits.standing(case)
    last = line.widths.index(width) if candidate.score is None else _border(line, limits)
    inside = here if line.widths[last] == width else limits.standing(line.at(line.widths[last]))
    outside = limits.standing(line.at(line.widths[last + 1])) if last + 1 < len(line.widths) else None
    return Found(here, receptive_field, candidate.score, line.labels(width), inside, outside, more_images)


def _border(line: Line, limits: Limits) -> int:
    """Position of the widest network of a line that fits, for a row that is not itself at its line's border."""
    widths = line.widths
    for test, order in limits.tests:
        widths = widths[: widest(line, widths, test, order) + 1]
    return len(widths) - 1


def refusal(candidates: Sequence[Candidate], limits: Limits) -> BenchError:
    """The sentence for limits that no candidate keeps: which one is too low, and the least that there is."""
    least = {name: _least(candidates, name, limits) for name in limits.most}
    parts = [_too_low(name, standing, limits) for name, standing in least.items() if name in standing.broken]
    if not parts:
        each = [
            f"{at.case.spec.label}, the least in {LIMITS[name].title}, breaks {_broken(at, limits)}"
            for name, at in least.items()
        ]
        parts = ["each limit can be kept, but no network keeps all of them at once: " + "; ".join(each)]
    return BenchError("; ".join(parts) + "; raise the limit, or widen the choice with --size, --precision or --set")


def _too_low(name: str, standing: Standing, limits: Limits) -> str:
    limit, case = LIMITS[name], standing.case
    least, most = limit.beside(standing.figures[name], limits.most[name])
    said = f"no network has {limit.title} of {most} or less"
    if math.isinf(standing.figures[name]):
        return f"{said} for sure: {standing.remark}"
    return f"{said}: the least is {least}, of {case.spec.label} at batch {case.batch}"


def _broken(standing: Standing, limits: Limits) -> str:
    parts = []
    for name in standing.broken:
        figure, most = LIMITS[name].beside(standing.figures[name], limits.most[name])
        parts.append(f"{LIMITS[name].title} ({figure}, at most {most})")
    return ", ".join(parts)


def _least(candidates: Sequence[Candidate], name: str, limits: Limits) -> Standing:
    """The candidate with the least of a figure; the narrowest of each line is looked at."""
    measure, floor = limits.source.measures[name], limits.source.floor
    cases = [each.line.at(each.widths[0]) for each in candidates]
    if name != "memory":
        return limits.standing(min(cases, key=measure))
    bounded = sorted(((floor(case).peak(case.batch), index) for index, case in enumerate(cases)))
    best, least = cases[bounded[0][1]], measure(cases[bounded[0][1]])
    for bound, index in bounded[1:]:
        if bound >= least:
            break
        if (figure := measure(cases[index])) < least:
            best, least = cases[index], figure
    return limits.standing(best)
