"""What makes a latency doubtful beyond its samples; DOUBTS is the table: each gives a sentence for a note, or nothing.

That is what the machine did meanwhile, how far the latency is from its reference line, and a precision that the CPU
has no instructions for. Thresholds have their reasons beside them. No torch, and nothing is measured: the machine's own
counters are read before and after.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.measure import timing
from skipcost.bench.measure.probe import slow_words
from skipcost.bench.measure.timing import Budget, Samples
from skipcost.bench.time.passes import passes
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import Device

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
LEAST_TICKS = 50  # of processor time, to tell a tenth from rounding: a tick either way is 2 % of them
TAKEN = 0.1  # of our CPUs' time, by others or by the host of a virtual machine: twice what a latency may change by
# What eager operators take beside their arithmetic: 45 to 75 us each at inference and 140 to 180 us with backward and
# optimizer, on one slow thread (EPYC, 2.5 GHz, under load). Steps came out at half to twice their line and that.
PASS_S = 1e-3
FAR = 20  # times the line, an order of magnitude above what layouts and sizes without a quick kernel took


@dataclass(frozen=True, slots=True)
class Machine:
    """What the system counts: load, all its CPUs, and clock ticks of the CPUs that this process may use.

    load: of the last minute, over all CPUs of the machine (the system's, whatever this process may use); process_s: CPU
    time of this process; ticks: all, not idle, and stolen by the host of a virtual machine; 0 where nothing tells.
    """

    load: float
    cpus: int
    process_s: float = 0.0
    ticks: int = 0
    busy: int = 0
    stolen: int = 0


def machine() -> Machine:
    """Read the system's counters."""
    known = os.getloadavg()[0], os.cpu_count() or 1, time.process_time()
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [[int(number) for number in line[1:9]] for line in lines if line[0] in ours]
        whole = sum(map(sum, rows))
        idle = sum(row[3] + row[4] for row in rows)  # waiting for a disk is idle
        return Machine(*known, whole, whole - idle, sum(row[7] for row in rows))
    except (OSError, AttributeError, IndexError, ValueError):  # another system, or counters of another form
        return Machine(*known)


@dataclass(frozen=True, slots=True)
class Timing:
    """A case as it was timed: samples, the machine before and after, and the device's limits where they are known."""

    case: Case
    samples: Samples
    before: Machine
    after: Machine
    device: Device | None = None

    def share(self, ticks: float) -> float:
        """Clock ticks as a share of our CPUs' time meanwhile; 0 where too few passed to tell."""
        whole = self.after.ticks - self.before.ticks
        return max(0.0, ticks / whole) if whole >= LEAST_TICKS else 0.0

    @property
    def others(self) -> float:
        """Share of our CPUs' time that went to other processes, not counting what was stolen."""
        busy = self.after.busy - self.before.busy - (self.after.stolen - self.before.stolen)
        return self.share(busy - (self.after.process_s - self.before.process_s) / TICK_S)

    @property
    def stolen(self) -> float:
        """Share of our CPUs' time that the host of a virtual machine gave to somebody else."""
        return self.share(self.after.stolen - self.before.stolen)

    def note(self, budget: Budget) -> str:
        """Say what makes the latency doubtful, each kind once, by its first word; empty where nothing does."""
        kinds: dict[str, str] = {}
        for said in (*(doubt(self.samples, budget) for doubt in timing.DOUBTS), *(doubt(self) for doubt in DOUBTS)):
            kinds.setdefault(said.partition(":")[0], said)
        return "; ".join(filter(None, kinds.values()))

    def detail(self) -> dict[str, Any]:
        """The figures that doubts go by, as JSON values; `blocks` are raw: seconds by the clock, of CPU time."""
        use, blocks = self.samples.use, self.samples.blocks
        return {
            "load": self.before.load,
            "load_after": self.after.load,
            "cpus": self.after.cpus,
            "cpu_share": use.share,
            "preempted": use.preempted,
            "others": self.others,
            "stolen": self.stolen,
            "blocks": {
                name: [round(getattr(each, name), 6) for each in blocks] for name in ("wall_s", "thread_s", "process_s")
            },
        }


def taken_by_others(timed: Timing) -> str:
    """Other processes ran on our CPUs: the counterpart of `waited`, which threads that spin for each other hide."""
    return f"held up: other processes took {timed.others:.0%} of its CPUs" if timed.others > TAKEN else ""


def stolen(timed: Timing) -> str:
    """The host of this virtual machine ran something else, which no clock in here shows as waiting."""
    return f"held up: the machine's host took {timed.stolen:.0%} of its CPUs" if timed.stolen > TAKEN else ""


def crowded(timed: Timing) -> str:
    """More threads than CPUs wanted to run for a minute, by more than the one that measures may add."""
    load = max(timed.before.load, timed.after.load)
    return f"busy: the load was {load:.1f} on {timed.after.cpus} CPUs" if load > timed.after.cpus + 1 else ""


def far_from_the_line(timed: Timing) -> str:
    """A step is off its reference line beyond what operators' overhead and slow kernels explain."""
    line = line_of(timed.case, timed.device)
    median = statistics.median(timed.samples.seconds)
    if line is None or median <= FAR * line + PASS_S * len(passes(timed.case)):
        return ""
    return f"far off: {median / line:.0f} times its reference line"


def slow_operands(timed: Timing) -> str:
    """The CPU multiplies operands of this precision without instructions for them."""
    return slow_words(timed.device, timed.case.precision) if timed.device else ""


DOUBTS: tuple[Callable[[Timing], str], ...] = (taken_by_others, stolen, crowded, far_from_the_line, slow_operands)


def line_of(case: Case, device: Device | None) -> float | None:
    """The reference line; None where a case has none: a model of a user's own, limits that are not known."""
    if device is None or case.factory:
        return None
    try:
        return bound(case, device).seconds
    except ValueError:
        return None
