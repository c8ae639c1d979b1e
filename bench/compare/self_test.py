"""What the latency verdict itself is worth here: how often it cries wolf, and what it finds.

Equal code against equal code, and against equal code with a real busy-wait in the measured call, over and over. Rounds
go through all slowdowns, so that a test that is stopped has seen each about as often; its journals go on, and grow with
more rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.compare.ab import Journal, Rules, Subject, compare
from skipcost.bench.compare.paired import proportion
from skipcost.bench.compare.pairs import case_pairs
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.console import Column, Screen
from skipcost.bench.measure.environment import cpu_name, cpus

SLOWDOWNS = (0.0, 0.03, 0.05, 0.10, 0.20)
CHANGED = ("regressed", "improved")


@dataclass(frozen=True, slots=True)
class Finding:
    """At one slowdown: in how many of so many trials something was called changed.

    Without a slowdown a trial is a run, which one false alarm spoils, also one that says "improved"; with one, a trial
    is a case, and only "regressed" counts. undecided: cases that were inconclusive; seconds: of measuring, per case.
    """

    slowdown: float
    found: int
    trials: int
    undecided: int
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        """The share's exact 95 % interval."""
        return proportion(self.found, self.trials)


def self_test(
    cases: Sequence[Case],
    here: Revision,
    rules: Rules,
    runs: int,
    folder: Path,
    tell: Callable[[str, int, str], None] = lambda _what, _left, _name: None,
    slowdowns: Sequence[float] = SLOWDOWNS,
) -> list[Finding]:
    """Run every slowdown `runs` times; `tell(what, pairs left, case)` is called before each measurement.

    folder: where the journals of runs are, one file each; a run that is there already is not measured again.
    slowdowns: shares of the measured call, 0 for equal code.
    """
    subjects = [Subject(case.name, case.to_json()) for case in cases]
    words: dict[float, list[list[str]]] = {slowdown: [] for slowdown in slowdowns}
    seconds = dict.fromkeys(slowdowns, 0.0)
    for run in range(1, runs + 1):
        for slowdown in slowdowns:
            what = f"{slowdown * 100:g} % slower, run {run} of {runs}"
            header = {"rules": asdict(rules), "cases": [each.key for each in subjects], "slowdown": slowdown}
            journal = Journal(folder / f"{slowdown * 100:g}-percent-{run}.jsonl", header)
            pairs = case_pairs(here, here, rules.seconds, slowdown)
            verdicts = compare(subjects, pairs, rules, journal, lambda left, name, what=what: tell(what, left, name))  # type: ignore[misc]  # binds this run's name
            words[slowdown].append([each.verdict for each in verdicts])
            seconds[slowdown] += journal.seconds
    return [finding(slowdown, words[slowdown], seconds[slowdown]) for slowdown in slowdowns]


def finding(slowdown: float, runs: Sequence[Sequence[str]], seconds: float) -> Finding:
    """Sum up the verdicts of some runs at one slowdown, which took so many seconds in all."""
    count = Counter(word for run in runs for word in run)
    cases = count.total()
    if slowdown:
        found, trials = count["regressed"], cases
    else:
        found, trials = sum(any(word in CHANGED for word in run) for run in runs), len(runs)
    return Finding(slowdown, found, trials, count["inconclusive"], seconds / cases)


def to_json(findings: Sequence[Finding], cases: Sequence[Case], rules: Rules) -> dict[str, Any]:
    """The table for a program, with the machine, the cases and the rules that it holds for."""
    return {
        "cpu": cpu_name(),
        "cpus": cpus(),
        "torch": metadata.version("torch"),
        "day": datetime.now(UTC).date().isoformat(),
        "cases": [case.name for case in cases],
        "rules": asdict(rules),
        "findings": [{**asdict(each), "interval": each.interval} for each in findings],
    }


def print_findings(findings: Sequence[Finding], console: Screen) -> None:
    """The table for people."""
    names = ("injected", "called changed", "of", "share", "95 % interval", "undecided cases", "seconds a case")
    rows = []
    for each in findings:
        low, high = each.interval
        unit = "cases" if each.slowdown else "runs"
        rows.append((
            f"+{each.slowdown * 100:g}%", str(each.found), f"{each.trials} {unit}", f"{each.found / each.trials:.1%}",
            f"{low:.1%} to {high:.1%}", str(each.undecided), f"{each.seconds:.0f}",
        ))  # fmt: skip
    console.table([Column(name, right=True) for name in names], rows)
