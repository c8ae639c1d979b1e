"""A reference line for time: what a step takes where every pass runs at the device's limits, and nothing between them.

Each pass of the eager program takes the longer of its MACs at the device's rate and its bytes at its bandwidth
(Williams, Waterman, Patterson: Roofline, CACM 2009); the line is their sum. It is no lower bound. It is passed by what
does not keep to its terms: maps that stay in a cache, a Winograd convolution's fewer MACs, passes that a compiler or a
kernel fuses. The lower line, `fused_s`, is that of the convolutions alone, with every other pass inside them.
Arithmetic alone; needs no torch and makes no CUDA call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.time.passes import passes
from skipcost.kernels.devices import Device

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
        return math.fsum(layer.seconds for layer in self.layers if layer.macs)


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
    layers = []
    for each in passes(case):
        compute, traffic = each.macs * mac_s, each.bytes * byte_s
        seconds = max(compute, traffic)
        layers.append(LayerBound(each.name, each.kind, each.macs, each.bytes, seconds, WHAT[traffic > compute]))
    return Bound(math.fsum(layer.seconds for layer in layers), tuple(layers))
