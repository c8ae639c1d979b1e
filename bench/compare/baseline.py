"""A baseline: what the cases of a store cost when somebody last looked and found it good, as text made for a diff.

JSON lines: a header, then one case a line, sorted by name. `exact` holds every number that equal code must reproduce,
or the outcome of what has none; `noisy` holds medians rounded to two figures, for the reader alone: no file of
samples measured on another day can judge a latency, `skipcost ab` can.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result, value_of
from skipcost.bench.decoding import check_members, is_finite
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import Store

FORMAT, SCHEMA = "skipcost baseline", 1
FIGURES = 2  # of a noisy number: its third changes from day to day
UNSUPPORTED = "unsupported"  # the one outcome without a number that is as good as a number: it is decided by rule


@dataclass(frozen=True, slots=True)
class Entry:
    """A case of a baseline: its name for people, and its numbers by metric."""

    name: str
    exact: dict[str, float | str]
    noisy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Entries by the canonical JSON of their case; `versions` are those that exact numbers may rest on."""

    sweep: str
    versions: dict[str, str]
    entries: dict[str, Entry]

    @property
    def text(self) -> str:
        """The file's content: sorted, one case a line."""
        lines = [json.dumps({"format": FORMAT, "schema": SCHEMA, "sweep": self.sweep, "versions": self.versions})]
        for key, entry in sorted(self.entries.items(), key=lambda item: (item[1].name, item[0])):
            row = {"name": entry.name, "case": json.loads(key), "exact": entry.exact}
            lines.append(json.dumps(row | ({"noisy": entry.noisy} if entry.noisy else {})))
        return "\n".join(lines) + "\n"


def baseline_of(store: Store, chosen: Collection[str] | None = None) -> Baseline:
    """Take the newest environment's results; what failed is no number to hold others against, and is left out.

    chosen: the cases to take (`Store.results`).
    """
    run = store.newest()
    found = store.results(run.fingerprint, chosen)
    cases = {case_id: case for case_id, (case, _) in store.cases().items() if case_id in found}
    names = names_of(cases)
    entries = {}
    for case_id, results in found.items():
        case = cases[case_id]
        exact = {name: _exact(results[name]) for name in METRICS if name in results and METRICS[name].exact}
        noisy = {name: _rounded(results[name]) for name in METRICS if name in results and not METRICS[name].exact}
        kept = {name: value for name, value in exact.items() if value is not None}
        entries[case.key] = Entry(names[case_id], kept, {name: v for name, v in noisy.items() if v is not None})
    rests_on = sorted({package for metric in METRICS.values() for package in metric.rests_on})
    versions = run.environment.get("versions", {})
    public = {name: versions.get(name, "unknown").partition("+")[0] for name in rests_on}  # builds count alike
    return Baseline(run.sweep, public, entries)


def names_of(cases: dict[str, Case]) -> dict[str, str]:
    """A name for people for each case, by the same keys; the whole definition where two would be called the same."""
    often = Counter(case.name for case in cases.values())
    return {key: case.name if often[case.name] == 1 else case.key for key, case in cases.items()}


def failures_of(store: Store, chosen: Collection[str] | None = None) -> list[tuple[Case, Result]]:
    """Exact metrics of the newest environment's cases (of those `chosen`) that have no number though they should."""
    cases = store.cases()
    return [
        (cases[case_id][0], result)
        for case_id, results in store.results(store.newest().fingerprint, chosen).items()
        for result in results.values()
        if METRICS[result.metric].exact and _exact(result) is None
    ]


def _exact(result: Result) -> float | str | None:
    if result.outcome == UNSUPPORTED:
        return UNSUPPORTED
    value = value_of(result) if result.outcome == "ok" else None
    return value if value is not None and _sound(value) else None


def _rounded(result: Result) -> float | None:
    value = value_of(result)
    if value is None or not _sound(value):
        return None
    return float(f"{value:.{FIGURES}g}")


def _sound(value: float) -> bool:
    """Whether a number can be a cost: finite and not negative."""
    return math.isfinite(value) and value >= 0


def read_baseline(path: Path) -> Baseline:
    """Read a baseline; BenchError in one sentence for whatever is none: a gate without one must fail."""
    remedy = f"`skipcost baseline DB -o {path}` writes one"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        message = f"there is no baseline at {path}: {remedy}"
        raise BenchError(message) from None
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read the baseline {path} ({error}): {remedy}"
        raise BenchError(message) from None
    try:
        return _parse(lines)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path} is no baseline that can be compared with: {error}; {remedy}"
        raise BenchError(message) from None


def _parse(lines: list[str]) -> Baseline:
    if not lines:
        message = "it is empty"
        raise ValueError(message)
    header, *rows = [_line(number, text) for number, text in enumerate(lines, 1)]
    if header.get("format") != FORMAT:
        message = f'its first line does not say "format": "{FORMAT}"'
        raise ValueError(message)
    if header.get("schema") != SCHEMA:
        message = f"it has schema {header.get('schema')!r}, this version of skipcost reads {SCHEMA}"
        raise ValueError(message)
    _check(1, header, {"sweep": str, "versions": dict})
    check_members("versions", header["versions"], str)
    entries: dict[str, Entry] = {}
    for number, row in enumerate(rows, 2):
        _check(number, row, {"name": str, "case": dict, "exact": dict})
        key = json.dumps(row["case"], sort_keys=True, separators=(",", ":"))
        if key in entries:
            message = f"line {number} holds a case that an earlier line holds: {row['name']}"
            raise ValueError(message)
        check_members(f"noisy of line {number}", row.get("noisy", {}), float)
        entries[key] = Entry(row["name"], _numbers(number, row["exact"]), row.get("noisy", {}))
    if not any(isinstance(value, int | float) for entry in entries.values() for value in entry.exact.values()):
        message = "it holds no number"
        raise ValueError(message)
    return Baseline(header["sweep"], header["versions"], entries)


def _line(number: int, text: str) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        message = f"line {number} holds {constant}, which is no number to compare with"
        raise ValueError(message)

    try:
        row = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        message = f"line {number} is not JSON ({error})"
        raise ValueError(message) from None
    if not isinstance(row, dict):
        message = f"line {number} is not a JSON object"
        raise ValueError(message)  # noqa: TRY004 - the file's content is wrong, not a type in the program
    return row


def _check(line: int, row: dict[str, Any], kinds: dict[str, type]) -> None:
    """Refuse a line that lacks a part of it."""
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            message = f"line {line} has no {name}"
            raise ValueError(message)  # noqa: TRY004 - the file's content is wrong, not a type in the program


def _numbers(line: int, values: dict[str, Any]) -> dict[str, float | str]:
    for name, value in values.items():
        number = is_finite(value) and _sound(value)
        if not number and value != UNSUPPORTED:
            message = f"line {line} has {name}={value!r}: a number of 0 or more, or {UNSUPPORTED!r}, is accepted"
            raise ValueError(message)
    return dict(values)
