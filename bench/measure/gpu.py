"""What the driver says of the GPU, through nvidia-ml-py; nothing here fails where it, or a GPU, is missing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

THROTTLED = {  # bits of the clocks-event reasons that make a latency doubtful; idle and application clocks do not
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield pynvml, initialised, or None where it or the driver is missing."""
    try:
        import pynvml  # noqa: PLC0415 - optional

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - a missing package, driver or device all mean the same here
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def describe_gpus() -> list[dict[str, Any]]:
    """Name, memory, driver, clocks and power limit of every GPU; an empty list where there is none to ask."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        driver = nvml.nvmlSystemGetDriverVersion()
        return [_describe(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount())]


def _describe(nvml: Any, index: int, driver: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    described = {
        "name": nvml.nvmlDeviceGetName(handle),
        "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "driver": driver,
    }
    with contextlib.suppress(nvml.NVMLError):  # not every card reports these
        described["power_limit_w"] = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
        described["max_sm_clock_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    return described


def throttle_reason() -> str:
    """Say why the first visible GPU's clocks are held down right now; empty where they are not, or nobody can tell."""
    with _nvml() as nvml:
        if nvml is None:
            return ""
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(nvml.nvmlDeviceGetHandleByIndex(0))
        held = [name for bit, name in THROTTLED.items() if bits & bit]
        return f"the GPU's clocks were held down after the samples: {', '.join(held)}" if held else ""


def process_bytes() -> tuple[int, str]:
    """Bytes of GPU memory that the driver counts for this process, or 0 and why nobody can tell."""
    with _nvml() as nvml:
        if nvml is None:
            return 0, "the driver cannot be asked: nvidia-ml-py is not installed, or there is no NVIDIA driver"
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory), ""
        return 0, "the driver does not list this process, as in a container with its own process numbers"
