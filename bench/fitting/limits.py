"""What a network may cost at most, and how each of those figures is worked out.

`LIMITS` is the one table of what can be limited. A `Source` holds the functions that give a case's figures, so that the
search knows neither devices nor models of memory and time; `fit` puts together the one that fits the command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.units import parse_bytes, parse_count, parse_seconds

Order = Literal["bisect", "upwards", "walk"]  # bisect, from the wide end or from the narrow one; try all


@dataclass(frozen=True, slots=True)
class Limit:
    """A row of LIMITS: the figure's name for people and for programs, its unit, and what reads it from a text."""

    title: str
    key: str
    unit: str  # a key of the formats in `figures`
    read: Callable[[object], float]

    def text(self, value: float) -> str:
        """The figure in words; an infinite one is one that nobody can tell."""
        return "unknown" if math.isinf(value) else figures.text(value, self.unit)

    def beside(self, value: float, most: float) -> tuple[str, str]:
        """A figure and its limit in words, with as many digits as it takes to tell them apart."""
        return (self.text(value), self.text(most)) if math.isinf(value) else figures.apart(value, most, self.unit)


LIMITS: dict[str, Limit] = {
    "params": Limit("parameters", "params", "count", parse_count),
    "macs": Limit("MACs per image", "conv_macs_per_image", "macs", parse_count),
    "memory": Limit("memory", "memory_bytes", "bytes", parse_bytes),
    "latency": Limit("latency", "latency_s", "seconds", parse_seconds),
}


class Peaks(Protocol):
    """Peak bytes as a function of the batch; `bench.liveness.Envelope` is one."""

    def peak(self, batch: int) -> int:
        """Bytes at a batch."""

    def largest_batch(self, limit_bytes: int) -> int:
        """The largest batch whose peak is within the limit; 0 where not even one image is."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the figures of a case come from.

    `measures` gives each figure that can be limited, by its name in LIMITS, in the order in which to look at them;
    `origins` says of each in a few words where it comes from. `floor` gives bytes that memory is never below, for every
    batch and growing with the width: with it the search leaves out at little cost what cannot fit. `even` says that
    what is predicted grows with the width too, as an allocator's segments do not always. `by_running` names the
    figures that take running the network: they are asked for last, and from the narrow end. `middle` gives the median
    or likely figure where the one that is checked is an upper end; `remark` says what makes a case's figures doubtful,
    empty where nothing does.
    """

    measures: Mapping[str, Callable[[Case], float]]
    origins: Mapping[str, str]
    floor: Callable[[Case], Peaks]
    even: bool = True
    by_running: tuple[str, ...] = ()
    middle: Mapping[str, Callable[[Case], float]] = field(default_factory=dict)
    remark: Callable[[Case], str] = lambda _: ""


@dataclass(frozen=True, slots=True)
class Standing:
    """A case with its figures by name, the middle ones beside them, and the names of the limits that it breaks."""

    case: Case
    figures: dict[str, float]
    middle: dict[str, float]
    broken: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits asked for, by name in LIMITS, in base units, and the source that they are checked with."""

    most: dict[str, float]
    source: Source

    def may_fit(self, case: Case) -> bool:
        """Whether the cheap figures allow the case; False only where it cannot fit."""
        exact = ("params", "macs")
        if any(self.source.measures[name](case) > self.most[name] for name in exact if name in self.most):
            return False
        return "memory" not in self.most or self.source.floor(case).peak(case.batch) <= self.most["memory"]

    def predicted_to_fit(self, case: Case) -> bool:
        """Whether the case keeps every limit that can be checked without running it."""
        return self._keeps(case, tuple(name for name in self.source.measures if name not in self.source.by_running))

    def fits(self, case: Case) -> bool:
        """Whether the case keeps every limit; what takes running it comes last."""
        return self.predicted_to_fit(case) and self._keeps(case, self.source.by_running)

    def _keeps(self, case: Case, names: tuple[str, ...]) -> bool:
        return all(self.source.measures[name](case) <= self.most[name] for name in names if name in self.most)

    @property
    def tests(self) -> tuple[tuple[Callable[[Case], bool], Order], ...]:
        """Tests of growing cost, each narrower than the one before, and in what order to try the widths of a line.

        A prediction is nearly as low as its floor, so the border is near the wide end; running wide networks is slow.
        """
        predicted: Order = "bisect" if self.source.even else "walk"
        tests: tuple[tuple[Callable[[Case], bool], Order], ...]
        tests = ((self.may_fit, "bisect"), (self.predicted_to_fit, predicted))
        return (*tests, (self.fits, "upwards")) if self.source.by_running else tests

    def standing(self, case: Case) -> Standing:
        """All figures of a case and what it breaks; what cannot fit is not run."""
        skipped = () if self.predicted_to_fit(case) else self.source.by_running
        names = [name for name in LIMITS if name in self.source.measures and name not in skipped]
        known = {name: self.source.measures[name](case) for name in names}
        middle = {name: self.source.middle[name](case) for name in names if name in self.source.middle}
        broken = tuple(name for name in names if known[name] > self.most.get(name, math.inf))
        return Standing(case, known, middle, broken, self.source.remark(case))


def counted() -> dict[str, Callable[[Case], float]]:
    """The figures that are exact everywhere: parameters, and MACs of one image whatever the batch."""
    return {
        "params": lambda case: case.graph().params(),
        "macs": lambda case: case.graph().conv_macs(case.height, case.width),
    }
