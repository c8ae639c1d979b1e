"""What a pair of fresh processes, one of each revision, measures: at cases, or at anybody's pytest benchmarks.

At cases they are warm and take turns; a benchmark is two runs of pytest on either side.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.compare import turns
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.errors import MachineError
from skipcost.bench.measure.process import PYTHON, Process, finished

TURN_S = 0.02  # of calls in a turn: long against the pipe's latency, short against what disturbs the machine
LEAST_BLOCKS = 6
PROFILED = 5  # calls
NAMED, GOOD_PART = 2, 0.2  # operators and layers, and what share of a change they must have to be named
SCRIPT = Path(turns.__file__)
# glibc's malloc keeps what is freed. How much it gives back and faults in again is an accident of each process: UNet 3+
# of width 8 at 96x96 took 650 to 1,900 page faults a call, and none like this.
ALLOCATION = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


ORDER = (0, 1, 1, 0)


class SideError(Exception):
    """Sides that cannot run a case; the argument says why, by revision."""


class Side:
    """A process of one revision; `ask` is its protocol."""

    def __init__(self, revision: Revision) -> None:
        self.revision = revision
        self._process = Process([*PYTHON, str(SCRIPT)], env=revision.environment() | ALLOCATION)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer; SideError where it is an error, MachineError where the process died."""
        self._process.tell(request)
        reply = self._process.read()
        if reply is None:
            message = f"the process of {self.revision.commit[:12]} {self._process.ended()}"
            raise MachineError(message)
        if "error" in reply:
            raise SideError({self.revision.commit: reply["error"]})
        return reply

    def ticks(self) -> int:
        """Clock ticks of processor time that the process has used."""
        fields = Path(f"/proc/{self._process.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def close(self) -> None:
        """End the process."""
        self._process.close()


@contextlib.contextmanager
def facing(base: Revision, now: Revision) -> Iterator[tuple[Side, Side]]:
    """Two fresh processes."""
    sides = [Side(base)]
    try:
        sides.append(Side(now))
        yield sides[0], sides[1]
    finally:
        for side in sides:
            side.close()


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process pair measured of a case.

    ratios: log of now / base per block; base_s, now_s: medians of all calls; others: share of the machine's processor
    time that went to other processes; changes: operators and layers in which, by a profile, a good part of the change
    is, with their seconds a call; took_s: seconds that all of it took, with what had to be started for it.
    """

    ratios: tuple[float, ...]
    base_s: float
    now_s: float
    others: float = 0.0
    changes: tuple[tuple[str, float], ...] = ()
    took_s: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measured:
        """Read what `dataclasses.asdict` and JSON made of one."""
        changes = tuple((name, seconds) for name, seconds in values["changes"])
        return cls(**{**values, "ratios": tuple(values["ratios"]), "changes": changes})


def measure_pair(
    case: Case, sides: tuple[Side, Side], seconds: float, slowdown: float = 0.0, *, profiled: bool = False
) -> Measured:
    """Let both sides take turns at a case for about `seconds`, in blocks A B B A and B A A B by turns."""
    call_s = _prepare(case, sides, slowdown)
    calls = max(1, round(TURN_S / call_s))
    blocks = max(LEAST_BLOCKS, round(seconds / (4 * calls * call_s)))
    found: tuple[list[float], list[float]] = ([], [])
    ratios = []
    before = _busy(sides)
    for number in range(blocks):
        order = (0, 1, 1, 0) if number % 2 == 0 else (1, 0, 0, 1)
        logs = [0.0, 0.0]
        for at in order:
            times = sides[at].ask(calls=calls)["seconds"]
            found[at].extend(times)
            logs[at] += math.log(statistics.median(times)) / 2
        ratios.append(logs[1] - logs[0])
    others = _others_share(before, _busy(sides))
    base_s, now_s = (statistics.median(each) for each in found)
    changes = _profile(sides, now_s - base_s) if profiled else ()
    return Measured(tuple(ratios), base_s, now_s, others, changes)


def _profile(sides: tuple[Side, Side], change_s: float) -> tuple[tuple[str, float], ...]:
    """Profile both sides; return the operators and layers that have a good part of a call's change, and go its way."""
    base, now = (side.ask(profile=PROFILED)["profile"] for side in sides)
    named = []
    for kind, place in (("operators", ""), ("layers", "in ")):
        names = {**base[kind], **now[kind]}
        change = {place + name: now[kind].get(name, 0.0) - base[kind].get(name, 0.0) for name in names}
        largest = sorted(change.items(), key=lambda item: -abs(item[1]))[:NAMED]
        named += [item for item in largest if item[1] * change_s >= GOOD_PART * change_s**2]
    return tuple(named)


def _prepare(case: Case, sides: tuple[Side, Side], slowdown: float) -> float:
    """Have both sides build the case and warm it up; return the slower one's seconds a call."""
    definition, failures = json.loads(case.to_json()), {}
    seconds: list[float] = []
    for side, share in zip(sides, (0.0, slowdown), strict=True):
        try:
            seconds.append(side.ask(case=definition, slowdown=share)["call_s"])
        except SideError as error:
            failures.update(error.args[0])
    if failures:
        raise SideError(failures)
    return max(seconds)


@dataclass(frozen=True, slots=True)
class Busy:
    """Clock ticks so far: of all processors, idle or not; of them busy; and of those, the two sides'."""

    all: int
    busy: int
    ours: int


def _busy(sides: tuple[Side, Side]) -> Busy:
    """Read the system's counters; all zero where it has none."""
    try:
        ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        ours = sum(side.ticks() for side in sides)
    except OSError:
        return Busy(0, 0, 0)
    idle = ticks[3] + ticks[4]  # waiting for a disk is idle
    return Busy(sum(ticks), sum(ticks) - idle, ours)


def _others_share(before: Busy, after: Busy) -> float:
    """Share of the machine's processor time that went to other processes."""
    whole = after.all - before.all
    return max(0, after.busy - before.busy - (after.ours - before.ours)) / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of two revisions. `open` starts a fresh one of processes; what it yields measures (key, profiled)."""

    base: str
    now: str
    open: Callable[[], AbstractContextManager[Callable[[str, bool], Measured]]]


def case_pairs(base: Revision, now: Revision, seconds: float, slowdown: float = 0.0) -> Pairs:
    """Cases, in two processes that take turns for about `seconds` at each.

    slowdown: a share of each call's time, added to the second side.
    """

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str, bool], Measured]]:
        with facing(base, now) as sides:

            def measure(key: str, profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
                return measure_pair(Case.from_json(key), sides, seconds, slowdown, profiled=profiled)

            yield measure

    return Pairs(base.commit, now.commit, opened)


def benchmark_pairs(names: Sequence[str], base: Revision, now: Revision) -> Pairs:
    """Benchmarks by their pytest names: a pair is two runs of pytest on either side, A B B A, all names in each."""

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str, bool], Measured]]:
        times: list[list[dict[str, float]]] = [[], []]
        for at in ORDER:
            side = (base, now)[at]
            times[at].append(run_benchmarks(names, side.tree, side.environment()))

        def measure(key: str, _profiled: bool) -> Measured:  # noqa: FBT001 - the form of pairs
            lacking = {
                side.commit: f"there is no benchmark {key}"
                for side, runs in zip((base, now), times, strict=True)
                if any(key not in run for run in runs)
            }
            if lacking:
                raise SideError(lacking)
            base_s, now_s = (math.exp(sum(math.log(run[key]) for run in runs) / len(runs)) for runs in times)
            return Measured((math.log(now_s / base_s),), base_s, now_s)

        yield measure

    return Pairs(base.commit, now.commit, opened)


def run_benchmarks(names: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run benchmarks by their pytest names in a folder, in a whole environment; return each one's median in seconds."""
    # A run of its own, also where a test under pytest-xdist starts it.
    own = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "benchmarks.json"
        options = ("-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={output}")
        done = finished([*PYTHON, "-m", "pytest", *options, *names], cwd=folder, env=own)
        if not output.is_file() or done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            message = f"`pytest {' '.join(names)}` fails in {folder} (exit code {done.returncode}): {said}"
            raise MachineError(message)
        content = json.loads(output.read_text())
    return {each["fullname"]: each["stats"]["median"] for each in content["benchmarks"]}


def benchmarks_of(names: Sequence[str], *sides: Revision) -> list[str]:
    """The full names of all benchmarks that the names stand for, on any side; each is run once for it."""
    found: dict[str, None] = {}
    for side in sides:
        found |= dict.fromkeys(run_benchmarks(names, Path(side.tree), side.environment()))
    return list(found)
