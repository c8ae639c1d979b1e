"""A case's timeline as a GPU runs it: what PyTorch's CUDA path allocates besides what operators return.

Workspaces of convolutions and the search among cuDNN's algorithms, gradients that have to be gathered first, weights
that are made in one type and copied to another, and what is kept beside the network. How large an uncertain part is
comes from `workspaces`; here is when it is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from skipcost.bench import workspaces
from skipcost.bench.allocator import WORKSPACE, first_event
from skipcost.bench.liveness import Storage, Timeline
from skipcost.bench.workspaces import Interval, Part
from skipcost.unet_models.geometry import PlacedConv, place

if TYPE_CHECKING:
    from skipcost.bench.cases import Case
    from skipcost.unet_models.topology import SkipGraph


@dataclass(slots=True)
class _Script:
    """A timeline being written: storages and events so far, and the events before which the cache is emptied."""

    storages: list[Storage]
    events: list[int] = field(default_factory=list)
    emptied: set[int] = field(default_factory=set)

    def make(self, name: str, kind: str, size: int) -> int:
        """Add a storage that begins now; return its number, which ends it when it is added to the events negative."""
        self.storages.append(Storage(name, kind, size))
        self.events.append(len(self.storages))
        return len(self.storages)

    def pass_by(self, name: str, kind: str, size: int) -> None:
        """Add a storage that begins and ends now."""
        self.events.append(-self.make(name, kind, size))


def named_convolutions(graph: SkipGraph, height: int, width: int) -> dict[str, PlacedConv]:
    """Every convolution by the name that a timeline has for it. ValueError for an image that is too small."""
    steps_of = {
        edge.name: [
            *(["transposed convolution"] if edge.up else []),
            *(["gate, map", "gate, signal", "gate, coefficients"] if edge.gate else []),
            *(["convolution"] if edge.conv else []),
            *(["projection"] if edge.project else []),
        ]
        for edge in graph.edges
    } | {node.name: [f"convolution {at + 1}" for at in range(len(node.convs))] for node in graph.nodes}
    named = {}
    for placed in place(graph, height, width):
        names = steps_of.get(placed.owner)
        named[f"{placed.owner}: {names.pop(0)}" if names else placed.owner] = placed
    return named


def convolution_calls(steps: Timeline, convolutions: dict[str, PlacedConv], case: Case) -> dict[int, str]:
    """By the event after which a convolution has its workspace, the moment that it belongs to.

    Forward that is when its output was made; backward, when the gradient of its weight was, the last of its results
    but for the bias.
    """
    calls = {}
    ends = [start for start, _ in steps.moments[1:]] + [len(steps.events)]
    for (start, moment), end in zip(steps.moments, ends, strict=True):
        name = moment.removeprefix("backward of ")
        if name not in convolutions:
            continue
        placed, forward = convolutions[name], moment == name
        size = workspaces.value_bytes(case) * (case.batch * placed.outputs if forward else placed.conv.weights)
        names = {name} if forward else {name, f"gradient of {name}: weight"}
        for at in range(start, end):
            made = steps.storages[abs(steps.events[at]) - 1]
            if steps.events[at] > 0 and made.name in names and made.bytes == size:
                calls[at] = moment
                break
    return calls


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

    scenario: the field of every Interval that is taken. Weights are made in 32 bits and contiguous, and copied one by
    one to the case's type and layout.
    """
    convolutions = named_convolutions(case.graph(), case.height, case.width)
    calls, gathered = convolution_calls(steps, convolutions, case), gathered_gradients(steps, case)
    script, moved, start = _Script(list(steps.storages)), list[int](), first_event(steps)
    tried, copied = set[object](), dict[str, int]()
    as_made = {
        event: script.make(f"{steps.storages[event - 1].name}, as made", "parameter", size)
        for event in steps.events[:start]
        if (size := workspaces.as_made(steps.storages[event - 1], case))
    }
    for at, event in enumerate(steps.events):
        for part in parts.values() if at == start else ():
            if part.kept:
                script.make(part.name, "buffer", getattr(part.steady, scenario))
        moved.append(len(script.events))
        if at in gathered:
            moment, size = gathered[at]
            copied[moment] = script.make("gradient, gathered", "map gradient", size)
        script.events.append(event)
        if at < start and event in as_made:
            script.events.append(-as_made[event])
        if at in calls:
            _call(script, case, convolutions, (calls[at], scenario), tried)
            script.events += [-copied.pop(calls[at])] if calls[at] in copied else []
    moments = ((0, steps.moments[0][1]), *((moved[at], name) for at, name in steps.moments[1:]))
    whole = Timeline(tuple(script.storages), tuple(script.events), moments, moved[steps.steady_from])
    return whole, frozenset(script.emptied)


def _call(
    script: _Script,
    case: Case,
    convolutions: dict[str, PlacedConv],
    call: tuple[str, str],
    tried: set[object],
) -> None:
    """Add the workspace of one call, (moment, scenario); before it, once for each shape, that of the search.

    For the search PyTorch allocates the largest workspace of all algorithms, and it empties its cache afterwards
    (Conv_v8.cpp).
    """
    moment, scenario = call
    placed = convolutions[moment.removeprefix("backward of ")]

    def add(name: str, needed: Interval) -> None:
        script.pass_by(name, WORKSPACE, getattr(needed, scenario))

    shape = (moment.startswith("backward"), placed.conv, placed.height, placed.width)
    if case.cudnn_benchmark and shape not in tried:
        add("workspaces tried", workspaces.tried_workspace(placed, case))
        script.emptied.add(len(script.events))
    tried.add(shape)
    add("workspace", workspaces.chosen_workspace(placed, case))
