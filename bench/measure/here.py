"""The device of this machine, and what is predicted for a case on it: its reference line, its GPU's memory."""

from __future__ import annotations

import itertools
from typing import Any

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.gpu import describe_gpus
from skipcost.bench.measure.metrics import GPU_FIGURES, gpu_metric, gpu_metrics
from skipcost.bench.measure.probe import known_cpu, probed_cpu
from skipcost.bench.memory import workspaces
from skipcost.bench.memory.on_gpu import GpuMemory, predict
from skipcost.bench.memory.workspaces import Interval
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import Device, device_named


def gpu_here() -> Device:
    """The first GPU by its name in the table; BenchError where there is none, ValueError where it is not known."""
    gpus = describe_gpus()
    if not gpus:
        message = "no NVIDIA driver answers (nvidia-ml-py asks it), so the GPU's name is not known"
        raise BenchError(message)
    return device_named(gpus[0]["name"])


def device_of(case: Case) -> Device:
    """The device that a case runs on here: the first GPU by its name in the table, or this CPU by a probe.

    BenchError where there is no such GPU, ValueError where the table does not know it.
    """
    if case.device == "cpu":
        return probed_cpu(case.threads)
    return gpu_here()


def known_device(case: Case) -> Device | None:
    """The same without a probe: None where nobody probed this CPU yet, or the table does not know the GPU."""
    if case.device == "cpu":
        return known_cpu(case.threads)
    try:
        return device_of(case)
    except (BenchError, ValueError):
        return None


def reference_line(case: Case) -> Result:
    """The metric `roofline_s`; its detail has the device's figures with their sources, and the lower line."""
    try:
        device = device_of(case)
        line = bound(case, device)
    except (BenchError, ValueError) as error:
        return Result("roofline_s", "unsupported", note=str(error))
    detail: dict[str, Any] = {
        "device": device.name,
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "flop_per_s": device.rate(case.precision),
        "sources": device.sources,
        "fused_s": line.fused_s,
    }
    return Result("roofline_s", samples=(line.seconds,), detail=detail)


def predicted_here(case: Case) -> list[Result]:
    """What the GPU of this machine would report of a case, every figure of it."""
    names = gpu_metrics("predicted_")
    if case.device != "cuda":
        note = "predicted for a GPU only; peak_memory_predicted_bytes holds anywhere"
        return [Result(name, "unsupported", note=note) for name in names]
    try:
        device = gpu_here()
        found = predict(case, device)
    except (BenchError, ValueError) as error:
        return [Result(name, "unsupported", note=str(error)) for name in names]
    note = f"will not fit on {device.name}: {found.shortage}" if found.shortage else ""
    results = []
    for figure, first in itertools.product(GPU_FIGURES, (False, True)):
        claim: Interval = getattr(found.first if first else found.steady, figure)
        detail = {
            "low": claim.low,
            "high": claim.high,
            "device": device.name,
            "parts": _open_parts(found, figure, first),
        }
        results.append(
            Result(gpu_metric(f"predicted_{figure}", first), samples=(claim.likely,), note=note, detail=detail)
        )
    return results


def _open_parts(found: GpuMemory, figure: str, first: bool) -> dict[str, tuple[int, int]]:  # noqa: FBT001 - a coordinate
    """What makes a figure's interval: the bounds of every part that may need anything; the context is the process's."""
    claims = {part.name: part.first if first else part.steady for part in found.parts}
    return {
        name: (claim.low, claim.high)
        for name, claim in claims.items()
        if claim.high and (figure == "process" or name != workspaces.CONTEXT)
    }
