"""What benchmarks share: our warm-up before pytest-benchmark's rounds, whose own calibration takes a cold call."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from skipcost.bench.measure.timing import Budget, _warm_up, cpu_clock, no_gc

SECONDS = 0.5  # of rounds
BUDGET = Budget(seconds=SECONDS, warmup_seconds=2.0)

Timed = Callable[..., None]


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Timed:
    """Benchmark a call: warmed up until flat, then for half a second; `extra_info` gets what is counted of it."""

    def run(call: Callable[[], object], **extra_info: float) -> None:
        torch.set_num_threads(1)  # two threads on a shared machine wait for each other
        with no_gc():
            warm, _flat = _warm_up(call, cpu_clock, BUDGET)
            rounds = max(5, round(SECONDS / statistics.median(warm[-3:])))
            benchmark.extra_info.update(extra_info)
            benchmark.pedantic(call, rounds=rounds, iterations=1)

    return run
