"""What a GPU would report of a case, without the GPU: requested, allocated, reserved and process memory, as intervals.

The case's timeline of live bytes is replayed through PyTorch's allocator three times, with every part that the network
does not decide (`workspaces`) at its least, at its most, and at what we would bet on. The device's memory bounds what
cuDNN may try. No torch, no GPU; how far the claims hold is for `skipcost accuracy` to say. backend=eager and rewritten.
Left out: copies inside operators other than convolutions (softmax and group norm make channels_last maps contiguous; a
native batch norm of such maps takes a few hundred KiB).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skipcost.bench.memory import workspaces
from skipcost.bench.memory.allocator import Replay, StepMemory, replay, two_steps
from skipcost.bench.memory.device_timeline import on_device, running_convolutions
from skipcost.bench.memory.liveness import BACKENDS, Timeline, low_calls, peak_bytes, timeline
from skipcost.bench.memory.workspaces import Interval, Part

if TYPE_CHECKING:
    from skipcost.bench.cases.case import Case
    from skipcost.kernels.devices import Device

SCENARIOS = ("low", "high", "likely")  # the fields of an Interval
LIKELY = SCENARIOS.index("likely")


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """Peaks of one step in bytes: of live tensors alone (exact), and as a GPU reports them.

    `process` is what the driver counts at the end of the step: the segments still held, and the context.
    """

    live: Interval
    requested: Interval
    allocated: Interval
    reserved: Interval
    process: Interval


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What is claimed of a case on a device, and the parts beyond live bytes that it rests on.

    `shortage` says where the likely course of events runs out of memory, empty where it does not; the figures are then
    those of a device without a bound.
    """

    first: StepPrediction
    steady: StepPrediction
    parts: tuple[Part, ...]
    shortage: str


def why_not(case: Case) -> str:
    """Say why nothing is predicted of a case on a GPU; empty where something is."""
    if case.backend in BACKENDS:
        return ""
    return (
        f"what a GPU reports of backend={case.backend} is not predicted: what its kernels take beside live tensors was "
        f"not measured yet; use backend={' or '.join(BACKENDS)}"
    )


def predict(case: Case, device: Device) -> GpuMemory:
    """Predict what `device` reports of a case in the first step and in a later one. ValueError as `timeline` has it.

    It is what runs there that counts, whichever device the case itself names.
    """
    reason = why_not(case)
    if reason:
        raise ValueError(reason)
    case = replace(case, device="cuda")
    steps, low = two_steps(timeline(case)), low_calls(case)
    parts = workspaces.parts(running_convolutions(case, low).values(), case, device, low.values())
    context = parts["context"].first
    replays = []
    for scenario in SCENARIOS:  # a bound is wide: it has as much room as there may be
        room = device.memory_bytes - (context.likely if scenario == "likely" else context.low)
        replays.append(_replayed(*on_device(case, steps, parts, scenario), room))
    live_first, live_steady = peak_bytes(case)
    first = _prediction(live_first, [each.first for each in replays], context)
    steady = _prediction(live_steady, [each.steady for each in replays], context)
    return GpuMemory(first, steady, tuple(parts.values()), replays[LIKELY].shortage)


def _prediction(live: int, replayed: list[StepMemory], context: Interval) -> StepPrediction:
    requested, allocated, reserved, held = (
        _over([getattr(each, name) for each in replayed]) for name in ("requested", "allocated", "reserved", "held")
    )
    return StepPrediction(Interval(live, live, live), requested, allocated, reserved, held + context)


def _over(values: list[int]) -> Interval:
    """The interval of a figure over SCENARIOS: more workspace may fragment less, so the bounds are the extremes."""
    return Interval(min(values), max(values), values[LIKELY])


def _replayed(whole: Timeline, emptied: frozenset[int], capacity: int) -> Replay:
    """Replay within the device's memory; where that is too little, without a bound, and say so."""
    bounded = replay(whole, capacity, emptied)
    return replace(replay(whole, None, emptied), shortage=bounded.shortage) if bounded.shortage else bounded
