"""A latency verdict that can be believed: paired measurements, one error rate for the whole run, and a confirmation.

Every subject is measured by several pairs of fresh processes. What looks changed, with the chance of a single false
alarm among all subjects held at `alpha` (Holm), is measured again by as many fresh pairs, and only what changes again,
the same way, is a verdict. So equal code is called changed in about alpha * confirm of all runs.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from skipcost.bench.compare.paired import Estimate, estimate, holm
from skipcost.bench.compare.pairs import Measured, Pairs, SideError
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.console import append_file, write_file
from skipcost.bench.decoding import check_fields, check_members, parse_json
from skipcost.bench.errors import BenchError

SETTLED_FROM = 3  # process pairs after which a subject may be found unchanged and left alone
HEAVY = 0.2  # share of the machine's processor time in other hands from which nothing is called changed
METRIC = "latency_s"
ROW = {"stage": str, "pair": int, "subject": str, "measured": dict}  # of a line of a journal, and of its measurement
MEASURED = {"ratios": list, "base_s": float, "now_s": float, "others": float, "changes": list, "took_s": float}
OTHER = "another current folder"  # whose results/ has the journals


@dataclass(frozen=True, slots=True)
class Rules:
    """How a comparison decides.

    pairs: of processes, per subject and stage; seconds: per subject and pair. floor: the change that is too small to
    matter, which also covers how code lies in memory; effect: the change that must be seen, or the subject is
    inconclusive. alpha: chance of a false suspicion in a run; confirm: of its false confirmation.
    """

    pairs: int = 6
    seconds: float = 1.5
    floor: float = 0.01
    effect: float = 0.05
    alpha: float = 0.05
    confirm: float = 0.05


@dataclass(frozen=True, slots=True)
class Subject:
    """What both revisions are timed at: a name for people, and the key by which it is known (a case's JSON)."""

    name: str
    key: str


class Journal:
    """What was measured, a line each, so that a run that was stopped goes on. `path` None keeps nothing."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self._known: dict[tuple[str, int, str], Measured] = {}
        lines = _whole_lines(path) if path else []
        if lines and _read(path, 1, lines[0], parse_json) == header:
            for number, line in enumerate(lines[1:], 2):
                key, measured = _read(path, number, line, _kept)
                self._known[key] = measured
        elif path:
            write_file(path, json.dumps(header) + "\n", option=OTHER)

    def get(self, stage: str, pair: int, key: str) -> Measured | None:
        """What was measured already."""
        return self._known.get((stage, pair, key))

    @property
    def seconds(self) -> float:
        """How long everything in it took to measure."""
        return sum(each.took_s for each in self._known.values())

    def add(self, stage: str, pair: int, key: str, measured: Measured) -> None:
        """Keep a measurement."""
        self._known[stage, pair, key] = measured
        if self.path:
            row = {"stage": stage, "pair": pair, "subject": key, "measured": asdict(measured)}
            append_file(self.path, json.dumps(row) + "\n", OTHER, "what was measured before is kept")


def _read(path: Path | None, number: int, line: str, decode: Callable[[str], Any]) -> Any:
    """Decode a line of a journal; BenchError for one that is damaged."""
    try:
        return decode(line)
    except (ValueError, KeyError, TypeError) as error:
        message = f"line {number} of {path} is damaged ({error}): remove the file, and the same command measures again"
        raise BenchError(message) from None


def _kept(line: str) -> tuple[tuple[str, int, str], Measured]:
    """A measurement with what it is of."""
    row = parse_json(line)
    check_fields(row, ROW, tuple(ROW))
    check_fields(row["measured"], MEASURED, tuple(MEASURED))
    check_members("ratios", row["measured"]["ratios"], float)
    return (row["stage"], row["pair"], row["subject"]), Measured.from_json(row["measured"])


def _whole_lines(path: Path) -> list[str]:
    """The lines of a journal; what a killed run left of its last line is cut off, for the next row to begin a line."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_file(path, whole, option=OTHER)
    return whole.decode("utf-8", "replace").splitlines()


@dataclass(slots=True)
class Record:
    """What is known of a subject so far."""

    subject: Subject
    measured: dict[str, list[Measured]] = field(default_factory=lambda: {"first": [], "confirm": []})
    failed: dict[str, str] = field(default_factory=dict)  # by revision

    def estimate(self, stage: str) -> Estimate:
        """The ratio that a stage's pairs say."""
        return estimate([each.ratios for each in self.measured[stage]])

    def settled(self, rules: Rules) -> bool:
        """Whether more pairs cannot matter: it cannot run, or is unchanged beyond doubt."""
        if self.failed:
            return True
        if len(self.measured["first"]) < SETTLED_FROM:
            return False
        found = self.estimate("first")
        return found.p_value(0.0) > rules.alpha and _within(found, rules)


def _within(found: Estimate, rules: Rules) -> bool:
    low, high = found.interval(rules.alpha)
    return low >= 1 / (1 + rules.effect) and high <= 1 + rules.effect


def compare(
    subjects: Sequence[Subject],
    pairs: Pairs,
    rules: Rules,
    journal: Journal,
    tell: Callable[[int, str], None] = lambda _left, _name: None,
) -> list[Verdict]:
    """Measure and judge every subject; `tell(pairs left, name)` is called before each measurement."""
    records = [Record(subject) for subject in subjects]
    _measure(records, pairs, rules, journal, "first", tell)
    able = [record for record in records if not record.failed]
    found = [record.estimate("first").p_value(rules.floor) for record in able]
    suspects = [record for record, falls in zip(able, holm(found, rules.alpha), strict=True) if falls]
    _measure(suspects, pairs, rules, journal, "confirm", tell)
    return [_verdict(record, pairs, rules, len(suspects)) for record in records]


def _measure(
    records: list[Record],
    pairs: Pairs,
    rules: Rules,
    journal: Journal,
    stage: str,
    tell: Callable[[int, str], None],
) -> None:
    """Give every record that is not settled a measurement by each of `rules.pairs` fresh pairs of processes.

    A measurement during which others took too much of the machine is done once more, after the rest.
    """
    order = random.Random(stage)  # noqa: S311 - an order, not a secret
    for pair in range(rules.pairs):
        todo = [record for record in records if stage == "confirm" or not record.settled(rules)]
        missing = []
        for record in todo:
            known = journal.get(stage, pair, record.subject.key)
            record.measured[stage] += [known] if known else []
            missing += [] if known or record.failed else [record]
        if not missing:
            continue
        order.shuffle(missing)
        queue, disturbed = deque(missing), set[str]()
        started = time.perf_counter()
        with pairs.open() as measure:
            while queue:
                record = queue.popleft()
                tell((rules.pairs - pair - 1) * len(todo) + len(queue) + 1, record.subject.name)
                try:
                    measured = measure(record.subject.key, stage == "confirm")
                except SideError as error:
                    record.failed.update(error.args[0])
                    continue
                if measured.others > HEAVY and record.subject.key not in disturbed:
                    disturbed.add(record.subject.key)
                    queue.append(record)
                    continue
                started, before = time.perf_counter(), started
                measured = replace(measured, took_s=started - before)
                record.measured[stage].append(measured)
                journal.add(stage, pair, record.subject.key, measured)


def _verdict(record: Record, pairs: Pairs, rules: Rules, suspects: int) -> Verdict:
    name, key = record.subject.name, record.subject.key
    if record.failed:
        both = {pairs.base, pairs.now} <= set(record.failed)
        word = "not_comparable" if both else "new" if pairs.base in record.failed else "missing"
        return Verdict(name, METRIC, word, why="; ".join(record.failed.values()), key=key)
    measured = record.measured["confirm"] or record.measured["first"]
    base_s, now_s = (statistics.median(getattr(each, side) for each in measured) for side in ("base_s", "now_s"))
    word, shown, why = _word(record, rules, suspects)
    return Verdict(name, METRIC, word, base_s, now_s, why, shown.ratio, shown.interval(rules.alpha), key)


def _word(record: Record, rules: Rules, suspects: int) -> tuple[str, Estimate, str]:
    """The verdict, the estimate that it rests on, and a sentence."""
    found = record.estimate("first")
    if not record.measured["confirm"]:
        visible = found.visible(rules.alpha, rules.floor)
        if _within(found, rules):
            return "unchanged", found, f"a change of {visible:.1%} would have been seen"
        return "inconclusive", found, f"no change smaller than {visible:.1%} could have been seen"
    again = record.estimate("confirm")
    same_way = math.copysign(1, math.log(again.ratio)) == math.copysign(1, math.log(found.ratio))
    if not same_way or again.p_value(rules.floor) > rules.confirm / suspects:
        return "inconclusive", again, f"looked changed by {found.ratio - 1:+.1%}, which fresh processes did not confirm"
    others = statistics.median(each.others for stage in record.measured.values() for each in stage)
    if others > HEAVY:
        return "inconclusive", again, f"other processes took {others:.0%} of the machine: too much to call it changed"
    return "regressed" if again.ratio > 1 else "improved", again, _told(record.measured["confirm"])


def _told(measured: Sequence[Measured]) -> str:
    """The operators and layers that most pairs found a good part of the change in, in words."""
    seen: dict[str, list[float]] = {}
    for each in measured:
        for name, seconds in each.changes:
            seen.setdefault(name, []).append(seconds)
    often = [(name, statistics.median(found)) for name, found in seen.items() if 2 * len(found) > len(measured)]
    words = ", ".join(f"{name} {seconds * 1e3:+.2f} ms" for name, seconds in often)
    return f"by profiles: {words}" if words else ""
