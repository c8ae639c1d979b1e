"""A result: one metric of one case, with its raw samples and how it went. Plain values, no torch."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from skipcost.bench.decoding import check_fields, check_kind, check_members, is_number

DETAIL = {  # what is read of a detail, where it has it
    "low": float,
    "high": float,
    "by_operator": dict,
    "not_counted": dict,
    "printed": str,
    "device": str,
    "flop_per_s": float,
    "bandwidth_bytes_per_s": float,
    "sources": dict,
    "layers": dict,
}
NEEDED = {"roofline_s": ("device", "flop_per_s", "bandwidth_bytes_per_s", "sources"), "layers_s": ("layers",)}
OUTCOMES = ("ok", "out_of_memory", "timeout", "crash", "unsupported", "throttled")

FAILED = OUTCOMES[1:]
NUMBERED = ("ok", "throttled")  # outcomes of results with samples
NAMED = 3  # networks beside a reason
MOST_OF_AN_ERROR = 400  # characters; what follows is a stack of C++ frames


def outcome_of(
    error: Exception, refusal: type[Exception], others: Mapping[str, str], no_memory: Sequence[str] = ()
) -> tuple[str, str]:
    """The outcome and the note of what was raised; notes of the exception itself say where it came from.

    refusal: its text alone says why something is unsupported. others: outcomes of exceptions by name; of the rest, what
    has words of `no_memory` ran out of it, and all else is a crash.
    """
    text = " ".join(str(error).encode(errors="backslashreplace").decode().split())
    if isinstance(error, refusal):
        return "unsupported", text
    kind = type(error).__name__
    where = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    usual = "out_of_memory" if any(words in text for words in no_memory) else "crash"
    return others.get(kind, usual), f"{kind}: {text[:MOST_OF_AN_ERROR]}{where}"


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the store. `samples` are raw, in the metric's base unit; empty unless the outcome is ok or throttled.

    `note` is one sentence for people: why there is no number, or what makes it doubtful. `detail` is what the metric
    wants to keep beside it (operators not counted, warm-up calls), as JSON values.
    """

    metric: str
    outcome: str = "ok"
    samples: tuple[float, ...] = ()
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an outcome outside the list: a misspelt failure would read as an absent one."""
        if self.outcome not in OUTCOMES:
            message = f"outcome {self.outcome!r} is unknown; accepted: {', '.join(OUTCOMES)}"
            raise ValueError(message)

    def values(self) -> dict[str, Any]:
        """Its fields as JSON values: one line of the worker's output."""
        return {name: getattr(self, name) for name in ("metric", "outcome", "samples", "note", "detail")}

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.values())

    def check(self, *, counted: bool) -> None:
        """Refuse what no measuring makes; ValueError. counted: the samples are whole numbers where they are finite."""
        check_kind("note", self.note, str)
        check_fields(self.detail, DETAIL)
        for name in ("by_operator", "not_counted", "layers"):
            check_members(name, self.detail.get(name, {}), float)
        check_members("sources", self.detail.get("sources", {}), str)
        for value in self.samples:
            if not is_number(value) or (counted and isfinite(value) and value != int(value)):
                message = f"a sample of {self.metric} is {value!r:.60}, which is no {'count' if counted else 'number'}"
                raise ValueError(message)
        lacking = [name for name in NEEDED.get(self.metric, ()) if self.outcome == "ok" and name not in self.detail]
        if lacking:
            message = f"the detail of {self.metric} has no {lacking[0]}"
            raise ValueError(message)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """Read what JSON made of `values`."""
        return cls(**{**values, "samples": tuple(values["samples"])})


def reasons_of(results: Iterable[tuple[str, Result]]) -> list[str]:
    """A line for each reason why results are not ok, the most frequent first: how many, of which networks, and why."""
    failed = ((label, each.outcome, each.note or "no reason is known") for label, each in results if not _is_ok(each))
    return _each_once(failed)


def notes_of(results: Iterable[tuple[str, Result]]) -> list[str]:
    """The same of what is to be known of numbers that there are: of which metric, of which networks, and what."""
    return _each_once((label, each.metric, each.note) for label, each in results if _is_ok(each) and each.note)


def _is_ok(result: Result) -> bool:
    return result.outcome == "ok"


def _each_once(said: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines of (label, word, text): each word with a text once, with how many and the first labels."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for label, word, text in said:
        found[word, text].append(label)
    lines = []
    for (word, text), labels in sorted(found.items(), key=lambda item: -len(item[1])):
        names = list(dict.fromkeys(labels))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"{len(labels)} {word} ({', '.join(names[:NAMED])}{more}): {text}")
    return lines


def value_of(result: Result) -> float | None:
    """What a table shows of a result: the median of its samples, or None where there is none, or none is a cost."""
    value = statistics.median(result.samples) if result.samples else nan
    return value if isfinite(value) and value >= 0 else None


def outcomes_of(results: dict[str, Result]) -> str:
    """One word for a case: ok, or the outcomes that are not, each with its metrics."""
    failed: dict[str, list[str]] = defaultdict(list)
    for name, result in results.items():
        if result.outcome != "ok":
            failed[result.outcome].append(name)
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in failed.items()) or "ok"
