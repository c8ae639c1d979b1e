"""Contenders that take turns in one process, so that what the machine does meanwhile falls on all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skipcost.bench.measure.timing import no_gc

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of every contender in each round, by the wall and of the process; the first contender is the base."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]
    threads: int

    def row(self, name: str) -> str:
        """A contender beside the base: medians, and the median of the rounds' ratios with the smallest and largest."""
        base = next(iter(self.wall))
        told = f"{name}: {statistics.median(self.wall[name]) * 1e3:.1f} ms"
        if name != base:
            ratios = sorted(mine / theirs for mine, theirs in zip(self.wall[base], self.wall[name], strict=True))
            told += f", {statistics.median(ratios):.2f}x faster ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        spent = statistics.median(self.processor[base]) / statistics.median(self.processor[name])
        return f"{told}, {spent:.2f}x less processor time"

    def table(self, title: str) -> str:
        """All contenders, with what a reader must know of the run."""
        rounds = len(next(iter(self.wall.values())))
        where = f"{self.threads} threads, {rounds} rounds, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
        return "\n".join([f"\n{title} ({where})", *(f"  {self.row(name)}" for name in self.wall)])


def take_turns(calls: Calls, rounds: int, threads: int) -> Turns:
    """Call every contender once to warm up, then once a round, in an order that turns round every time."""
    torch.set_num_threads(threads)
    made = Turns({name: [] for name in calls}, {name: [] for name in calls}, threads)
    with no_gc():
        for call in calls.values():
            call()
        for number in range(rounds):
            for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
                before = time.perf_counter(), time.process_time()
                calls[name]()
                made.wall[name].append(time.perf_counter() - before[0])
                made.processor[name].append(time.process_time() - before[1])
    return made
