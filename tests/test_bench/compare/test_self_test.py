"""The self-test of the latency verdict: what it counts, and that its journals go on."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.compare import self_test as testing
from skipcost.bench.compare.ab import Rules
from skipcost.bench.compare.pairs import Measured, Pairs
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.compare.self_test import SLOWDOWNS, finding, print_findings, self_test, to_json
from skipcost.bench.console import Screen
from skipcost.unet_models import ModelSpec

CASES = tuple(Case(spec=ModelSpec(width=8 * number), threads=1) for number in range(1, 4))
HERE = Revision("here", "", Path())


class Machines:
    """Stands for `case_pairs`: every measurement has the injected slowdown, with the scatter of a quiet machine."""

    def __init__(self) -> None:
        self.measured = 0
        self.random = np.random.default_rng(0)

    def __call__(self, base: Revision, now: Revision, _seconds: float, slowdown: float) -> Pairs:
        """Return pairs at one slowdown."""

        @contextlib.contextmanager
        def opened() -> Iterator[Callable[[str, bool], Measured]]:
            def measure(_key: str, _profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
                self.measured += 1
                logs = math.log1p(slowdown) + 0.003 * self.random.standard_normal(8)
                return Measured(tuple(logs.tolist()), 0.01, 0.01 * (1 + slowdown))

            yield measure

        return Pairs(base.commit, now.commit, opened)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Pairs without processes."""
    made = Machines()
    monkeypatch.setattr(testing, "case_pairs", made)
    return made


@pytest.mark.usefixtures("machines")
def test_a_quiet_machine_finds_every_slowdown_and_none_in_equal_code(tmp_path: Path) -> None:
    """Trials are runs without a slowdown and cases with one."""
    found = self_test(CASES, HERE, Rules(), 2, tmp_path)

    assert [(each.slowdown, each.found, each.trials) for each in found] == [
        (slowdown, 6 if slowdown else 0, 6 if slowdown else 2) for slowdown in SLOWDOWNS
    ]


def test_what_was_measured_is_not_measured_again(machines: Machines, tmp_path: Path) -> None:
    """The same command reads its journals, and more runs add to them."""
    first = self_test(CASES, HERE, Rules(), 1, tmp_path)
    measured = machines.measured

    again = self_test(CASES, HERE, Rules(), 1, tmp_path)

    assert again == first
    assert machines.measured == measured
    assert self_test(CASES, HERE, Rules(), 2, tmp_path)[0].trials == 2
    assert measured < machines.measured


def test_only_the_slowdowns_that_are_asked_for_are_measured(machines: Machines, tmp_path: Path) -> None:
    """Equal code alone can be run many times; sizes that differ by less than a percent have journals of their own."""
    found = self_test(CASES, HERE, Rules(), 2, tmp_path, slowdowns=(0.0, 0.15, 0.152))

    assert [(each.slowdown, each.trials) for each in found] == [(0.0, 2), (0.15, 6), (0.152, 6)]
    measured = machines.measured
    assert self_test(CASES, HERE, Rules(), 2, tmp_path, slowdowns=(0.152, 0.0)) == [found[2], found[0]]
    assert machines.measured == measured


@pytest.mark.usefixtures("machines")
def test_other_rules_are_another_test(tmp_path: Path) -> None:
    """A journal of longer measurements says nothing of shorter ones: seconds are those of the new test alone."""
    self_test(CASES, HERE, Rules(pairs=4), 1, tmp_path)

    self_test(CASES, HERE, Rules(pairs=3), 1, tmp_path)

    first = (tmp_path / "0-percent-1.jsonl").read_text().splitlines()
    assert len(first) == 1 + 3 * len(CASES)


@pytest.mark.parametrize(
    ("slowdown", "runs", "found", "trials", "undecided"),
    [
        (0.0, [["unchanged", "improved"], ["regressed", "regressed"], ["unchanged", "inconclusive"]], 2, 3, 1),
        (0.05, [["regressed", "improved"], ["unchanged", "inconclusive"]], 1, 4, 1),
    ],
)
def test_findings_count_what_they_say(
    slowdown: float, runs: list[list[str]], found: int, trials: int, undecided: int
) -> None:
    """One false alarm, either way, spoils a run of equal code; a slowdown is found where a case regressed."""
    made = finding(slowdown, runs, 12.0)

    assert (made.found, made.trials, made.undecided) == (found, trials, undecided)
    assert made.seconds == 12.0 / sum(map(len, runs))
    assert made.interval[0] <= found / trials <= made.interval[1]


def test_people_and_programs_read_the_same_table() -> None:
    """Every number of the JSON is in the table's row, with the number of runs behind a share."""
    findings = [finding(0.0, [["unchanged"]] * 4, 40.0), finding(0.1, [["regressed", "inconclusive"]], 60.0)]
    out = io.StringIO()

    print_findings(findings, Screen(file=out, width=120))

    stored = to_json(findings, CASES, Rules())
    assert [each["found"] for each in stored["findings"]] == [0, 1]
    assert stored["cases"] == [case.name for case in CASES]
    lines = out.getvalue().splitlines()
    assert lines[1].split() == ["+0%", "0", "4", "runs", "0.0%", "0.0%", "to", "52.7%", "0", "10"]
    assert lines[2].split() == ["+10%", "1", "2", "cases", "50.0%", "1.3%", "to", "98.7%", "1", "30"]
