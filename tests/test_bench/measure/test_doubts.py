"""What makes a latency doubtful: the machine meanwhile, the distance from its line, a precision's instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.commands import doctor
from skipcost.bench.commands import plan as preview
from skipcost.bench.measure import doubts, probe
from skipcost.bench.measure import run as running
from skipcost.bench.measure.doubts import DOUBTS, FAR, PASS_S, Machine, Timing, line_of, machine
from skipcost.bench.measure.timing import Budget, Samples, Use
from skipcost.bench.sweeps.plan import PlannedCase
from skipcost.bench.time.passes import passes
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import FIGURES, Device, device_named
from skipcost.unet_models import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case(spec=ModelSpec(depth=1, width=4), height=32, width=32)
RATES = {"fp32": 1e11, "bf16": 1e9, "fp16": 4e10}
CPU = Device("A CPU", "cpu", 1 << 33, 1e10, RATES, dict.fromkeys(FIGURES, "measured by a probe"))
QUIET = Machine(load=0.5, cpus=4, process_s=1.0, ticks=1000, busy=100, stolen=0)
LATER = replace(QUIET, process_s=2.98, ticks=1200, busy=300)  # two seconds of one CPU, all of them ours but 20 ms


def timed(case: Case = CASE, seconds: float = 1e-3, device: Device | None = CPU, **after: float) -> Timing:
    """A case that was timed on a quiet machine; `after` is what its counters say in the end."""
    block = Use(1.0, 1.0, 1.0, 1)
    samples = Samples([seconds] * 16, 6, flat=True, blocks=(block, block))
    return Timing(case, samples, QUIET, replace(LATER, **after), device)  # type: ignore[arg-type]  # whole where they are


def test_a_quiet_machine_raises_no_doubt() -> None:
    """A latency near its line, on a CPU that nothing else used."""
    assert timed().note(Budget()) == ""


@pytest.mark.parametrize(
    ("timing", "kind", "note"),
    [
        (timed(process_s=1.9), doubts.taken_by_others, "held up: other processes took 55% of its CPUs"),
        (timed(stolen=60, process_s=2.38), doubts.stolen, "held up: the machine's host took 30% of its CPUs"),
        (timed(load=5.2), doubts.crowded, "busy: the load was 5.2 on 4 CPUs"),
        (timed(seconds=3.0), doubts.far_from_the_line, "far off: [0-9]+ times its reference line"),
        (timed(replace(CASE, precision="bf16")), doubts.slow_operands, "no instructions for bf16, .* take 100 times"),
        (timed(replace(CASE, precision="amp-bf16")), doubts.slow_operands, "no instructions for bf16"),
    ],
)
def test_each_doubt_is_told_alone(timing: Timing, kind: Callable[[Timing], str], note: str) -> None:
    """One kind of trouble is one sentence; the others have nothing to say of it."""
    told = {doubt: doubt(timing) for doubt in DOUBTS}

    assert re.search(note, told.pop(kind))
    assert set(told.values()) == {""}


@pytest.mark.parametrize(
    "timing",
    [
        timed(process_s=2.85),  # others had 7 %
        timed(ticks=1040, busy=140, process_s=1.0),  # too few ticks to tell
        timed(load=4.9),
        timed(replace(CASE, precision="fp16")),  # slower than fp32, yet with instructions
        timed(replace(CASE, precision="bf16"), device=replace(CPU, architecture="sm90")),
        timed(seconds=3.0, device=None),  # no limits are known
    ],
)
def test_what_may_be_chance_or_is_not_known_is_no_doubt(timing: Timing) -> None:
    """Near a threshold, too short to tell, or without anything to compare with."""
    assert timing.note(Budget()) == ""


def test_a_latency_of_three_samples_far_off_its_line_has_both_doubts() -> None:
    """As a machine with other work gave it: few, alike, and thousands of times too long."""
    line = bound(CASE, CPU).seconds
    timing = timed(seconds=3331 * line + 1)

    told = replace(timing, samples=replace(timing.samples, seconds=[3331 * line + 1] * 3)).note(Budget())

    assert "3 samples only" in told
    assert "far off:" in told


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_bound_leaves_room_for_every_operator(mode: str) -> None:
    """A tiny network is all overhead: hundreds of times its line are no doubt, beyond the allowance they are."""
    case = replace(CASE, mode=mode)
    most = FAR * bound(case, CPU).seconds + PASS_S * len(passes(case))

    assert most > 300 * bound(case, CPU).seconds
    assert doubts.far_from_the_line(timed(case, most)) == ""
    assert "far off" in doubts.far_from_the_line(timed(case, most * 1.01))


def test_one_kind_is_told_once() -> None:
    """A thread that waited, was preempted, and shared its CPU is one thing; the figures are in the detail."""
    timing = timed(process_s=1.9)
    block = Use(1.0, 0.4, 0.4, 110)

    told = replace(timing, samples=replace(timing.samples, blocks=(block, block))).note(Budget())

    assert told == "held up: the step had a CPU for 40% of its time"


@pytest.mark.parametrize("case", [replace(CASE, spec=Factory("models:mine")), replace(CASE, precision="tf32")], ids=str)
def test_what_has_no_line_is_not_far_from_it(case: Case) -> None:
    """A model of a user's own has no passes, a CPU no tf32."""
    assert line_of(case, CPU) is None
    assert doubts.far_from_the_line(timed(case, 1e3)) == ""


def test_counters_that_are_not_there_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another system, or a container without them: no share is made up."""

    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)

    assert (machine().ticks, machine().busy, machine().stolen) == (0, 0, 0)
    assert replace(timed(), before=machine(), after=machine()).others == 0


def test_ticks_are_those_of_the_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs, of which this process has the second: user 5, nice 1, system 2, idle 70, waiting 10, steal 12."""
    lines = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 8 8 8 8 8 8 8 8 0 0\ncpu1 5 1 2 70 10 0 0 12 0 0\nintr 1 2\n"
    monkeypatch.setattr(Path, "read_text", lambda _: lines)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})

    found = machine()

    assert (found.ticks, found.busy, found.stolen) == (100, 20, 12)


def _latency(**change: Any) -> Any:
    return running.latency(replace(CASE, **change), Budget(seconds=0.5, noise=0.0, warmup_seconds=0.1))


def test_a_row_holds_what_it_was_judged_by() -> None:
    """Each block's clock and CPU time beside the samples, and the machine's figures, whatever they were."""
    result = _latency()

    blocks = result.detail["blocks"]
    assert len(blocks["wall_s"]) == len(blocks["thread_s"]) == len(blocks["process_s"])
    assert sum(blocks["wall_s"]) >= sum(result.samples) * 0.99
    assert result.detail["cpu_share"] == pytest.approx(sum(blocks["thread_s"]) / sum(blocks["wall_s"]), rel=0.01)
    assert {"load", "load_after", "cpus", "preempted", "others", "stolen"} <= set(result.detail)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are put on one CPU")
def test_a_row_that_was_measured_beside_others_says_so() -> None:
    """Four processes that spin on the CPU of the step leave it a fifth."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # and what is started from here
    spin = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(4)]
    try:
        result = _latency()
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()

    assert "held up: the step had a CPU for" in result.note
    assert result.detail["cpu_share"] < 0.9


def test_a_row_of_a_precision_without_instructions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the probe of this machine found it."""
    monkeypatch.setattr(running, "known_device", lambda _: CPU)

    assert "slow: the CPU has no instructions for bf16" in _latency(precision="bf16").note


def test_slow_precisions_are_told_before_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence a precision, for what is timed on a CPU; a CPU is not probed for anything else."""
    probed: list[int] = []

    def probing(threads: int) -> Device:
        probed.append(threads)
        return CPU

    monkeypatch.setattr(preview, "probed_cpu", probing)
    bf16, gpu = replace(CASE, precision="bf16"), replace(CASE, precision="bf16", device="cuda")

    told = preview.slow_precisions([
        PlannedCase(bf16, ("params", "latency_s")),
        PlannedCase(replace(bf16, batch=2), ("layers_s",)),
        PlannedCase(replace(CASE, precision="amp-fp16"), ("latency_s",)),
        PlannedCase(replace(bf16, threads=2), ("params",)),
        PlannedCase(CASE, ("latency_s",)),
        PlannedCase(gpu, ("latency_s",)),
    ])  # fmt: skip

    assert [text.partition(",")[0] for text in told] == [
        "2 cases with precision=bf16: slow: the CPU has no instructions for bf16"
    ]
    assert probed == [1, 1]


def test_the_doctor_names_precisions_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among what makes numbers doubtful here."""
    monkeypatch.setattr(doctor, "known_cpu", lambda _: CPU)

    told = doctor._doubts({"cpus": 4, "dirty": False, "flags": {}})

    assert [text for text in told if "no instructions" in text] == [probe.slow_words(CPU, "bf16")]


@pytest.mark.parametrize(("ratio", "told"), [(140, True), (86, True), (17, True), (8, False), (0.5, False)])
def test_slow_is_far_beyond_half_the_width(ratio: float, told: bool) -> None:  # noqa: FBT001 - a parameter
    """Emulation takes 30 to 140 times fp32's time; converting operands two to four times."""
    device = replace(CPU, flop_per_s={"fp32": 1e11, "fp16": 1e11 / ratio})

    assert bool(probe.slow_words(device, "fp16")) is told
    assert probe.slow_words(device_named("h100"), "fp16") == ""
