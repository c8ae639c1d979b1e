"""What measuring takes of a machine, on the CPU that stands in for a GPU: clocks, caches, ceilings, facts."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from skipcost.bench.measure import machine as running
from skipcost.bench.measure.machine import arithmetic, cpu_machine, facts, machine_of, measure_ceilings, versions
from skipcost.bench.measure.timing import Budget, cpu_clock
from skipcost.kernels.dispatch.call import PRECISIONS

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BRIEF = Budget(seconds=0.01, least=3, warmup_seconds=0.01)


def test_what_runs_ahead_of_a_call_is_not_timed() -> None:
    """Flushing a cache takes longer than many a call."""
    order = []

    def flush() -> None:
        order.append("flush")
        time.sleep(0.02)

    durations = cpu_clock(lambda: order.append("call"), 3, flush)

    assert order == ["flush", "call"] * 3
    assert max(durations) < 0.02


def test_only_cold_caches_are_flushed() -> None:
    """A hot sample finds what the call before left; a cold one does not."""
    flushed = []
    machine = cpu_machine()
    machine = running.Machine(
        machine.device, machine.clock, machine.capture, lambda: flushed.append(1), machine.synchronize, graphs=False
    )

    machine.clock_for("hot")(lambda: None, 2)
    hot = len(flushed)
    machine.clock_for("cold")(lambda: None, 2)

    assert (hot, len(flushed)) == (0, 2)


def test_a_captured_call_does_as_many_calls_as_were_asked_for() -> None:
    """One hot sample holds several calls."""
    calls = []

    repeated = cpu_machine().capture(lambda: calls.append(1), 5)
    repeated()

    assert len(calls) == 5


def test_ceilings_are_there_for_every_precision() -> None:
    """Bytes a second, and multiply-adds a second of a product that is large enough to be timed at all."""
    found = measure_ceilings(machine_of("cpu"), PRECISIONS, copied_bytes=2**16, side=32, budget=BRIEF)

    assert found.copy_bytes_per_s > 0
    assert set(found.macs_per_s) == set(PRECISIONS)
    assert all(math.isfinite(rate) and rate > 0 for rate in found.macs_per_s.values())


def test_a_ceiling_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy counts what it reads and what it writes, a product of matrices n x n counts n^3 multiply-adds."""
    monkeypatch.setattr(running, "sample", lambda *_: type("Samples", (), {"seconds": [3.0, 2.0, 1.0]})())

    found = measure_ceilings(machine_of("cpu"), ("fp32",), copied_bytes=1000, side=10)

    assert found.copy_bytes_per_s == 1000
    assert found.macs_per_s == {"fp32": 500}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_arithmetic_is_set_and_set_back(precision: str) -> None:
    """tf32 is allowed for tf32 alone, in cuDNN and in products of matrices, and cuDNN tries its algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark

    with arithmetic(precision):
        during = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark

    assert during == (precision == "tf32", precision == "tf32", True)
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == before


def test_facts_name_the_device_and_versions_what_makes_the_numbers() -> None:
    """A row without them could not be compared with any other."""
    assert facts("cpu")["name"]
    assert versions()["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in versions().values())


def test_the_driver_is_asked_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are kept by name; a driver that fails, or is not there, is no failure."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = running._driver_says("")
    program.write_text("#!/bin/sh\necho '570.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 35'\n")
    program.chmod(0o755)
    answered = running._driver_says("some-uuid")
    program.write_text("#!/bin/sh\nexit 9\n")
    broken = running._driver_says("")

    assert (missing, broken) == ({}, {})
    assert answered["driver_version"] == "570.1"
    assert answered["power.limit"] == "700.00 W"


@pytest.mark.gpu
@NEEDS_GPU
def test_a_graph_replays_what_was_captured_in_it() -> None:
    """Each replay adds as often as the capture did, on the memory that it saw."""
    total = torch.zeros(1, device="cuda")
    one = torch.ones(1, device="cuda")

    replay = running.capture_graph(lambda: total.add_(one), 4)
    total.zero_()
    replay()
    replay()

    assert total.item() == 8


@pytest.mark.gpu
@NEEDS_GPU
def test_a_cold_cache_is_slower() -> None:
    """A map that fits the L2 cache is read faster out of it than out of memory."""
    machine = machine_of("cuda")
    x = torch.zeros(2**20, device="cuda")  # 4 MiB
    call = machine.capture(x.sum, 1)

    hot, cold = (sorted(machine.clock_for(cache)(call, 50))[25] for cache in ("hot", "cold"))

    assert cold > hot
