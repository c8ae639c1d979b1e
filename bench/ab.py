"""A latency verdict that can be believed: paired measurements, one error rate for the whole run, and a confirmation.

Every case is measured by several pairs of fresh processes. What looks changed, with the chance of a single false alarm
among all cases held at `alpha` (Holm), is measured again by as many fresh pairs, and only what changes again, the same
way, is a verdict. So equal code is called changed in about alpha * confirm of all runs.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skipcost.bench.cases import Case
from skipcost.bench.duel import Bout, Side, SideError, bout, facing
from skipcost.bench.paired import Estimate, estimate, holm
from skipcost.bench.revisions import Revision
from skipcost.bench.verdicts import Verdict

SETTLED_FROM = 3  # process pairs after which a case may be found unchanged and left alone
HEAVY = 0.2  # share of the machine's processor time in other hands from which no case is called changed
PROFILED = 5  # calls
METRIC = "latency_s"


@dataclass(frozen=True, slots=True)
class Rules:
    """How a comparison decides.

    pairs: of processes, per case and stage; seconds: per case and pair. floor: the change that is too small to matter,
    which also covers how code lies in memory; effect: the change that must be seen, or the case is inconclusive.
    alpha: chance of a false suspicion in a run; confirm: of its false confirmation. slowdown: of the second side, for
    the self-test.
    """

    pairs: int = 5
    seconds: float = 4.0
    floor: float = 0.01
    effect: float = 0.05
    alpha: float = 0.05
    confirm: float = 0.05
    slowdown: float = 0.0


class Journal:
    """What was measured, a line each, so that a run that was stopped goes on. `path` None keeps nothing."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self._known: dict[tuple[str, int, str], Bout] = {}
        lines = path.read_text().splitlines() if path and path.exists() else []
        if lines and json.loads(lines[0]) == header:
            for line in lines[1:]:
                row = json.loads(line)
                self._known[row["stage"], row["pair"], row["case"]] = Bout(
                    **{**row["bout"], "ratios": tuple(row["bout"]["ratios"])}
                )
        elif path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")

    def get(self, stage: str, pair: int, case: Case) -> Bout | None:
        """What was measured already."""
        return self._known.get((stage, pair, case.to_json()))

    def add(self, stage: str, pair: int, case: Case, measured: Bout) -> None:
        """Keep a measurement."""
        if self.path:
            row = {"stage": stage, "pair": pair, "case": case.to_json(), "bout": asdict(measured)}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@dataclass(slots=True)
class Record:
    """What is known of a case so far."""

    case: Case
    bouts: list[Bout] = field(default_factory=list)
    again: list[Bout] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # by revision
    profiles: tuple[dict[str, float], dict[str, float]] | None = None

    def settled(self, rules: Rules) -> bool:
        """Whether more pairs cannot matter: it cannot run, or is unchanged beyond doubt."""
        if self.failed:
            return True
        if len(self.bouts) < SETTLED_FROM:
            return False
        found = estimate([each.ratios for each in self.bouts])
        return found.p_value(0.0) > rules.alpha and _within(found, rules)


def _within(found: Estimate, rules: Rules) -> bool:
    low, high = found.interval(rules.alpha)
    return low >= 1 / (1 + rules.effect) and high <= 1 + rules.effect


def compare(
    cases: Sequence[Case],
    sides: tuple[Revision, Revision],
    rules: Rules,
    journal: Journal,
    tell: Callable[[int, str], None] = lambda _left, _name: None,
) -> list[Verdict]:
    """Measure and judge every case; `tell(bouts left, name)` is called before each measurement."""
    records = [Record(case) for case in cases]
    _measure(records, sides, rules, journal, "first", tell)
    able = [record for record in records if not record.failed]
    found = {id(record): estimate([each.ratios for each in record.bouts]) for record in able}
    fallen = holm([found[id(record)].p_value(rules.floor) for record in able], rules.alpha)
    suspects = [record for record, suspect in zip(able, fallen, strict=True) if suspect]
    _measure(suspects, sides, rules, journal, "confirm", tell)
    return [_verdict(record, found.get(id(record)), rules, sides, len(suspects)) for record in records]


def _measure(
    records: list[Record],
    sides: tuple[Revision, Revision],
    rules: Rules,
    journal: Journal,
    stage: str,
    tell: Callable[[int, str], None],
) -> None:
    """Give every record that is not settled a bout with each of `rules.pairs` fresh pairs of processes."""
    order = random.Random(stage)  # noqa: S311 - an order, not a secret
    for pair in range(rules.pairs):
        todo = [record for record in records if stage == "confirm" or not record.settled(rules)]
        order.shuffle(todo)
        known = {id(record): journal.get(stage, pair, record.case) for record in todo}
        if all(known.values()):
            for record in todo:
                _keep(record, stage, known[id(record)])
            continue
        with facing(*sides) as processes:
            for number, record in enumerate(todo):
                tell((rules.pairs - pair) * len(todo) - number, record.case.name)
                if not record.failed:
                    measured = known[id(record)] or _bout(record, processes, rules, profiled=stage == "confirm")
                    _keep(record, stage, measured)
                    if measured and not known[id(record)]:
                        journal.add(stage, pair, record.case, measured)


def _bout(record: Record, processes: tuple[Side, Side], rules: Rules, *, profiled: bool) -> Bout | None:
    try:
        measured = bout(record.case, processes, rules.seconds, rules.slowdown)
        if profiled and record.profiles is None:
            first, second = (side.ask(profile=PROFILED)["profile"] for side in processes)
            record.profiles = first, second
    except SideError as error:
        record.failed.update(error.args[0])
        return None
    return measured


def _keep(record: Record, stage: str, measured: Bout | None) -> None:
    if measured:
        (record.bouts if stage == "first" else record.again).append(measured)


def _verdict(
    record: Record, found: Estimate | None, rules: Rules, sides: tuple[Revision, Revision], suspects: int
) -> Verdict:
    case, both = record.case, all(side.commit in record.failed for side in sides)
    if record.failed or found is None:
        word = "missing" if sides[0].commit not in record.failed else "not_comparable" if both else "new"
        return Verdict(case.name, METRIC, word, why="; ".join(record.failed.values()), key=case.to_json())
    bouts = record.again or record.bouts
    base_s, now_s = (statistics.median(getattr(each, name) for each in bouts) for name in ("base_s", "now_s"))
    word, shown, why = _word(record, found, rules, suspects)
    interval = shown.interval(rules.alpha)
    return Verdict(case.name, METRIC, word, base_s, now_s, why, shown.ratio, interval, case.to_json())


def _word(record: Record, found: Estimate, rules: Rules, suspects: int) -> tuple[str, Estimate, str]:
    """The verdict, the estimate that it rests on, and a sentence."""
    visible = found.visible(rules.alpha, rules.floor)
    if not record.again:
        if _within(found, rules):
            return "unchanged", found, f"a change of {visible:.1%} would have been seen"
        return "inconclusive", found, f"no change smaller than {visible:.1%} could have been seen"
    again = estimate([each.ratios for each in record.again])
    same_way = math.copysign(1, math.log(again.ratio)) == math.copysign(1, math.log(found.ratio))
    if not same_way or again.p_value(rules.floor) > rules.confirm / suspects:
        return "inconclusive", again, f"looked changed by {found.ratio - 1:+.1%}, which fresh processes did not confirm"
    others = statistics.median(each.others for each in (*record.bouts, *record.again))
    if others > HEAVY:
        return "inconclusive", again, f"other processes took {others:.0%} of the machine: too much to call it changed"
    return "regressed" if again.ratio > 1 else "improved", again, _slowest(record)


def _slowest(record: Record) -> str:
    """The operators whose own time changed most, by a profile of either side."""
    if record.profiles is None:
        return ""
    base, now = record.profiles
    change = {name: now.get(name, 0.0) - base.get(name, 0.0) for name in {**base, **now}}
    largest = sorted(change.items(), key=lambda item: -abs(item[1]))[:2]
    return "by a profile: " + ", ".join(f"{name} {seconds * 1e3:+.2f} ms" for name, seconds in largest)
