"""The one timing loop: warm up until flat, then sample until the median is known well enough or the budget is spent.

It knows nothing of torch: a clock runs a call a number of times and returns one duration per call. All samples are
kept; statistics are computed when they are read. Beside each block of calls stands what the process used of its CPUs
meanwhile: a thread that waited for one shows there, and not in the samples' spread. DOUBTS is the table of what makes
samples doubtful by themselves.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Clock = Callable[[Callable[[], object], int], list[float]]

FLAT = 0.05  # the last calls are flat when two medians of three differ by less than this
WINDOW = 3
BLOCK = 16
FEW = 6  # fewest samples whose least and largest hold the median in 95 of 100 cases: 1 - 2 ** (1 - n) is 94 % for five
WAITED = 0.1  # of the time without a CPU: threads' clocks are good to microseconds, a quiet step shows below 1 %
# Processes that share a CPU take turns every 3 to 6 ms (Linux's base slice), 80 to 170 times a second; what a quiet
# machine does for itself takes a CPU for microseconds, some ten times a second and thread.
OFTEN_PER_S, SEEN = 60, 5
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
class Use:
    """What a process used between two moments, or up to one.

    wall_s: seconds by the clock; thread_s, process_s: of CPU time, by the calling thread and by all threads; preempted:
    how often a thread had to leave its CPU to something else.
    """

    wall_s: float
    thread_s: float
    process_s: float
    preempted: int

    def __sub__(self, before: Use) -> Use:
        """What was used since `before`."""
        return Use(
            self.wall_s - before.wall_s,
            self.thread_s - before.thread_s,
            self.process_s - before.process_s,
            self.preempted - before.preempted,
        )

    @property
    def share(self) -> float:
        """Of the time, what the calling thread had a CPU for; it computes or spins all through a step."""
        return self.thread_s / self.wall_s if self.wall_s else 1.0


def used() -> Use:
    """What this process has used so far."""
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return Use(time.perf_counter(), time.thread_time(), time.process_time(), preempted)


@dataclass(frozen=True, slots=True)
class Samples:
    """Durations in seconds, with what was spent to get them; `blocks` is what each block of calls used, in order."""

    seconds: list[float]
    warmup_calls: int
    flat: bool
    blocks: tuple[Use, ...] = ()

    @property
    def use(self) -> Use:
        """What all of the sampling used."""
        wall, thread, process = (
            sum(getattr(each, name) for each in self.blocks) for name in ("wall_s", "thread_s", "process_s")
        )
        return Use(wall, thread, process, sum(each.preempted for each in self.blocks))

    def note(self, budget: Budget) -> str:
        """Say what makes the samples doubtful; empty where nothing does."""
        return "; ".join(filter(None, (doubt(self, budget) for doubt in DOUBTS)))


def unsettled(samples: Samples, _budget: Budget) -> str:
    """The warm-up ended before its calls were flat."""
    return "" if samples.flat else f"still warming up after {samples.warmup_calls} calls"


def noisy(samples: Samples, budget: Budget) -> str:
    """The median is known five times worse than was asked for."""
    width = half_width(samples.seconds)
    return f"noisy: the median is known to {width:.0%} only" if width > 5 * budget.noise else ""


def few(samples: Samples, _budget: Budget) -> str:
    """There are too few samples to say where the median lies, however alike they are."""
    count = len(samples.seconds)
    return f"{count} samples only: fewer than {FEW} do not bound a median" if count < FEW else ""


def waited(samples: Samples, _budget: Budget) -> str:
    """The calling thread was without a CPU for more than a tenth of the time: others had it, or it waited itself."""
    share = samples.use.share
    return f"held up: the step had a CPU for {share:.0%} of its time" if share < 1 - WAITED else ""


def preempted(samples: Samples, _budget: Budget) -> str:
    """Threads had to leave their CPUs as often as on a shared one; where the others spin meanwhile, only this shows."""
    use = samples.use
    if use.preempted < max(SEEN, OFTEN_PER_S * use.wall_s):
        return ""
    return f"held up: threads had to leave their CPUs {use.preempted / use.wall_s:.0f} times a second"


DOUBTS: tuple[Callable[[Samples, Budget], str], ...] = (unsettled, noisy, few, waited, preempted)


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


def sample(call: Callable[[], object], clock: Clock, budget: Budget, meter: Callable[[], Use] = used) -> Samples:
    """Warm `call` up and time it with `clock` under `budget`; the garbage collector is off meanwhile.

    meter: tells what the process has used so far; asked either side of each block of calls.
    """
    with no_gc():
        warm, flat = _warm_up(call, clock, budget)
        # Short calls go in blocks: on a GPU the clock synchronises once a block.
        block = BLOCK if statistics.median(warm[-WINDOW:]) * BLOCK < budget.seconds / 8 else 1
        deadline = time.perf_counter() + budget.seconds
        seconds: list[float] = []
        blocks: list[Use] = []
        while True:
            before = meter()
            seconds += clock(call, block)
            blocks.append(meter() - before)
            known = len(seconds) >= budget.least and half_width(seconds) <= budget.noise
            now = time.perf_counter()
            spent = now >= deadline and len(seconds) >= budget.least
            # A call far longer than the budget: fewer samples, all kept.
            overspent = now >= deadline + budget.seconds * 4 and len(seconds) >= WINDOW
            if known or spent or overspent:
                return Samples(seconds, len(warm), flat, tuple(blocks))


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
