"""A timeline of live bytes told in few words: what is alive at the peak, and the largest maps with their lives.

What is stored with a prediction and what a report draws. Kept to about 4 KB: a case's whole timeline comes from
`liveness.timeline` in a millisecond.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipcost.bench.cases.record import Result
from skipcost.bench.memory.liveness import Timeline, at_peak, peaks_of, timeline, tracks, workspace_bytes

if TYPE_CHECKING:
    from skipcost.bench.cases.case import Case

STANDING = ("parameter", "buffer", "optimizer", "input", "gradient")  # kinds whose storages are told as one sum
MOST_AT_PEAK = 12
MOST_TRACKS = 40


@dataclass(frozen=True, slots=True)
class Life:
    """A storage of the steady step between two of its moments, both included."""

    name: str
    kind: str
    bytes: int
    first: int
    last: int


def moments(line: Timeline) -> list[str]:
    """What runs in the steady step, in order; the axis of `lives`."""
    return [what for start, what in line.moments if start >= line.steady_from]


def lives(line: Timeline) -> list[Life]:
    """Every storage that is made in the steady step, in the order of their making."""
    starts = [start for start, _ in line.moments if start >= line.steady_from]
    found = []
    for each in tracks(line):
        if each.start >= line.steady_from:
            first, last = bisect_right(starts, each.start) - 1, bisect_right(starts, each.end) - 1
            found.append(Life(each.name, each.kind, each.bytes, first, last))
    return found


def summary(line: Timeline) -> dict[str, Any]:
    """The steady step as JSON values.

    `at_peak` has the largest storages alive at the peak and `rest` the others' bytes; `standing` the bytes of what is
    there before the step, by kind; `lives` the largest storages made in it, with the first and last of its `moments`.
    """
    moment, alive = at_peak(line)
    axis = moments(line)
    made = sorted(lives(line), key=lambda each: -each.bytes * (1 + each.last - each.first))[:MOST_TRACKS]
    standing = dict.fromkeys(STANDING, 0)
    before = [each for each in tracks(line) if each.start < line.steady_from <= each.end]
    for each in before:
        standing[each.kind if each.kind in standing else "gradient"] += each.bytes
    return {
        "moment": moment,
        "at_peak": [[each.name, each.kind, each.bytes] for each in alive[:MOST_AT_PEAK]],
        "rest": sum(each.bytes for each in alive[MOST_AT_PEAK:]),
        "standing": standing,
        "moments": len(axis),
        "lives": [
            [each.name, each.kind, each.bytes, each.first, each.last] for each in sorted(made, key=lambda e: e.first)
        ],
    }


def predicted(case: Case) -> list[Result]:
    """Give the two predicted peaks of a case, the steady step's with its timeline in few words.

    Where convolutions run at low resolution, `workspace_bytes` beside it bounds what one of them adds inside, on a CPU.
    """
    line = timeline(case)
    first, steady = peaks_of(line)
    inside = workspace_bytes(case)
    detail = summary(line) | ({"workspace_bytes": inside} if inside else {})
    return [
        Result("peak_memory_predicted_bytes", samples=(steady,), detail=detail),
        Result("peak_memory_predicted_first_bytes", samples=(first,)),
    ]
