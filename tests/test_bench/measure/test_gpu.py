"""What the driver says of a GPU: through a stand-in for NVML everywhere, and for real where there is a CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from skipcost.bench.cases.case import Case, usual_values
from skipcost.bench.cases.record import Result
from skipcost.bench.measure import gpu
from skipcost.bench.measure.machine import cuda_clock
from skipcost.bench.measure.metrics import METRICS, default_metrics
from skipcost.bench.measure.timing import Budget
from skipcost.unet_models import ModelSpec

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class FakeError(Exception):
    """NVML's error."""


def fake_nvml(*, reasons: int = 0, pid: int = 0, power: Callable[[object], int] = lambda _: 700_000) -> SimpleNamespace:
    """A stand-in for pynvml with one card."""
    return SimpleNamespace(
        NVMLError=FakeError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "570.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: "a card",
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=2**30),
        nvmlDeviceGetPowerManagementLimit=power,
        nvmlDeviceGetMaxClockInfo=lambda *_: 1980,
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: reasons,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [SimpleNamespace(pid=pid, usedGpuMemory=123)],
    )


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimpleNamespace], None]:
    """Put a stand-in where pynvml would be imported from."""
    return lambda fake: monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_a_card_is_described(nvml: Callable[[SimpleNamespace], None]) -> None:
    """Name, memory, driver, power limit and clock end up in the environment."""
    nvml(fake_nvml())

    assert gpu.describe_gpus() == [
        {"name": "a card", "memory_bytes": 2**30, "driver": "570.1", "power_limit_w": 700.0, "max_sm_clock_mhz": 1980}
    ]


def test_a_card_that_hides_its_power_limit_is_still_described(nvml: Callable[[SimpleNamespace], None]) -> None:
    """What a card does not report is left out, not fatal."""

    def hidden(_: object) -> int:
        raise FakeError

    nvml(fake_nvml(power=hidden))

    assert gpu.describe_gpus()[0]["name"] == "a card"
    assert "power_limit_w" not in gpu.describe_gpus()[0]


@pytest.mark.parametrize(("reasons", "said"), [(0x0, ""), (0x1, ""), (0x40, "hardware thermal"), (0x44, "power cap")])
def test_throttling_is_named(nvml: Callable[[SimpleNamespace], None], reasons: int, said: str) -> None:
    """Idle clocks are no doubt; heat and power limits are, by name."""
    nvml(fake_nvml(reasons=reasons))

    reason = gpu.throttle_reason()

    assert bool(reason) == bool(said)
    assert said in reason


def test_process_memory_is_this_processes(nvml: Callable[[SimpleNamespace], None]) -> None:
    """The driver's figure is taken for our own process id, and its absence is explained."""
    nvml(fake_nvml(pid=os.getpid()))
    mine = gpu.process_bytes()
    nvml(fake_nvml(pid=-1))
    nobodys = gpu.process_bytes()

    assert mine == (123, "")
    assert nobodys[0] == 0
    assert "does not list this process" in nobodys[1]


def test_without_a_driver_nothing_fails(nvml: Callable[[SimpleNamespace], None]) -> None:
    """No NVML means no cards, no throttling and a reason."""

    def broken() -> None:
        raise FakeError

    fake = fake_nvml()
    fake.nvmlInit = broken
    nvml(fake)

    assert gpu.describe_gpus() == []
    assert gpu.throttle_reason() == ""
    assert "cannot be asked" in gpu.process_bytes()[1]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_gpu_metric_gives_a_number(mode: str) -> None:
    """On a real device every default metric is ok or says why not, and the memory figures are ordered."""
    case = Case(spec=ModelSpec(depth=3, width=16), **usual_values("cuda", mode, 1) | {"height": 256, "width": 256})
    results: dict[str, Result] = {}
    for name in default_metrics(case):
        if name not in results:
            made = METRICS[name].measure(case, Budget(seconds=0.2, warmup_seconds=0.5))
            results |= {result.metric: result for result in made}

    assert {name for name, each in results.items() if each.outcome != "ok"} <= {
        "peak_memory_process_bytes",
        "peak_memory_process_first_bytes",
    }
    requested, allocated, reserved = (
        results[f"peak_memory_{figure}_bytes"].samples[0] for figure in ("requested", "allocated", "reserved")
    )
    assert requested <= allocated <= reserved


@pytest.mark.gpu
@NEEDS_GPU
def test_the_cuda_clock_waits_for_the_device() -> None:
    """A large multiplication takes longer on the events' clock than launching it does."""
    matrix = torch.randn(4096, 4096, device="cuda")

    durations = cuda_clock(lambda: matrix @ matrix, 5)

    assert min(durations) > 1e-4
