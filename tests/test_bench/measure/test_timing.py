"""The timing loop keeps every sample, warms up until flat and stops for a reason."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable

import pytest

from skipcost.bench.measure import timing
from skipcost.bench.measure.timing import DOUBTS, Budget, Clock, Samples, Use, cpu_clock, half_width, sample, used

SHORT = Budget(seconds=0.02, noise=0.01, least=5, warmup_seconds=0.05)


def scripted(durations: Iterable[float]) -> tuple[Clock, list[float]]:
    """A clock that reports durations from a script instead of measuring, and the list of all it has reported."""
    script, reported = iter(durations), list[float]()

    def clock(call: Callable[[], object], count: int) -> list[float]:
        call()
        reported.extend(itertools.islice(script, count))
        return reported[-count:]

    return clock, reported


def test_every_sample_after_the_warm_up_is_kept() -> None:
    """The samples are what the clock reported after the warm-up, outliers included, in order."""
    clock, reported = scripted(itertools.chain([1.0] * 6, itertools.cycle([1.0, 9.0, 2.0])))

    samples = sample(lambda: None, clock, SHORT)

    assert samples.seconds == reported[samples.warmup_calls :]
    assert 9.0 in samples.seconds


def test_the_warm_up_lasts_until_the_calls_are_flat() -> None:
    """Calls that still get faster belong to the warm-up."""
    clock, _ = scripted(itertools.chain([100.0, 50.0, 25.0, 12.0, 6.0, 3.0, 2.0], itertools.repeat(1.0)))

    samples = sample(lambda: None, clock, SHORT)

    assert samples.flat
    assert samples.warmup_calls >= 7 + 3
    assert set(samples.seconds) == {1.0}


def test_a_warm_up_that_never_flattens_is_told() -> None:
    """Where the calls keep changing, sampling starts when the warm-up's budget is spent, and the note says so."""
    clock, _ = scripted(2.0**-n for n in itertools.count())

    samples = sample(lambda: time.sleep(1e-3), clock, SHORT)

    assert not samples.flat
    assert "still warming up" in samples.note(SHORT)


def test_sampling_stops_once_the_median_is_known() -> None:
    """Samples without spread end the sampling at the least number, long before the budget is spent."""
    clock, _ = scripted(itertools.repeat(10.0))
    patient = Budget(seconds=30, noise=0.01, least=7, warmup_seconds=1)

    samples = sample(lambda: None, clock, patient)

    assert len(samples.seconds) == 7


def test_noise_is_told() -> None:
    """A median that is known badly is told with how badly."""
    clock, _ = scripted(itertools.chain([1.0] * 6, itertools.cycle([1.0, 3.0])))

    samples = sample(lambda: time.sleep(1e-3), clock, SHORT)

    assert "noisy: the median is known to" in samples.note(SHORT)


def test_the_garbage_collector_is_off_while_timing_and_on_again_after() -> None:
    """No collection falls into a sample, and the caller's setting is restored."""
    seen = set[bool]()

    sample(lambda: seen.add(gc.isenabled()), cpu_clock, SHORT)

    assert seen == {False}
    assert gc.isenabled()


def test_a_call_longer_than_the_budget_still_gives_samples() -> None:
    """One call of several budgets' length is sampled a few times, not the least number of times."""
    calls = itertools.count()

    def slow() -> None:
        next(calls)
        time.sleep(0.03)

    samples = sample(slow, cpu_clock, Budget(seconds=0.01, noise=0.0, least=50, warmup_seconds=0.01))

    assert 3 <= len(samples.seconds) < 50


def test_the_cpu_clock_measures_time() -> None:
    """A sleep takes at least as long as was asked for."""
    assert min(cpu_clock(lambda: time.sleep(2e-3), 3)) >= 2e-3


def test_half_width_of_equal_samples_is_zero_and_of_one_is_unknown() -> None:
    """Equal samples pin the median; a single one says nothing about it."""
    assert half_width([1.0, 1.0, 1.0]) == 0
    assert half_width([1.0]) == float("inf")


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"noise": -0.1}, {"least": 0}, {"warmup_seconds": -1}])
def test_a_budget_that_measures_nothing_is_refused(bad: dict[str, float]) -> None:
    """A budget without time or samples is a mistake in the sweep."""
    with pytest.raises(ValueError, match="cannot be kept"):
        Budget(**bad)  # type: ignore[arg-type]  # the values are numbers of the fields' own types


def sampled(count: int = 16, flat: bool = True, **used_by_block: float) -> Samples:  # noqa: FBT001, FBT002 - a field
    """So many samples of a second, two blocks of half a second each, all of it on a CPU; or as it is said."""
    block = Use(**{"wall_s": 0.5, "thread_s": 0.5, "process_s": 0.5, "preempted": 0, **used_by_block})  # type: ignore[arg-type]  # a whole number where it is one
    return Samples([1.0] * count, 6, flat, (block, block))


def test_quiet_samples_have_no_doubt() -> None:
    """Alike, many, flat, and on a CPU all the time, but for a scheduler's tick now and then."""
    samples = sampled(thread_s=0.495, preempted=10)

    assert samples.note(Budget()) == ""


@pytest.mark.parametrize(
    ("samples", "kind", "note"),
    [
        (sampled(flat=False), timing.unsettled, "still warming up after 6 calls"),
        (sampled(5), timing.few, "5 samples only: fewer than 6 do not bound a median"),
        (sampled(3), timing.few, "3 samples only"),
        (sampled(thread_s=0.2), timing.waited, "held up: the step had a CPU for 40% of its time"),
        (sampled(thread_s=0.44), timing.waited, "for 88% of its time"),
        (sampled(preempted=60), timing.preempted, "held up: threads had to leave their CPUs 120 times a second"),
        (sampled(wall_s=0.01, thread_s=0.01, preempted=4), timing.preempted, "their CPUs 400 times a second"),
    ],
)
def test_each_doubt_is_told_alone(samples: Samples, kind: Callable[..., str], note: str) -> None:
    """One kind of trouble is one sentence; the others have nothing to say of it."""
    told = {doubt: doubt(samples, Budget()) for doubt in DOUBTS}

    assert note in told.pop(kind)
    assert set(told.values()) == {""}


@pytest.mark.parametrize(
    "samples",
    [sampled(6), sampled(thread_s=0.46), sampled(preempted=28), sampled(wall_s=0.01, thread_s=0.01, preempted=2)],
)
def test_what_may_be_chance_is_no_doubt(samples: Samples) -> None:
    """Six samples, a twentieth without a CPU, some switches a second, or two in a short while."""
    assert samples.note(Budget()) == ""


def test_threads_that_spin_for_each_other_hide_a_wait_but_not_their_switches() -> None:
    """Two threads, both on a CPU all the time: where one is taken off it, only the switches tell."""
    samples = sampled(process_s=0.8, preempted=50)

    assert samples.note(Budget()) == "held up: threads had to leave their CPUs 100 times a second"


def test_every_block_of_calls_is_metered() -> None:
    """The meter is asked either side of a block, outside of the samples and the warm-up."""
    clock, _ = scripted(itertools.repeat(10.0))
    readings = itertools.count()

    def meter() -> Use:
        at = next(readings)
        return Use(float(at), at / 2, at / 4, at)

    samples = sample(lambda: None, clock, Budget(seconds=30, least=7), meter)

    assert samples.blocks == (Use(1.0, 0.5, 0.25, 1),) * 7
    assert samples.use == Use(7.0, 3.5, 1.75, 7)
    assert samples.use.share == 0.5


def test_samples_without_a_meter_have_waited_for_nothing() -> None:
    """What was never metered is not called busy."""
    assert Samples([1.0] * 10, 3, flat=True).note(Budget()) == ""


def test_a_step_that_sleeps_has_no_cpu_and_one_that_counts_has() -> None:
    """The real meter: half of a wait is no CPU time, whatever else this machine does."""

    def half_asleep() -> None:
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass
        time.sleep(4e-3)

    samples = sample(half_asleep, cpu_clock, Budget(seconds=0.1, least=8, warmup_seconds=0.01))

    assert samples.use.thread_s >= 2e-3 * len(samples.seconds)
    assert samples.use.share < 0.6
    assert "held up: the step had a CPU for" in samples.note(Budget())


def test_what_a_process_used_only_grows() -> None:
    """Clocks and switches of the real meter, beside each other."""
    before = used()
    sum(range(100_000))
    spent = used() - before

    assert spent.wall_s > 0
    assert 0 < spent.thread_s <= spent.process_s + 1e-3
    assert spent.preempted >= 0
