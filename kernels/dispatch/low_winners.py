"""Both forms of a convolution over an up-sampled map, as somebody measured them: rows of the map of winners.

`skipcost rewritings --measure` writes them on a CPU, `skipcost kernels bench` on a GPU. A row is of one image, forward;
what was measured on this machine decides for every batch, mode and number of threads. Reading needs no torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.low_resolution.axis import Axis

CPU = "cpu"  # what a machine's own rows of its CPU are filed under: no other machine reads them
TAP_FIRST = {"cpu": "blocks", "cuda": "triton"}  # the implementation that tap-first is there
PRECISIONS = {"fp32": "fp32", "tf32": "tf32", "16 bits": "bf16"}  # whose row stands for a kind of number
GPUS = Path("/proc/driver/nvidia/gpus")


class Both(NamedTuple):
    """Seconds of both forms on one device."""

    direct: float
    tap_first: float
    source: str


def measured(rows: Axis, columns: Axis, channels: tuple[int, int], kind: str, device: str) -> Both | None:
    """Return what both forms of a call took on this machine's device; None where that is not known."""
    card = card_here(device)
    if not card or not winners.table((card,)):  # most machines: no call to be made of each question
        return None
    call = call_of(rows, columns, channels, kind, device)
    found = winners.measured(call, (card,)) if call else {}
    direct, ours = found.get("reference"), found.get(TAP_FIRST[device])
    return Both(direct.seconds, ours.seconds, ours.source) if direct and ours else None


def call_of(rows: Axis, columns: Axis, channels: tuple[int, int], kind: str, device: str) -> Call | None:
    """Return the call that rows are filed under; None for what has none: cropped maps, nearest, aligned corners."""
    for axis in (rows, columns):
        if (axis.mode, axis.align_corners, axis.length) != ("bilinear", False, axis.extent * axis.factor):
            return None
    geometry, across = (
        {each: getattr(axis, each) for each in ("kernel", "padding", "factor")} for axis in (rows, columns)
    )
    if geometry != across or rows.kernel not in (1, 3) or rows.padding > rows.kernel // 2:
        return None
    source = channels[0], rows.extent, columns.extent
    precision = "fp32" if (device, kind) == ("cpu", "tf32") else PRECISIONS[kind]
    return Call("tap_first", 1, (source,), channels[1], precision=precision, **geometry)


@cache
def card_here(device: str) -> str:
    """Name what rows of this machine's device are filed under, for a GPU as its driver does; empty without one."""
    if device == "cpu":
        return CPU
    for file in sorted(GPUS.glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return ""
