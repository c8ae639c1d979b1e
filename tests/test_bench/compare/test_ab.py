"""The latency verdict: suspects are confirmed by fresh processes, failures are told apart, a stopped run goes on."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.compare import ab, pairs
from skipcost.bench.compare.ab import Journal, Rules, Subject, compare
from skipcost.bench.compare.pairs import Measured, Pairs, SideError, facing, measure_pair
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.compare.turns import slowed
from skipcost.bench.errors import MachineError
from skipcost.unet_models import ModelSpec, build

CASES = tuple(Case(spec=ModelSpec(width=8 * number), threads=1) for number in range(1, 5))
RULES = Rules(pairs=5)


class Machine:
    """Pairs without processes: gives each case the ratios that a function of (case, measurements so far) says."""

    def __init__(self, ratio: Callable[[Case, int], float], others: float = 0.0, noise: float = 0.01) -> None:
        self.ratio, self.others, self.noise = ratio, others, noise
        self.measured: list[str] = []
        self.random = np.random.default_rng(0)

    def measure(self, key: str, profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
        """Measure nothing; scatter as a quiet machine does."""
        ratio = self.ratio(Case.from_json(key), self.measured.count(key))
        self.measured.append(key)
        logs = math.log(ratio) + self.noise * self.random.standard_normal(20)
        changes = (("aten::clone", 0.001),) if profiled else ()
        return Measured(tuple(logs.tolist()), 0.01, 0.01 * ratio, self.others, changes)

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str, bool], Measured]]:
        """Yield what measures."""
        yield self.measure


def run(machine: Machine, journal: Journal | None = None) -> dict[str, str]:
    """Compare CASES on a machine and return the verdicts by network."""
    subjects = [Subject(case.name, case.to_json()) for case in CASES]
    found = compare(subjects, Pairs("base", "now", machine.open), RULES, journal or Journal(None, {}))
    assert all("aten::clone +1.00 ms" in each.why for each in found if each.verdict in ("regressed", "improved"))
    return {Case.from_json(each.key).spec.label: each.verdict for each in found}


def changed(case: Case) -> bool:
    """The one case that the machines below treat in another way."""
    return case == CASES[1]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.1, "regressed"), (0.9, "improved"), (1.0, "unchanged")])
def test_a_change_is_found_in_the_case_that_has_it(ratio: float, verdict: str) -> None:
    """Ten percent either way is a verdict on that case alone."""
    found = run(Machine(lambda case, _: ratio if changed(case) else 1.0))

    assert found.pop(CASES[1].spec.label) == verdict
    assert set(found.values()) == {"unchanged"}


def test_what_fresh_processes_do_not_confirm_is_inconclusive() -> None:
    """A change in the first five pairs alone is an accident of those processes."""
    found = run(Machine(lambda case, measured: 1.2 if changed(case) and measured < RULES.pairs else 1.0))

    assert found[CASES[1].spec.label] == "inconclusive"


def test_a_disturbed_measurement_is_done_once_more() -> None:
    """What was measured while others had the machine does not count where a second try is quiet."""
    machine = Machine(lambda _case, _bouts: 1.0)
    quiet = machine.measure

    def measured_of(key: str, profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
        made = quiet(key, profiled)
        return replace(made, others=0.9, ratios=(0.5,)) if machine.measured.count(key) % 2 else made

    machine.measure = measured_of  # type: ignore[method-assign]

    found = run(machine)

    assert set(found.values()) == {"unchanged"}
    assert len(machine.measured) % (2 * len(CASES)) == 0


def test_a_machine_that_stays_disturbed_is_not_waited_for() -> None:
    """Everything is measured twice at most, and nothing is called changed."""
    machine = Machine(lambda _case, _bouts: 1.3, others=0.9)

    found = run(machine)

    assert set(found.values()) == {"inconclusive"}
    assert len(machine.measured) == 2 * 2 * RULES.pairs * len(CASES)


def test_a_change_that_turns_round_is_not_confirmed() -> None:
    """Slower at first and faster when measured again is no verdict in either direction."""
    found = run(Machine(lambda case, measured: (1.2 if measured < RULES.pairs else 0.8) if changed(case) else 1.0))

    assert found[CASES[1].spec.label] == "inconclusive"


def test_a_busy_machine_calls_nothing_changed() -> None:
    """Where other processes take much of the machine, a change is inconclusive rather than red."""
    found = run(Machine(lambda case, _: 1.2 if changed(case) else 1.0, others=0.5))

    assert found[CASES[1].spec.label] == "inconclusive"


def test_noise_that_hides_the_effect_is_inconclusive() -> None:
    """Where a change of `effect` could have hidden, "unchanged" would be a lie."""
    random = np.random.default_rng(1)

    found = run(Machine(lambda _case, _bouts: math.exp(0.2 * random.standard_normal())))

    assert "unchanged" not in found.values()


def test_settled_cases_are_left_alone() -> None:
    """A case that is unchanged beyond doubt takes no more than the fewest pairs; one in doubt takes them all."""
    machine = Machine(lambda case, _: 1.1 if changed(case) else 1.0, noise=0.0)

    run(machine)

    counts = [machine.measured.count(case.to_json()) for case in CASES]
    assert counts[1] == 2 * RULES.pairs
    assert all(count < RULES.pairs for at, count in enumerate(counts) if at != 1)


@pytest.mark.parametrize(
    ("failing", "verdict"), [(("base",), "new"), (("now",), "missing"), (("base", "now"), "not_comparable")]
)
def test_a_case_that_one_side_cannot_run_is_told_apart(failing: tuple[str, ...], verdict: str) -> None:
    """A case that only one side has is no pass."""
    machine = Machine(lambda _case, _bouts: 1.0)
    plain = machine.measure

    def breaking(key: str, profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
        if changed(Case.from_json(key)):
            raise SideError(dict.fromkeys(failing, "ValueError: unknown variant"))
        return plain(key, profiled)

    machine.measure = breaking  # type: ignore[method-assign]

    found = run(machine)

    assert found[CASES[1].spec.label] == verdict
    assert list(found.values()).count("unchanged") == len(CASES) - 1


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """After Ctrl-C in the middle the same command measures only what is missing; another revision starts anew."""
    path, header = tmp_path / "ab.jsonl", {"base": "a", "now": "b"}
    first = Machine(
        lambda _case, measured: 1.0 if measured < 2 else (_ for _ in ()).throw(KeyboardInterrupt), noise=0.0
    )
    with pytest.raises(KeyboardInterrupt):
        run(first, journal=Journal(path, header))
    again = Machine(lambda _case, _bouts: 1.0, noise=0.0)
    other = Machine(lambda _case, _bouts: 1.0, noise=0.0)

    run(again, journal=Journal(path, header))
    run(other, journal=Journal(path, {"base": "other"}))

    assert len(first.measured) == 2 * len(CASES)
    assert len(again.measured) == len(CASES)  # the third pair settles them
    assert len(other.measured) == 3 * len(CASES)


def test_a_journal_cut_off_in_a_line_keeps_the_others(tmp_path: Path) -> None:
    """A run that was killed while it wrote loses that one measurement, and the next run can read and add."""
    path, header = tmp_path / "ab.jsonl", {"base": "a"}
    for pair in range(2):
        Journal(path, header).add("first", pair, "case", Measured((0.1, 0.2), 1.0, 1.1, 0.0, (("aten::clone", 0.5),)))
    path.write_bytes(path.read_bytes()[:-9])

    journal = Journal(path, header)
    journal.add("first", 1, "case", Measured((0.3,), 1.0, 1.1))

    again = Journal(path, header)
    assert again.get("first", 0, "case") == Measured((0.1, 0.2), 1.0, 1.1, 0.0, (("aten::clone", 0.5),))
    assert again.get("first", 1, "case") == Measured((0.3,), 1.0, 1.1)


@pytest.mark.slow
def test_two_processes_take_turns_and_a_busy_wait_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pair of processes measures a real case; a wait of nine times the call shows on any machine."""
    case = Case(spec=ModelSpec(depth=1, width=4), height=32, width=32, threads=1)
    here = Revision("here", "", Path())
    monkeypatch.setattr(pairs, "TURN_S", 0.002)

    with facing(here, here) as sides:
        measured = measure_pair(case, sides, 0.02, 9.0)
        profiled = sides[0].ask(profile=1)["profile"]
        with pytest.raises(SideError) as told:
            measure_pair(Case(spec=ModelSpec(depth=6), height=8, width=8), sides, 0.1)

    assert float(np.median(measured.ratios)) > math.log(3)
    assert measured.now_s > measured.base_s
    assert "aten::convolution" in profiled["operators"]
    layers = set(profiled["layers"])
    assert layers
    assert layers <= {name for name, _ in build(case.spec).named_modules()}
    assert "ValueError" in told.value.args[0]["here"]


def test_the_injected_slowdown_is_in_the_call() -> None:
    """A slowed step runs the step once and then waits."""
    calls: list[int] = []
    step = slowed(lambda: calls.append(1), 0.02, "cpu")

    from skipcost.bench.measure.timing import cpu_clock  # noqa: PLC0415 - only this test times

    assert cpu_clock(step, 1)[0] >= 0.02
    assert calls == [1]


def test_a_side_that_dies_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which revision, how it ended, and what it said; the other one is ended, too."""
    script = tmp_path / "turns.py"
    script.write_text("import os, sys\ninput()\nsys.stderr.write('out of luck\\n')\nsys.stderr.flush()\nos.abort()\n")
    monkeypatch.setattr(pairs, "SCRIPT", script)
    here = Revision("0123456789abcdef", "", Path())

    with facing(here, here) as sides, pytest.raises(MachineError) as told:
        sides[0].ask(calls=1)

    assert str(told.value) == "the process of 0123456789ab ended with signal 6 (SIGABRT): out of luck"
    assert not sides[1]._process.alive()


def test_the_script_needs_nothing_of_this_version_but_itself(tmp_path: Path) -> None:
    """It runs by its path, outside the package, and answers nonsense with a sentence."""
    done = subprocess.run(
        [sys.executable, str(pairs.SCRIPT)],
        input='{"calls": 1}\n{"case": {"label": "no-net/d4/w8/concat"}}\n',
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip

    first, second = done.stdout.splitlines()
    assert "no case is prepared" in first
    assert "ValueError" in second


def test_a_profile_names_what_has_a_good_part_of_the_change() -> None:
    """Operators and layers whose time went the way of the whole call; of small changes nothing is said."""
    answers = [
        {"operators": {"aten::a": 0.010, "aten::b": 0.020, "aten::c": 0.030}, "layers": {"x0.0": 0.03, "x1.0": 0.01}},
        {"operators": {"aten::a": 0.010, "aten::b": 0.018, "aten::c": 0.031}, "layers": {"x0.0": 0.03, "x1.0": 0.02}},
    ]
    answers[1]["operators"]["aten::clone"] = 0.009

    class Stub:
        def __init__(self, answer: dict[str, dict[str, float]]) -> None:
            self.answer = answer

        def ask(self, **_: int) -> dict[str, dict[str, dict[str, float]]]:
            return {"profile": self.answer}

    sides = (Stub(answers[0]), Stub(answers[1]))

    assert [name for name, _ in pairs._profile(sides, 0.01)] == ["aten::clone", "in x1.0"]
    assert [name for name, _ in pairs._profile(sides, -0.01)] == ["aten::b"]


def test_what_most_bouts_name_is_told() -> None:
    """A name that one of three profiles has is an accident; the others come with their median."""
    measured = [Measured((0.1,), 1.0, 1.1, changes=(("aten::clone", seconds),)) for seconds in (0.001, 0.002, 0.009)]
    measured[0] = Measured((0.1,), 1.0, 1.1, changes=(("aten::clone", 0.001), ("aten::relu", 0.5)))

    assert ab._told(measured) == "by profiles: aten::clone +2.00 ms"
    assert ab._told([Measured((0.1,), 1.0, 1.1)]) == ""
