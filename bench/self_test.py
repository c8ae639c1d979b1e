"""What the latency verdict itself is worth here: how often it cries wolf, and what it finds.

Equal code against equal code, and against equal code with a real busy-wait in the measured call, over and over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from skipcost.bench.ab import Journal, Rules, Subject, compare
from skipcost.bench.arenas import cases_arena
from skipcost.bench.cases import Case
from skipcost.bench.paired import proportion
from skipcost.bench.revisions import Revision

SLOWDOWNS = (0.0, 0.03, 0.05, 0.10, 0.20)
CHANGED = ("regressed", "improved")


@dataclass(frozen=True, slots=True)
class Finding:
    """At one slowdown: in how many of so many trials something was called changed.

    Without a slowdown a trial is a run, which one false alarm spoils; with one, a trial is a case.
    """

    slowdown: float
    found: int
    trials: int

    @property
    def interval(self) -> tuple[float, float]:
        """The share's exact 95 % interval."""
        return proportion(self.found, self.trials)


def self_test(
    cases: Sequence[Case], here: Revision, rules: Rules, runs: int, tell: Callable[[str, int, str], None]
) -> list[Finding]:
    """Run every slowdown `runs` times; `tell(what, bouts left, case)` is called before each measurement."""
    findings = []
    for slowdown in SLOWDOWNS:
        found = 0
        for run in range(runs):
            what = f"{slowdown:.0%} slower, run {run + 1} of {runs}"
            verdicts = compare(
                [Subject(case.name, case.to_json()) for case in cases],
                cases_arena(here, here, rules, slowdown),
                rules,
                Journal(None, {}),
                lambda left, name, what=what: tell(what, left, name),  # type: ignore[misc]  # binds this run's name
            )
            words = [each.verdict for each in verdicts]
            found += words.count("regressed") if slowdown else any(word in CHANGED for word in words)
        findings.append(Finding(slowdown, found, runs * len(cases) if slowdown else runs))
    return findings


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The table for a program."""
    return [
        {"slowdown": each.slowdown, "found": each.found, "trials": each.trials, "interval": each.interval}
        for each in findings
    ]


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """The table for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("injected", "called changed", "of", "share", "95 % interval"):
        table.add_column(name, justify="right")
    for each in findings:
        low, high = each.interval
        unit = "cases" if each.slowdown else "runs"
        share = f"{each.found / each.trials:.1%}"
        table.add_row(
            f"+{each.slowdown:.0%}", str(each.found), f"{each.trials} {unit}", share, f"{low:.1%} to {high:.1%}"
        )
    console.print(table)
