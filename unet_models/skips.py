"""The skip schemes: which inputs a node keeps, and how it merges them. Each is a function from graph to graph.

The edge from the next deeper level is not a skip and always stays. A node's width never changes; what no head reads
any more is pruned. Some cells coincide after that: U-Net has one skip per node, so `same` and `nearest` leave it as
it is, and UNet++ with `same` or `none` is U-Net with `concat` or `none`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from skipcost.unet_models.topology import Conv, Edge, Gate, Node, SkipGraph


@dataclass(frozen=True, slots=True)
class SkipScheme:
    """A row of SKIPS: the rewrite, and what it does in a few words."""

    apply: Callable[[SkipGraph], SkipGraph]
    title: str


def _each_decoder_node(graph: SkipGraph, rewire: Callable[[Node, Edge], Node]) -> SkipGraph:
    """Apply `rewire(node, edge from the deeper level)` to every decoder node and prune."""
    nodes = tuple(rewire(node, node.deeper) if node.deeper else node for node in graph.nodes)
    return replace(graph, nodes=nodes).pruned()


def concat(graph: SkipGraph) -> SkipGraph:
    """Keep every input and concatenate, as the papers do."""
    return graph


def without_skips(graph: SkipGraph) -> SkipGraph:
    """Keep the map from the deeper level alone: a plain encoder-decoder."""
    return _each_decoder_node(graph, lambda node, deeper: node.rewired((deeper,)))


def same(graph: SkipGraph) -> SkipGraph:
    """Keep X^{i,0}, the encoder map of the node's own level."""

    def rewire(node: Node, deeper: Edge) -> Node:
        own = f"x{node.level}_0"
        return node.rewired(tuple(edge for edge in node.inputs if edge is deeper or edge.source == own))

    return _each_decoder_node(graph, rewire)


def nearest(graph: SkipGraph) -> SkipGraph:
    """Keep X^{i,j-1}, the last earlier map of the node's own level (UNet+); in U-Net and UNet 3+ that is X^{i,0}."""

    def rewire(node: Node, deeper: Edge) -> Node:
        last = [edge for edge in node.inputs if edge.skip and edge.shift == 0][-1]
        return node.rewired((last, deeper))

    return _each_decoder_node(graph, rewire)


def total(graph: SkipGraph) -> SkipGraph:
    """Add the inputs; one of another width than the sum's is first brought to it by a 1x1 projection with bias.

    The sum has the node's width, or, in UNet 3+, the width that its edge convolutions give.
    """

    def rewire(node: Node, deeper: Edge) -> Node:
        channels = deeper.conv.out_channels if deeper.conv else node.width

        def fitted(edge: Edge) -> Edge:
            if edge.out_channels == channels:
                return edge
            return replace(edge, project=Conv(edge.out_channels, channels, 1))

        return node.rewired(tuple(fitted(edge) for edge in node.inputs), "sum")

    return _each_decoder_node(graph, rewire)


def gated(graph: SkipGraph) -> SkipGraph:
    """Put an attention gate on X^{i,0}; its signal is the up-sampled map from the deeper level (Oktay et al., 2018).

    Both are brought to half of X^{i,0}'s channels. The paper gates with the coarse map and up-samples the
    coefficients; with the up-sampled map as the signal, the form most implementations have, no resampling is needed.
    """

    def rewire(node: Node, deeper: Edge) -> Node:
        norm = node.convs[0].norm

        def fitted(edge: Edge) -> Edge:
            if edge.source != f"x{node.level}_0":
                return edge
            inside = max(1, edge.in_channels // 2)
            gate = Gate(
                x=Conv(edge.in_channels, inside, 1, norm=norm),
                signal=Conv(deeper.resampled_channels, inside, 1, norm=norm),
                psi=Conv(inside, 1, 1, norm=norm),
            )
            return replace(edge, gate=gate)

        return node.rewired(tuple(fitted(edge) for edge in node.inputs))

    return _each_decoder_node(graph, rewire)


SKIPS: dict[str, SkipScheme] = {
    "concat": SkipScheme(concat, "every input, concatenated"),
    "sum": SkipScheme(total, "every input, added"),
    "gated": SkipScheme(gated, "every input, X^{i,0} behind an attention gate"),
    "none": SkipScheme(without_skips, "no skip at all"),
    "same": SkipScheme(same, "only the encoder map of the own level"),
    "nearest": SkipScheme(nearest, "only the last earlier map of the own level"),
}
