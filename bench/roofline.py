"""A reference line for time: what a step takes where every pass runs at the device's limits, and nothing between them.

Each pass of the eager program takes the longer of its MACs at the device's rate and its bytes at its bandwidth
(Williams, Waterman, Patterson: Roofline, CACM 2009); the line is their sum. It is no lower bound. It is passed by what
does not keep to its terms: maps that stay in a cache, a Winograd convolution's fewer MACs, passes that a compiler or a
kernel fuses. The lower line, `fused_s`, is that of the convolutions alone, with every other pass inside them.
Arithmetic alone; needs no torch and makes no CUDA call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipcost.bench.cases import Case
from skipcost.bench.errors import BenchError
from skipcost.bench.gpu import describe_gpus
from skipcost.bench.passes import passes
from skipcost.bench.probe import known_cpu, probed_cpu
from skipcost.bench.records import Result
from skipcost.kernels.devices import Device, device_named

FLOP_PER_MAC = 2
WHAT = ("MACs", "bytes")  # what can limit a pass


@dataclass(frozen=True, slots=True)
class LayerBound:
    """A pass at the device's limits: what it does, how long that takes, and which of the two limits that is."""

    name: str
    kind: str
    macs: int
    bytes: int
    seconds: float
    limited_by: str


@dataclass(frozen=True, slots=True)
class Bound:
    """The reference line of a case on a device: seconds of one step, and the passes that they are the sum of."""

    seconds: float
    layers: tuple[LayerBound, ...]

    @property
    def fused_s(self) -> float:
        """The lower line: the convolutions alone, each with its maps read and written once."""
        return sum(layer.seconds for layer in self.layers if layer.macs)


def bound(case: Case, device: Device) -> Bound:
    """The reference line of one steady step of a case, whatever its backend: that of the eager program.

    ValueError where the size leaves a map without a pixel, or the device has no rate for the case's precision.
    """
    return _bound(case, device.rate(case.precision), device.bandwidth_bytes_per_s)


def stored_bound(case: Case, result: Result) -> Bound:
    """The same with the limits that a stored `roofline_s` was worked out with: nothing is looked up or probed again."""
    return _bound(case, result.detail["flop_per_s"], result.detail["bandwidth_bytes_per_s"])


def _bound(case: Case, flop_per_s: float, bandwidth_bytes_per_s: float) -> Bound:
    mac_s, byte_s = FLOP_PER_MAC / flop_per_s, 1 / bandwidth_bytes_per_s
    layers, total = [], 0.0
    for each in passes(case):
        compute, traffic = each.macs * mac_s, each.bytes * byte_s
        seconds = max(compute, traffic)
        total += seconds
        layers.append(LayerBound(each.name, each.kind, each.macs, each.bytes, seconds, WHAT[traffic > compute]))
    return Bound(total, tuple(layers))


def device_of(case: Case) -> Device:
    """The device that a case runs on here: the first GPU by its name in the table, or this CPU by a probe.

    BenchError where there is no such GPU, ValueError where the table does not know it.
    """
    if case.device == "cpu":
        return probed_cpu(case.threads)
    gpus = describe_gpus()
    if not gpus:
        message = "no NVIDIA driver answers (nvidia-ml-py asks it), so the GPU's name is not known"
        raise BenchError(message)
    return device_named(gpus[0]["name"])


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
