"""Where the cost of a network is: every edge with how its map travels, what it costs, and how long it is held.

The MACs of a network are split without remainder: an edge has its own convolutions and the slice of its node's first
3x3 convolution that reads its channels (`merge_macs`; with a sum there are no slices, the node has them all); the rest
are the nodes' and the heads'.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from skipcost.unet_models.program import IMAGE, lower
from skipcost.unet_models.sizes import Size, by, shapes
from skipcost.unet_models.sizes import placed as convolutions
from skipcost.unet_models.topology import INTERPOLATIONS, Edge, Node, SkipGraph


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """One edge at one input size. MACs are for one image, bytes for the whole batch.

    `held_bytes` is the source map, `held_steps` over how many nodes it is kept from its making until this edge has
    read it. In training every map is kept until its backward pass instead.
    """

    source: str
    target: str
    skip: bool
    scale: str
    how: str
    source_size: Size
    arriving_size: Size
    crop: Size
    in_channels: int
    out_channels: int
    params: int
    macs: int
    merge_params: int
    merge_macs: int
    held_bytes: int
    held_steps: int

    @property
    def all_macs(self) -> int:
        """The edge's own MACs and its slice of the convolution that it feeds."""
        return self.macs + self.merge_macs


@dataclass(frozen=True, slots=True)
class Costs:
    """A network's MACs and parameters by place; they add up to the graph's."""

    edges: tuple[EdgeCost, ...]
    node_macs: dict[str, int]  # what is left in each node: later convolutions, the first where inputs are added
    head_macs: int
    node_params: int
    head_params: int

    @property
    def total_macs(self) -> int:
        """MACs of the whole network for one image."""
        return sum(edge.all_macs for edge in self.edges) + sum(self.node_macs.values()) + self.head_macs

    @property
    def total_params(self) -> int:
        """Parameters of the whole network."""
        return sum(edge.params + edge.merge_params for edge in self.edges) + self.node_params + self.head_params


def _scale(edge: Edge) -> str:
    if edge.shift == 0:
        return "1"
    return f"x{1 << edge.shift}" if edge.shift > 0 else f"1/{1 << -edge.shift}"


@dataclass(frozen=True, slots=True)
class EdgeSizes:
    """The sizes of a map along one edge: as read, resampled, behind the gate, behind its convolutions, as merged."""

    source: Size
    resampled: Size
    gated: Size
    convolved: Size
    merged: Size

    @property
    def crop(self) -> Size:
        """Rows and columns lost at the gate and at the merge."""
        sides = zip(self.resampled, self.gated, self.convolved, self.merged, strict=True)
        return tuple(resampled - gated + convolved - merged for resampled, gated, convolved, merged in sides)


def edge_sizes(graph: SkipGraph, size: Size) -> dict[str, EdgeSizes]:
    """Follow the map of every edge, by the edge's name, for images of a size."""
    program = lower(graph)
    made: dict[str, dict[str, Size]] = {}  # by place and part of it, the size of what the last op there makes
    for op, shape in zip(program.ops, shapes(program, size), strict=True):
        made.setdefault(op.where, {})[op.part] = shape[1:]
    found: dict[str, EdgeSizes] = {}
    for node in graph.nodes:
        arriving: list[tuple[str, tuple[Size, Size, Size, Size]]] = []
        for edge in node.inputs:
            source = list(made[edge.source].values())[-1]
            parts = made.get(edge.name, {})
            resampled = parts.get("up", parts.get("resample", source))
            gated = parts.get("gate", resampled)
            arriving.append((edge.name, (source, resampled, gated, parts.get("conv", gated))))
        merged = made[node.name].get("merge", arriving[0][1][-1])
        found |= {name: EdgeSizes(*sizes, merged) for name, sizes in arriving}
    return found


def describe_edge(edge: Edge, sizes: EdgeSizes) -> str:
    """Say in words how the map travels: resampling, gate, convolutions, crop."""
    steps = []
    if edge.shift < 0:
        factor = 1 << -edge.shift
        steps.append(f"max-pool {factor}x{factor} ({'ceiling' if edge.skip else 'floor'})")
    elif edge.up:
        steps.append("transposed conv 2x2")
    elif edge.mode:
        mode, align_corners = INTERPOLATIONS[edge.mode]
        steps.append(f"{mode} x{1 << edge.shift}{' (corners aligned)' * align_corners}")
    if edge.gate:
        steps.append(f"gate ({edge.gate.psi.in_channels} wide)")
    if edge.conv:
        steps.append("conv 3x3")
    if edge.project:
        steps.append("project 1x1")
    if any(sizes.crop):
        steps.append(f"crop {by(sizes.crop)}")
    return ", ".join(steps) or "as it is"


def costs(graph: SkipGraph, height: int, width: int, *, batch: int = 1, value_bytes: int = 4) -> Costs:
    """Split the cost of a network over its edges, nodes and heads for inputs of height x width pixels."""
    along = edge_sizes(graph, (height, width))
    macs, first = Counter[str](), dict[str, int]()
    for placed in convolutions(lower(graph), (height, width)):
        macs[placed.owner] += placed.macs
        if placed.op.part == "0":
            first[placed.owner] = placed.macs
    step = {IMAGE: -1} | {node.name: index for index, node in enumerate(graph.nodes)}
    edges, node_macs, node_params = [], {}, 0
    for node in graph.nodes:
        slices = _slices(node, first[node.name])
        node_macs[node.name] = macs[node.name] - sum(slice_macs for _, slice_macs in slices.values())
        node_params += sum(conv.params() for conv in node.convs) - sum(params for params, _ in slices.values())
        for edge in node.inputs:
            held = batch * edge.in_channels * math.prod(along[edge.name].source) * value_bytes
            steps = step[edge.target] - step[edge.source]
            own = macs[edge.name], *slices.get(edge.name, (0, 0))
            edges.append(_edge_cost(edge, along[edge.name], own, (held, steps)))
    heads = [*graph.heads, *([graph.classifier] if graph.classifier else [])]
    head_macs = sum(count for owner, count in macs.items() if owner.startswith(("head of", "classifier on")))
    return Costs(tuple(edges), node_macs, head_macs, node_params, sum(head.conv.params() for head in heads))


def _edge_cost(edge: Edge, sizes: EdgeSizes, own: tuple[int, int, int], held: tuple[int, int]) -> EdgeCost:
    """One edge, `own` its MACs, its slice's parameters and MACs, `held` its bytes and over how many nodes."""
    macs, merge_params, merge_macs = own
    return EdgeCost(
        source=edge.source,
        target=edge.target,
        skip=edge.skip,
        scale=_scale(edge),
        how=describe_edge(edge, sizes),
        source_size=sizes.source,
        arriving_size=sizes.merged,
        crop=sizes.crop,
        in_channels=edge.in_channels,
        out_channels=edge.out_channels,
        params=sum(conv.params() for conv in edge.convs),
        macs=macs,
        merge_params=merge_params,
        merge_macs=merge_macs,
        held_bytes=held[0],
        held_steps=held[1],
    )


def _slices(node: Node, macs: int) -> dict[str, tuple[int, int]]:
    """Parameters and MACs of the node's first convolution by the input whose channels they read; none for a sum."""
    if node.merge != "concat":
        return {}
    first = node.convs[0]
    weights = {edge.name: first.weights // first.in_channels * edge.out_channels for edge in node.inputs}
    return {name: (count, macs // first.weights * count) for name, count in weights.items()}
