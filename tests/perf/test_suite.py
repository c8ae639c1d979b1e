"""What the suite itself costs: counting, the overhead of a process per case, the share of a sweep spent measuring.

Benchmarks, not tests: `nox -s perf` runs and prints them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skipcost.bench.cases.case import Case
from skipcost.bench.measure.timing import Budget
from skipcost.bench.store.store import create_store
from skipcost.bench.sweeps.driver import Request, Server, sweep
from skipcost.bench.sweeps.plan import Limits, Plan, PlannedCase
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

SPECS = [
    ModelSpec(variant=variant, skip=skip, depth=4, width=width)
    for variant, skip, width in itertools.product(VARIANTS, SKIPS, (8, 16, 32, 64))
]
BUDGET = {"seconds": 0.4, "noise": 0.02, "least": 10, "warmup_seconds": 1.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A fork server that has warmed up."""
    with Server() as running:
        yield running


def test_specs_counted_per_second(benchmark: BenchmarkFixture) -> None:
    """Wire and count depth-4 networks of every variant and skip scheme; aim: 1,000 a second."""

    def count_all() -> int:
        return sum(graph.params() + graph.conv_macs(512, 512) for graph in (spec.graph() for spec in SPECS))

    benchmark.pedantic(count_all, rounds=20, warmup_rounds=2)

    rate = len(SPECS) / benchmark.stats.stats.median  # type: ignore[union-attr]  # there after a run
    benchmark.extra_info["specs_per_second"] = rate
    print(f"\n{rate:,.0f} specs counted per second on one core (depth 4)")


def test_overhead_per_case(benchmark: BenchmarkFixture, server: Server) -> None:
    """One case with a counted metric: fork, set limits, count, pass the row on; aim: under 0.3 s."""
    case = Case(spec=ModelSpec(depth=2, width=8), height=128, width=128)
    request = Request(case, ("params",), BUDGET, 60.0, None)

    benchmark.pedantic(lambda: list(server.run(request)), rounds=20, warmup_rounds=2)

    overhead = benchmark.stats.stats.median  # type: ignore[union-attr]  # there after a run
    print(f"\n{overhead * 1e3:.0f} ms overhead per case")


def test_arithmetic_of_a_case(benchmark: BenchmarkFixture, server: Server, tmp_path: Path) -> None:
    """Four counted and predicted metrics of depth-4 networks, into a store: beside the same in forks, one each."""
    metrics = ("params", "conv_macs", "activations", "peak_memory_predicted_bytes")
    cases = [Case(spec=spec, height=256, width=256) for spec in SPECS]
    plan = Plan("arithmetic", "", Limits(), Budget(), tuple(PlannedCase(case, metrics) for case in cases), {})
    stores = itertools.count()
    requests = [Request(case, metrics, BUDGET, 60.0, None) for case in cases[::8]]

    def worked_out() -> None:
        with create_store(tmp_path / f"{next(stores)}.sqlite") as store:
            sweep(plan, store, server, 0, lambda *_: None)

    benchmark.pedantic(worked_out, rounds=5, warmup_rounds=1)

    start = time.perf_counter()
    for request in requests:
        list(server.run(request))
    forked = (time.perf_counter() - start) / len(requests)
    each = benchmark.stats.stats.median / len(cases)  # type: ignore[union-attr]  # there after a run
    benchmark.extra_info["cases_per_second"] = 1 / each
    print(f"\n{each * 1e3:.1f} ms a case by arithmetic, {forked * 1e3:.0f} ms in a process of its own")


def test_share_spent_measuring(benchmark: BenchmarkFixture, server: Server) -> None:
    """Latency of every variant under the budget of `quick`: samples over wall time."""
    requests = [
        Request(
            Case(spec=ModelSpec(variant=variant, depth=3, width=16), height=128, width=128, threads=2),
            ("latency_s",),
            BUDGET,
            60.0,
            None,
        )
        for variant in VARIANTS
    ]
    shares = []

    def measure() -> None:
        start = time.perf_counter()
        sampled = sum(sum(result.samples) for request in requests for result in server.run(request))
        shares.append(sampled / (time.perf_counter() - start))

    benchmark.pedantic(measure, rounds=3, warmup_rounds=0)

    benchmark.extra_info["share"] = sorted(shares)[1]
    print(
        f"\n{sorted(shares)[1]:.0%} of the wall time of latency cases is samples; the rest is build, warm-up, process"
    )
