"""Timing on one machine: verify configurations, several at a time, then time what passed, and keep a row of each.

`survey` and `take` work in a process of their own (`jobs`); `Bench` is their other end.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import jobs
from skipcost.bench.kernels.cases import STEP_MACS, USEFUL
from skipcost.bench.kernels.jobs import Done, Job, Limits, Row
from skipcost.bench.kernels.judging import (
    Configuration,
    job_bytes,
    limits_for,
    on_operands,
    part_of,
    tile_of,
    verify,
    watched,
    what_of,
)
from skipcost.bench.measure.journal import Journal, code_hash, identity
from skipcost.bench.measure.machine import Machine, facts, machine_of, measure_ceilings, versions
from skipcost.bench.measure.timing import Budget, sample
from skipcost.kernels.dispatch.call import Call

if TYPE_CHECKING:
    from skipcost.kernels.verify.table import Operands

CACHES = ("hot", "cold")
CHUNK = 300  # configurations, or a few more: a minute of work, against ten seconds of starting processes
REPEATS = 8  # calls in one hot sample: the gap before a graph starts is a large part of a single short call
BUDGET = Budget(seconds=0.04, noise=0.01, least=15, warmup_seconds=0.2)


def survey(what: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Describe the device and measure its ceilings: a row for each part."""
    machine, options = machine_of(what["device"]), dict(what["sizes"])
    if what["budget"]:
        options["budget"] = Budget(**what["budget"])
    for _ in parts:
        ceilings = measure_ceilings(machine, USEFUL, **options)
        yield {"device": facts(machine.device), "versions": versions(), **asdict(ceilings)}


def take(what: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Time each configuration of a call; a row has the samples by cache."""
    from skipcost.kernels.verify.table import KERNELS  # noqa: PLC0415 - loads every op

    call, machine, budget = Call.parse(what["call"]), machine_of(what["device"]), Budget(**what["budget"])

    def attempt(given: Operands, part: dict[str, Any]) -> Row:
        run, tile = KERNELS[call.op].implementations[part["implementation"]], tile_of(part)
        taken = {cache: _samples(machine, lambda: run(given, tile), cache, budget) for cache in what["caches"]}
        return {"outcome": "ok", "graph": machine.graphs, "taken": taken}

    yield from on_operands(call, what, parts, attempt)


def _samples(machine: Machine, call: Callable[[], object], cache: str, budget: Budget) -> Row:
    """Return seconds of one call: hot ones as a share of several back to back."""
    repeats = REPEATS if cache == "hot" else 1
    found = sample(machine.capture(call, repeats), machine.clock_for(cache), budget)
    return {"seconds": [each / repeats for each in found.seconds], "note": found.note(budget)}


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: where rows go, on which device, until when, against which ceilings, with which caches.

    budget: for each measurement, in place of what suits its kind.
    """

    journal: Journal
    device: str
    until: float
    ceilings: dict[str, Any]
    caches: tuple[str, ...] = CACHES
    budget: Budget | None = None

    @property
    def alone(self) -> Limits:
        """One process at a time: what is timed has the GPU to itself."""
        return Limits(self.until, workers=1 if self.device == "cuda" else 0)

    def time_calls(self, title: str, wanted: Iterable[Configuration]) -> int:
        """Verify and time every configuration that has no row yet; return for how many time ran out."""
        todo = [each for each in wanted if identity(call_row(each)) not in self.journal.known]
        chunks = list(_chunks(todo))
        return sum(self._time(f"{title} {at}/{len(chunks)}", chunk) for at, chunk in enumerate(chunks, 1))

    def _time(self, title: str, todo: Sequence[Configuration]) -> int:
        """Verify configurations, several at a time, then time those that passed, one by one."""
        passed, left = self._verify(title, todo)
        more = {"caches": self.caches, "budget": asdict(self.budget or BUDGET)}
        work = _grouped(passed, self.device, more)
        for done in watched(f"{title}, timing", work, take, self.alone):
            if done.row is None:
                left += 1
                continue
            key = _configuration(done)
            self._keep(key, done.row | {"worst": passed[key]})
        return left

    def _verify(self, title: str, todo: Sequence[Configuration]) -> tuple[dict[Configuration, float], int]:
        """Return the error of each configuration that may be timed; failures are rows, not missing ones."""
        passed, left = {}, 0
        work, limits = _grouped(todo, self.device), limits_for(self.device, self.until)
        for done in watched(f"{title}, verifying", work, verify, limits):
            if done.row is None:
                left += 1
                continue
            if done.row["outcome"] == "ok":
                passed[_configuration(done)] = done.row["worst"]
            else:
                self._keep(_configuration(done), done.row)
        return passed, left

    def _keep(self, key: Configuration, found: Row) -> None:
        """Write a row for each cache, or one for what was wrong."""
        row = call_row(key) | {name: found.get(name) for name in ("outcome", "note", "worst", "graph")}
        if found["outcome"] != "ok":
            self.journal.add(row | {"seconds": [], "cache": None})
            return
        for cache, taken in found["taken"].items():
            self.journal.add({**row, **taken, "cache": cache, **self._fractions(key[0], taken["seconds"])})

    def _fractions(self, call: Call, seconds: Sequence[float]) -> Row:
        """Return what a call reaches of the ceilings; a step's traffic depends on what it keeps, so it has no share."""
        step, middle = call.op == "conv_bn_relu_train", statistics.median(seconds)
        macs = call.macs * (STEP_MACS if step else 1)
        return {
            "fraction_of_copy": None if step else call.bytes / middle / self.ceilings["copy_bytes_per_s"],
            "fraction_of_matmul": macs / middle / self.ceilings["macs_per_s"][call.precision] if macs else None,
        }


def call_row(key: Configuration) -> Row:
    """Return the row of a configuration without its numbers."""
    call, name, tile = key
    return {"op": call.op, "call": call.key, "precision": call.precision, **part_of(name, tile)}


def _chunks(todo: Sequence[Configuration]) -> Iterator[list[Configuration]]:
    """Cut into pieces, all configurations of a call in one: verdicts are not kept, so timing must follow soon."""
    chunk: list[Configuration] = []
    for _, group in itertools.groupby(todo, key=lambda key: key[0]):
        chunk += group
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _grouped(wanted: Iterable[Configuration], device: str, more: Row | None = None) -> list[Job]:
    """Make one job of all configurations of a call."""
    parts: dict[Call, list[dict[str, Any]]] = {}
    for call, name, tile in wanted:
        parts.setdefault(call, []).append(part_of(name, tile))
    return [Job(what_of(call, device) | (more or {}), tuple(each), job_bytes(call)) for call, each in parts.items()]


def _configuration(done: Done) -> Configuration:
    return Call.parse(done.what["call"]), done.part["implementation"], tile_of(done.part)


def open_bench(
    path: Path | None, title: str, device: str, seconds: float, *, copy: Path | None = None,
    caches: tuple[str, ...] = CACHES, budget: Budget | None = None, **sizes: Any,
) -> Bench:  # fmt: skip
    """Survey the device, open the file of its rows, `results/TITLE-DEVICE.jsonl` by default, and start the clock.

    copy: a second file for the rows of calls that give numbers. sizes: of `measure_ceilings`.
    """
    until = time.time() + seconds
    limits = Limits(until, workers=1 if device == "cuda" else 0)
    what = {"device": device, "sizes": sizes, "budget": asdict(budget) if budget else None}
    (done,) = jobs.run([Job(what, ({},))], survey, limits)
    if done.row is None or "device" not in done.row:
        why = done.row["note"] if done.row else f"--seconds {seconds:g} were over before it was done"
        message = f"the device could not be surveyed: {why}"
        raise MachineError(message)
    origin = {"device": done.row["device"], "versions": done.row["versions"] | {"code": code_hash()}}
    name = re.sub(r"[^a-z0-9]+", "-", origin["device"]["name"].lower()).strip("-")
    journal = Journal(path or Path("results") / f"{title}-{name}.jsonl", origin, copy)
    return Bench(journal, device, until, done.row, caches, budget)
