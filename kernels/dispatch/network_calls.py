"""Every call of a network, in order: what the fused backend asks of the kernels, and where in the network.

It follows the executor edge by edge and node by node (`unet_models.network`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from skipcost.kernels.dispatch.call import Call
from skipcost.unet_models import geometry
from skipcost.unet_models.geometry import EdgeSize
from skipcost.unet_models.spec import ModelSpec
from skipcost.unet_models.topology import Conv, Edge, Node, SkipGraph

FOLDABLE = ("batch", "none")  # norms that can be in a convolution; others need the whole map first


def network_calls(
    spec: ModelSpec, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of the network of `spec`, all heads included, on a batch of height x width pixels; see `graph_calls`.

    mode: "inference" or "training". precision: "fp32", "tf32", "bf16" or "fp16". ValueError where the size cannot work.
    """
    return graph_calls(spec.graph(), batch, height, width, mode, precision)


def graph_calls(
    graph: SkipGraph, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of a graph with where it happens, in the executor's order and as the fused backend groups the work.

    Where: `x0_1.0` is the first convolution of node x0_1; `x1_0->x0_1` what an edge does (its transposed or its 3x3
    convolution), `x1_0->x0_1.project` and `x0_0->x0_1.gate.psi` what else it has; `x0_1.merge`, `head of x0_4` and
    `classifier on x4_0` speak for themselves. Each convolution of the network is in exactly one call, so the calls'
    MACs add up to the network's. Pooling, up-sampling without weights, sums and a gate's arithmetic are no calls, nor
    are norms that cannot be folded (instance, group): such a layer is its bare convolution, without ReLU, and maps
    are concatenated before it.
    """
    return list(_Lister(graph, batch, height, width, mode, precision).calls())


class _Lister:
    """One network on one batch: what every call needs beside its own shape."""

    def __init__(self, graph: SkipGraph, batch: int, height: int, width: int, mode: str, precision: str) -> None:
        self.graph, self.batch, self.mode, self.precision = graph, batch, mode, precision
        self.rows, self.columns = geometry.sizes(graph, height, width)
        self.pooled = {edge.source for edge in graph.edges if edge.shift == -1 and not edge.skip}

    def calls(self) -> Iterator[tuple[str, Call]]:
        for node in self.graph.nodes:
            yield from self._edges(node)
            yield from self._node(node)
            size = self.rows.nodes[node.name], self.columns.nodes[node.name]
            for head in self.graph.heads:
                if head.node == node.name:
                    yield f"head of {node.name}", self._conv(head.conv, size)
            if self.graph.classifier and self.graph.classifier.node == node.name:
                yield f"classifier on {node.name}", self._conv(self.graph.classifier.conv, size)

    def _edges(self, node: Node) -> Iterator[tuple[str, Call]]:
        """The executor up-samples the map that steers the gates of a node first, for them and its own edge."""
        signal = node.deeper if any(edge.gate for edge in node.inputs) else None
        if signal:
            yield from self._up(signal)
        for edge in node.inputs:
            if edge is not signal:
                yield from self._up(edge)
            y, x = self._along(edge)
            if edge.gate:
                for name, conv in zip(("x", "signal", "psi"), edge.gate.convs, strict=True):
                    yield f"{edge.name}.gate.{name}", self._conv(conv, (y.gated, x.gated))
            if edge.conv:
                yield edge.name, self._conv(edge.conv, (y.gated, x.gated))
            if edge.project:
                yield f"{edge.name}.project", self._conv(edge.project, (y.convolved, x.convolved))

    def _up(self, edge: Edge) -> Iterator[tuple[str, Call]]:
        if edge.up:
            y, x = self._along(edge)
            source = (edge.up.in_channels, y.source, x.source)
            yield edge.name, self._call("up_conv", (source,), edge.up.out_channels)

    def _node(self, node: Node) -> Iterator[tuple[str, Call]]:
        """The first convolution reads the arriving maps, side by side if it can; the last one also pools if it can."""
        y, x = self._along(node.inputs[0])
        height, width = y.merged, x.merged
        arriving: tuple[tuple[int, int, int], ...] = ()
        if len(node.inputs) > 1 and node.merge == "concat":
            ends = [(edge, *self._along(edge)) for edge in node.inputs]
            arriving = tuple((edge.out_channels, y.convolved, x.convolved) for edge, y, x in ends)
            if node.convs[0].norm not in FOLDABLE:
                yield f"{node.name}.merge", self._call("crop_concat", arriving, 0)
                arriving = ()
        pools = node.name in self.pooled and self.mode == "inference"
        for index, conv in enumerate(node.convs):
            op = "conv_bn_relu"
            if index == 0 and arriving:
                op = "concat_conv_bn_relu"
            elif index == len(node.convs) - 1 and pools and conv.norm in FOLDABLE:
                op = "conv_bn_relu_pool"
            call = self._conv(conv, (height, width), op, arriving if index == 0 else ())
            yield f"{node.name}.{index}", call
            height, width = call.out_size

    def _conv(
        self,
        conv: Conv,
        size: tuple[int, int],
        op: str = "conv_bn_relu",
        sources: tuple[tuple[int, int, int], ...] = (),
    ) -> Call:
        """A convolution of a map of `size`, or of `sources`, with what of its norm and ReLU can be in it."""
        if self.mode == "training" and conv.norm == "batch":
            op = "conv_bn_relu_train"
        padding = conv.kernel // 2 if self.graph.padding == "same" else 0
        relu = conv.act and conv.norm in FOLDABLE
        sources = sources or ((conv.in_channels, *size),)
        return self._call(op, sources, conv.out_channels, kernel=conv.kernel, padding=padding, relu=relu)

    def _call(
        self,
        op: str,
        sources: tuple[tuple[int, int, int], ...],
        out_channels: int,
        *,
        kernel: int = 3,
        padding: int = 1,
        relu: bool = True,
    ) -> Call:
        return Call(op, self.batch, sources, out_channels, kernel, padding, relu, self.precision, self.mode)

    def _along(self, edge: Edge) -> tuple[EdgeSize, EdgeSize]:
        return self.rows.edges[edge.name], self.columns.edges[edge.name]
