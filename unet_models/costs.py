"""Where the cost of a network is: every edge with how its map travels, what it costs, and how long it is held.

The MACs of a network are split without remainder: an edge has its own convolutions and the slice of its node's first
3x3 convolution that reads its channels (`merge_macs`; with a sum there are no slices, the node has them all); the rest
are the nodes' and the heads'.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from skipcost.unet_models import geometry
from skipcost.unet_models.geometry import EdgeSize
from skipcost.unet_models.topology import IMAGE, Edge, Node, SkipGraph


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
    source_size: tuple[int, int]
    arriving_size: tuple[int, int]
    crop: tuple[int, int]
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


def describe_edge(edge: Edge, size: tuple[EdgeSize, EdgeSize]) -> str:
    """Say in words how the map travels: resampling, gate, convolutions, crop; `size` is (rows, columns)."""
    steps = []
    if edge.shift < 0:
        factor = 1 << -edge.shift
        steps.append(f"max-pool {factor}x{factor} ({'ceiling' if edge.skip else 'floor'})")
    elif edge.up:
        steps.append("transposed conv 2x2")
    elif edge.shift > 0:
        steps.append(f"{edge.mode} x{1 << edge.shift}")
    if edge.gate:
        steps.append(f"gate ({edge.gate.psi.in_channels} wide)")
    if edge.conv:
        steps.append("conv 3x3")
    if edge.project:
        steps.append("project 1x1")
    crop = _crop(*size)
    if any(crop):
        steps.append(f"crop {crop[0]}x{crop[1]}")
    return ", ".join(steps) or "as it is"


def _crop(rows: EdgeSize, columns: EdgeSize) -> tuple[int, int]:
    """Rows and columns lost at the gate and at the merge."""

    def lost(axis: EdgeSize) -> int:
        return axis.resampled - axis.gated + axis.convolved - axis.merged

    return lost(rows), lost(columns)


def costs(graph: SkipGraph, height: int, width: int, *, batch: int = 1, value_bytes: int = 4) -> Costs:
    """Split the cost of a network over its edges, nodes and heads for inputs of height x width pixels."""
    rows, columns = geometry.sizes(graph, height, width)
    macs: Counter[str] = Counter()
    for placed in geometry.place(graph, height, width):
        macs[placed.owner] += placed.macs
    step = {IMAGE: -1} | {node.name: index for index, node in enumerate(graph.nodes)}
    edges, node_macs, node_params = [], {}, 0
    for node in graph.nodes:
        slices = _slices(node, rows.edges[node.inputs[0].name].merged, columns.edges[node.inputs[0].name].merged, graph)
        node_macs[node.name] = macs[node.name] - sum(slice_macs for _, slice_macs in slices.values())
        node_params += sum(conv.params() for conv in node.convs) - sum(params for params, _ in slices.values())
        for edge in node.inputs:
            y, x = rows.edges[edge.name], columns.edges[edge.name]
            merge_params, merge_macs = slices.get(edge.name, (0, 0))
            edges.append(
                EdgeCost(
                    source=edge.source,
                    target=edge.target,
                    skip=edge.skip,
                    scale=_scale(edge),
                    how=describe_edge(edge, (y, x)),
                    source_size=(y.source, x.source),
                    arriving_size=(y.merged, x.merged),
                    crop=_crop(y, x),
                    in_channels=edge.in_channels,
                    out_channels=edge.out_channels,
                    params=sum(conv.params() for conv in edge.convs),
                    macs=macs[edge.name],
                    merge_params=merge_params,
                    merge_macs=merge_macs,
                    held_bytes=batch * edge.in_channels * y.source * x.source * value_bytes,
                    held_steps=step[edge.target] - step[edge.source],
                )
            )
    heads = [*graph.heads, *([graph.classifier] if graph.classifier else [])]
    head_macs = sum(count for owner, count in macs.items() if owner.startswith(("head of", "classifier on")))
    return Costs(tuple(edges), node_macs, head_macs, node_params, sum(head.conv.params() for head in heads))


def _slices(node: Node, height: int, width: int, graph: SkipGraph) -> dict[str, tuple[int, int]]:
    """Parameters and MACs of the node's first convolution by the input whose channels they read; none for a sum."""
    if node.merge == "sum":
        return {}
    first = node.convs[0]
    lost = 2 if graph.padding == "valid" else 0
    positions = (height - lost) * (width - lost)
    weights = {edge.name: first.kernel**2 * edge.out_channels * first.out_channels for edge in node.inputs}
    return {name: (count, count * positions) for name, count in weights.items()}
