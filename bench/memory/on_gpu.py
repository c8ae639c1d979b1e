"""What a GPU would report of a case, without the GPU: requested, allocated, reserved and process memory, as intervals.

The case's timeline of live bytes is replayed through PyTorch's allocator three times, with every part that the network
does not decide (`workspaces`) at its least, at its most, and at what we would bet on. The device's memory bounds what
cuDNN may try. What PyTorch's CUDA path allocates besides what operators return: workspaces of convolutions and the
search among cuDNN's algorithms, gradients that have to be gathered first, weights that are made in one type and copied
to another, what is kept beside the network, and what calls of tap-first make inside, and keep. No torch, no GPU; how
far the claims hold is for `skipcost accuracy` to say. backend=eager and rewritten.
Left out: copies inside operators other than convolutions (softmax and group norm make channels_last maps contiguous; a
native batch norm of such maps takes a few hundred KiB), and transposed convolutions that are composed, which no GPU
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from skipcost.bench.memory import workspaces
from skipcost.bench.memory.allocator import WORKSPACE, Replay, StepMemory, first_event, replay, two_steps
from skipcost.bench.memory.liveness import BACKENDS, LowCall, Storage, Timeline, low_calls, peak_bytes, timeline
from skipcost.bench.memory.workspaces import Interval, Part
from skipcost.kernels.low_resolution import parts as tap_parts
from skipcost.kernels.low_resolution.costs import FLOAT
from skipcost.unet_models.names import moment_name
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import PlacedConv
from skipcost.unet_models.sizes import placed as placed_convolutions

if TYPE_CHECKING:
    from skipcost.bench.cases.case import Case
    from skipcost.kernels.devices import Device
    from skipcost.unet_models.topology import SkipGraph


@dataclass(slots=True)
class _Script:
    """A timeline being written: storages and events so far, and the events before which the cache is emptied.

    scenario: the field of every Interval that is taken. known: shapes that cuDNN tried, tables and handles that exist.
    """

    storages: list[Storage]
    scenario: str
    events: list[int] = field(default_factory=list)
    emptied: set[int] = field(default_factory=set)
    known: set[object] = field(default_factory=set)

    def make(self, name: str, kind: str, size: int) -> int:
        """Add a storage that begins now; return its number, which ends it when it is added to the events negative."""
        self.storages.append(Storage(name, kind, size))
        self.events.append(len(self.storages))
        return len(self.storages)

    def pass_by(self, name: str, kind: str, size: int) -> None:
        """Add a storage that begins and ends now."""
        self.events.append(-self.make(name, kind, size))

    def keep(self, key: object, name: str, sizes: tuple[int, ...]) -> None:
        """Add storages that stay, in the first call that has the key."""
        for size in sizes if key not in self.known else ():
            self.make(name, "buffer", size)
        self.known.add(key)


def named_convolutions(graph: SkipGraph, height: int, width: int) -> dict[str, PlacedConv]:
    """Every convolution by the name that a timeline has for it. ValueError for an image that is too small."""
    return {moment_name(each.op): each for each in placed_convolutions(lower(graph), (height, width))}


def running_convolutions(case: Case, low: dict[str, LowCall]) -> dict[str, PlacedConv]:
    """Those of `named_convolutions` that run: without the channels that go tap-first, and not at all without others."""
    running = {}
    for name, placed in named_convolutions(case.graph(), case.height, case.width).items():
        channels = placed.conv.in_channels - (low[name].channels[0] if name in low else 0)
        if channels:
            running[name] = placed._replace(conv=replace(placed.conv, in_channels=channels))
    return running


def convolution_calls(steps: Timeline, convolutions: dict[str, PlacedConv], case: Case) -> dict[int, str]:
    """By the event after which a convolution has its workspace, the moment that it belongs to.

    Forward that is when its output was made; backward, when the gradient of its weight was, the last of its results
    but for the bias.
    """
    calls = {}
    for span, moment in _spans(steps):
        name = moment.removeprefix("backward of ")
        if name not in convolutions:
            continue
        placed, forward = convolutions[name], moment == name
        size = workspaces.value_bytes(case) * (case.batch * placed.outputs if forward else placed.conv.weights)
        made = _made(steps, span, name, size)
        if made:
            calls[made[0 if forward else -1]] = moment
    return calls


def tap_calls(steps: Timeline, low: dict[str, LowCall], case: Case) -> dict[int, str]:
    """By the event after which tap-first makes what it makes inside, the moment that it belongs to.

    Forward that is when its output was made, behind that of the convolution beside it; what it adds to that
    convolution's own output, when the concatenation is gone. Backward, when the gradients of map and weight were made.
    """
    calls, value = {}, workspaces.value_bytes(case)
    for span, moment in _spans(steps):
        name = moment.removeprefix("backward of ")
        if name not in low:
            continue
        (rows, columns, (read, write), joined, _), at = low[name], None
        if moment == name:
            made = _made(steps, span, name, value * case.batch * write * rows.output * columns.output)
            adds = joined and case.mode != "training"
            at = made[int(joined and not adds)] if made else None
            if at is not None and adds:
                at += _ended(steps, at + 1) == f"{name}: concatenation"
        else:
            made = _made(steps, span, name, value * rows.kernel * columns.kernel * read * write)
            maps = _made(steps, span, name, value * case.batch * read * rows.extent * columns.extent)
            at = next((each for each in made if each - 1 in maps), None)
        if at is not None:
            calls[at] = moment
    return calls


def _spans(steps: Timeline) -> list[tuple[range, str]]:
    """The events of every moment."""
    starts = [*(start for start, _ in steps.moments), len(steps.events)]
    return [(range(*span), name) for span, (_, name) in zip(pairwise(starts), steps.moments, strict=True)]


def _made(steps: Timeline, span: range, name: str, size: int) -> list[int]:
    """The events that make a storage of a size, of a layer's name or that of its weight's gradient."""
    names = {name, f"gradient of {name}: weight"}
    born = [(at, steps.storages[steps.events[at] - 1]) for at in span if steps.events[at] > 0]
    return [at for at, made in born if made.name in names and made.bytes == size]


def _ended(steps: Timeline, at: int) -> str:
    """The name of the storage that an event ends; empty where it ends none."""
    event = steps.events[at] if at < len(steps.events) else 0
    return steps.storages[-event - 1].name if event < 0 else ""


def gathered_gradients(steps: Timeline, case: Case) -> dict[int, tuple[str, int]]:
    """By the first event of its moment, each gradient that cuDNN's wrapper copies first, as (moment, bytes).

    The gradient of a transposed convolution that goes straight into a concatenation is a slice of the concatenation's,
    and no block of memory of its own (ConvShared.cpp makes it contiguous); one image in contiguous layout is. Where
    maps of a node differ in size, its own is never the one that is cropped.
    """
    if case.batch == 1 and case.layout == "contiguous":
        return {}
    graph, convolutions = case.graph(), named_convolutions(case.graph(), case.height, case.width)
    sliced = {
        edge.name
        for node in graph.nodes
        if node.merge == "concat" and len(node.inputs) > 1 and not any(edge.gate for edge in node.inputs)
        for edge in node.inputs
    }
    found = {}
    for start, moment in steps.moments:
        name = moment.removeprefix("backward of ")
        edge = name.removesuffix(": transposed convolution")
        if moment != name and name in convolutions and edge != name and edge in sliced:
            found[start] = moment, workspaces.value_bytes(case) * case.batch * convolutions[name].outputs
    return found


def on_device(case: Case, steps: Timeline, parts: dict[str, Part], scenario: str) -> tuple[Timeline, frozenset[int]]:
    """The timeline with everything that a GPU adds, in a scenario; and the events before which the cache is emptied.

    Weights are made in 32 bits and contiguous, and copied one by one to the case's type and layout. ValueError for
    composed convolutions, whose sums nobody has counted.
    """
    _refuse_composed(steps)
    low = low_calls(case)
    convolutions = running_convolutions(case, low)
    calls, gathered = convolution_calls(steps, convolutions, case), gathered_gradients(steps, case)
    products = tap_calls(steps, low, case)
    script, moved, start = _Script(list(steps.storages), scenario), list[int](), first_event(steps)
    copied, as_made = dict[str, int](), _as_made(script, steps.events[:start], case)
    standing = [part for key, part in parts.items() if part.kept and not (products and key == "cublas")]
    for at, event in enumerate(steps.events):
        for part in standing if at == start else ():
            script.make(part.name, "buffer", getattr(part.steady, scenario))
        moved.append(len(script.events))
        if at in gathered:
            moment, size = gathered[at]
            copied[moment] = script.make("gradient, gathered", "map gradient", size)
        script.events.append(event)
        if at < start and event in as_made:
            script.events.append(-as_made[event])
        if at in calls:
            _convolve(script, case, convolutions, low, calls[at])
            script.events += [-copied.pop(calls[at])] if calls[at] in copied else []
        if at in products:
            _tap_first(script, case, low, products[at], parts["cublas"])
    moments = ((0, steps.moments[0][1]), *((moved[at], name) for at, name in steps.moments[1:]))
    whole = Timeline(tuple(script.storages), tuple(script.events), moments, moved[steps.steady_from])
    return whole, frozenset(script.emptied)


def _refuse_composed(steps: Timeline) -> None:
    """ValueError for transposed convolutions that are composed."""
    if any(each.name.endswith(": composed weight") for each in steps.storages):
        message = (
            "what a GPU takes to compose transposed convolutions was not counted, because backend=rewritten composes "
            "none there; use backend=eager"
        )
        raise ValueError(message)


def _as_made(script: _Script, present: tuple[int, ...], case: Case) -> dict[int, int]:
    """Make every weight that is going to be copied; return what was made by the event of its copy."""
    sizes = {event: workspaces.as_made(script.storages[event - 1], case) for event in present}
    return {
        event: script.make(f"{script.storages[event - 1].name}, as made", "parameter", size)
        for event, size in sizes.items()
        if size
    }


def _convolve(
    script: _Script, case: Case, convolutions: dict[str, PlacedConv], low: dict[str, LowCall], moment: str
) -> None:  # fmt: skip
    """Add the workspace of one call; before it, once for each shape, that of the search.

    For the search PyTorch allocates the largest workspace of all algorithms, and it empties its cache afterwards
    (Conv_v8.cpp). Slices of weights and maps are copied before (ConvShared.cpp); backward a weight's copy is gone when
    its gradient is made, which is as large.
    """
    name = moment.removeprefix("backward of ")
    placed, beside, forward = convolutions[name], low.get(name), moment == name

    def add(what: str, needed: Interval) -> None:
        script.pass_by(what, WORKSPACE, getattr(needed, script.scenario))

    value, copies = workspaces.value_bytes(case), []
    if beside and forward and placed.conv.out_channels > 1:
        copies.append(script.make("weights, gathered", "temporary", value * placed.conv.weights))
    if beside and beside.sliced and script.scenario != "low":  # rows cut off a single image are one block of memory
        pixels = beside.rows.length * beside.columns.length
        copies.append(script.make("map, gathered", "temporary", value * case.batch * placed.conv.in_channels * pixels))
    shape = (not forward, placed.conv, placed.height, placed.width)
    if case.cudnn_benchmark and shape not in script.known:
        add("workspaces tried", workspaces.tried_workspace(placed, case))
        script.emptied.add(len(script.events))
    script.known.add(shape)
    add("workspace", workspaces.chosen_workspace(placed, case))
    script.events += [-each for each in reversed(copies)]


def _tap_first(script: _Script, case: Case, low: dict[str, LowCall], moment: str, cublas: Part) -> None:
    """Add what one call makes inside, and, in the first such call, what is kept: tables and a workspace of cuBLAS."""
    call = low[moment.removeprefix("backward of ")]
    rows, columns, backward = call.rows, call.columns, moment not in low
    handles = 1 + (case.mode == "training")

    def multiply() -> None:
        script.keep(("handle", backward), cublas.name, (getattr(cublas.steady, script.scenario) // handles,))

    if backward:
        multiply()
        for which, axis in (("rows", rows), ("columns", columns)):
            bands = [(band.stop - band.start) * (band.last - band.first) for band in axis.adjoint_bands]
            script.keep((which, axis), "matrices", tuple(FLOAT * axis.kernel * each for each in bands))
        script.pass_by("blocks", "temporary", getattr(workspaces.blocks(call, case), script.scenario))
        return
    made = workspaces.inside(call, case)[script.scenario]
    packed = script.make("weights, packed", "temporary", made.packed)
    for copied, size in made.parts:
        pixels = script.make("pixels, gathered", "temporary", copied)
        multiply()
        taps = script.make("tap maps", "temporary", size)
        script.events.append(-pixels)
        _keep_tables(script, call)
        script.events.append(-taps)
    script.events.append(-packed)


def _keep_tables(script: _Script, call: LowCall) -> None:
    """What the kernel that adds tap maps up reads, kept for every call of the same sizes."""
    of_rows, of_columns = tap_parts.tables(call.rows, call.columns)
    script.keep(("table of rows", call.rows), "table", of_rows)
    script.keep(("table of columns", call.columns), "table", of_columns)


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
