"""The one timing loop: warm up until flat, then sample until the median is known well enough or the budget is spent.

It knows nothing of torch: a clock runs a call a number of times and returns one duration per call. All samples are
kept; statistics are computed when they are read.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Clock = Callable[[Callable[[], object], int], list[float]]

FLAT = 0.05  # the last calls are flat when two medians of three differ by less than this
WINDOW = 3
BLOCK = 16
MOST = 1e6  # of a number in a budget: some twelve days


def check_number(name: str, value: object, above: float = float("-inf")) -> None:
    """Refuse what is no number, not above a bound or beyond any use, so nan; ValueError says what was received."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= MOST:
        accepted = "a number" if above == float("-inf") else f"a number above {above:g}"
        message = f"{name}={value!r} is not {accepted}, {MOST:.0f} at most"
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to sample, and when enough is known: seconds, relative half-width of the median, fewest samples."""

    seconds: float = 2.0
    noise: float = 0.01
    least: int = 10
    warmup_seconds: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a budget under which nothing would be measured."""
        for name in ("seconds", "noise", "least", "warmup_seconds"):
            check_number(name, getattr(self, name))
        if self.seconds <= 0 or self.noise < 0 or self.least < 1 or self.warmup_seconds < 0:
            message = f"{self} cannot be kept: seconds above 0, noise 0 or more, least 1 or more are accepted"
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Samples:
    """Durations in seconds, with what was spent to get them."""

    seconds: list[float]
    warmup_calls: int
    flat: bool

    def note(self, budget: Budget) -> str:
        """Say what makes the samples doubtful; empty where nothing does."""
        doubts = [] if self.flat else [f"still warming up after {self.warmup_calls} calls"]
        width = half_width(self.seconds)
        if width > 5 * budget.noise:
            doubts.append(f"noisy: the median is known to {width:.0%} only")
        return "; ".join(doubts)


def half_width(seconds: list[float]) -> float:
    """Relative half-width of the median's 95 % interval, from the quartiles (McGill, Tukey, Larsen, 1978)."""
    if len(seconds) < 2:  # noqa: PLR2004 - a spread takes two
        return float("inf")
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return float(1.57 * (high - low) / len(seconds) ** 0.5 / middle)


def cpu_clock(call: Callable[[], object], count: int, before: Callable[[], object] | None = None) -> list[float]:
    """Time `count` calls one by one on the host; `before` runs ahead of each and is not timed."""
    durations = []
    for _ in range(count):
        if before:
            before()
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return durations


def sample(call: Callable[[], object], clock: Clock, budget: Budget) -> Samples:
    """Warm `call` up and time it with `clock` under `budget`; the garbage collector is off meanwhile."""
    with no_gc():
        warm, flat = _warm_up(call, clock, budget)
        # Short calls go in blocks: on a GPU the clock synchronises once a block.
        block = BLOCK if statistics.median(warm[-WINDOW:]) * BLOCK < budget.seconds / 8 else 1
        deadline = time.perf_counter() + budget.seconds
        seconds: list[float] = []
        while True:
            seconds += clock(call, block)
            enough = len(seconds) >= budget.least
            if enough and (time.perf_counter() >= deadline or half_width(seconds) <= budget.noise):
                return Samples(seconds, len(warm), flat)
            if time.perf_counter() >= deadline + budget.seconds * 4 and len(seconds) >= WINDOW:
                return Samples(seconds, len(warm), flat)  # a call far longer than the budget: fewer samples, all kept


def _warm_up(call: Callable[[], object], clock: Clock, budget: Budget) -> tuple[list[float], bool]:
    warm = clock(call, 1)  # may compile or tune for a minute, which is no part of the warm-up's budget
    deadline = time.perf_counter() + budget.warmup_seconds
    while len(warm) < 2 * WINDOW or not _is_flat(warm):
        if time.perf_counter() >= deadline and len(warm) > 1:
            return warm, False
        warm += clock(call, 1)
    return warm, True


def _is_flat(warm: list[float]) -> bool:
    before, after = statistics.median(warm[-2 * WINDOW : -WINDOW]), statistics.median(warm[-WINDOW:])
    return abs(after - before) <= FLAT * before


@contextmanager
def no_gc() -> Iterator[None]:
    """Collect garbage now and not again inside the block; the caller's setting is restored."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
