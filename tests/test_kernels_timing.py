"""The timing loop keeps every sample, warms up until flat and stops for a reason."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable

import pytest

from skipcost.kernels.timing import Budget, Clock, cpu_clock, half_width, sample

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
