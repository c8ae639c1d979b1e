"""What `skipcost fit` costs: the whole lattice of over 100,000 networks, at inference and in training.

Benchmarks, not tests: `nox -s perf` runs and prints them.
"""

from __future__ import annotations

import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skipcost.bench.fitting.lattice import lattice, read_axes
from skipcost.bench.fitting.question import ask
from skipcost.bench.fitting.search import Candidate, ranked

AXES = {"norm": ["batch", "instance", "group", "none"], "bias": ["true", "false"], "in_channels": ["1", "3"]}
TOP = 10


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_the_best_ten_of_the_whole_lattice(benchmark: BenchmarkFixture, device: str, mode: str) -> None:
    """The first ten networks of over 100,000 within 24 GiB, batch searched; aim: two minutes on two cores."""
    case = {"size": "512", "mode": mode, "precision": None, "optimizer": None}
    question = ask({"memory": "24GiB"}, case, None, device, None)

    def search() -> int:
        choice = lattice(read_axes(AXES), question.fixed, None)
        candidates = [Candidate(line, line.widths) for line in choice.lines]
        rows = ranked(candidates, question.limits, search_batch=True, tell=lambda *_: None)
        assert len(list(itertools.islice(rows, TOP))) == TOP
        return choice.networks

    networks = benchmark.pedantic(search, rounds=1)

    took = benchmark.stats.stats.median  # type: ignore[union-attr]  # there after a run
    print(f"\n{took:.1f} s for the best {TOP} of {networks:,} networks on {device} at {mode}")
