"""What predicting live bytes costs: peaks and envelopes of networks that all differ, on one core.

Benchmarks, not tests: `nox -s perf` runs and prints them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.memory.liveness import envelope, peak_bytes
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

WIDTHS = range(8, 136, 8)
SPECS = [
    {"variant": variant, "skip": skip, "depth": 4, "width": width}
    for variant, skip, width in itertools.product(VARIANTS, SKIPS, WIDTHS)
]


@pytest.mark.parametrize("ask", [peak_bytes, envelope], ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_cases_per_second(benchmark: BenchmarkFixture, ask: Callable[[Case], object], mode: str) -> None:
    """Depth-4 networks of every variant and skip scheme, graphs made anew each time; aim: 1,000 a second."""
    spent = []

    def ask_all() -> None:
        start = time.process_time()  # a core's own time: others may be at work on it
        for spec in SPECS:
            ask(Case(spec=ModelSpec(**spec), mode=mode))
        spent.append(time.process_time() - start)

    benchmark.pedantic(ask_all, rounds=5, warmup_rounds=1)

    rate = len(SPECS) / sorted(spent[1:])[2]
    benchmark.extra_info["cases_per_second"] = rate
    print(f"\n{ask.__name__}, {mode}: {rate:,.0f} cases a second on one core (depth 4)")
