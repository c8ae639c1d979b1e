"""The one executor: an `nn.Module` that runs any `SkipGraph`. There is no other `forward` in the suite.

Lifetimes are one rule: a map is dropped after its last reader. Where the reader is an op, the op's own frame must be
the only one that holds its input, which is why maps are passed on out of lists and not out of variables. With a
variable in `_run_node` a merged map outlives its convolution: traced at 512x512 that adds 24 % to the activations'
peak of unet3+/d2/w64 and 7 % to that of unet++/d4/w32, and nothing where the peak is elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.unet_models.geometry import arrival
from skipcost.unet_models.ops import REFERENCE, AttentionGate, ConvNormAct, Ops, crop_all
from skipcost.unet_models.topology import IMAGE, Edge, Head, Node, SkipGraph

if TYPE_CHECKING:
    from skipcost.unet_models.spec import ModelSpec

Output = Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Tensor]
OUTPUTS = ("final", "all")


class EdgeLayers(nn.Module):
    """The weights on one edge; an attribute is None where the edge has no such step."""

    def __init__(self, edge: Edge, *, valid: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(edge.up.in_channels, edge.up.out_channels, 2, stride=2) if edge.up else None
        self.gate = AttentionGate(edge.gate) if edge.gate else None
        self.conv = ConvNormAct(edge.conv, valid=valid) if edge.conv else None
        self.project = ConvNormAct(edge.project, valid=False) if edge.project else None


class SkipNet(nn.Module):
    """A network made from a graph. Input (N, in_channels, H, W); logits (N, classes, H', W').

    Returns the logits of the only head, or a list with those of all heads, the deployed one first, cropped to the
    smallest. With a classifier it returns `(maps, class_logits)`: the maps as probabilities, 0 everywhere in an image
    whose two class logits (N, 2) say "no organ" (index 0, ties included), and the class logits to be trained with
    cross-entropy. The authors' code masks the logits, which turns "no organ" into 0.5, and returns no class scores.
    """

    def __init__(self, graph: SkipGraph, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.graph, self.ops = graph, ops
        valid = graph.padding == "valid"
        self.edges = nn.ModuleDict({edge.name: EdgeLayers(edge, valid=valid) for edge in graph.edges if edge.convs})
        self.nodes = nn.ModuleDict(
            {node.name: nn.ModuleList(ConvNormAct(conv, valid=valid) for conv in node.convs) for node in graph.nodes}
        )
        self.heads = nn.ModuleDict({head.node: ConvNormAct(head.conv, valid=valid) for head in graph.heads})
        self.classifier = ConvNormAct(graph.classifier.conv, valid=False) if graph.classifier else None

    def forward(self, image: Tensor) -> Output:
        """Run the graph on (N, in_channels, H, W)."""
        with self.ops.around():
            return self._run(image)

    def _run(self, image: Tensor) -> Output:
        graph, maps, logits = self.graph, {IMAGE: image}, {}
        unread = Counter(edge.source for edge in graph.edges)
        class_logits = None
        for node in graph.nodes:
            maps[node.name] = self._run_node(node, maps, unread)
            for head in graph.heads:
                if head.node == node.name:
                    logits[head.node] = self._run_head(head, maps[node.name])
            if graph.classifier and graph.classifier.node == node.name:
                class_logits = self._classify(maps[node.name])
            if not unread[node.name]:
                del maps[node.name]
        outputs = crop_all([logits[head.node] for head in graph.heads])
        if class_logits is None:
            return outputs if len(outputs) > 1 else outputs[0]
        masked = _masked(outputs, class_logits)
        return (masked if len(masked) > 1 else masked[0]), class_logits

    def _run_node(self, node: Node, maps: dict[str, Tensor], unread: Counter[str]) -> Tensor:
        first, *others = cast("list[ConvNormAct]", list(cast("nn.ModuleList", self.nodes[node.name])))
        held = [self._enter(node, first, maps, unread)]
        pooling = self._pooling(node) if self.ops.conv_pool and others else None
        for layer in others[:-1] if pooling else others:
            held.append(self.ops.conv_norm_act(layer, held.pop()))
        if pooling and self.ops.conv_pool:
            full, maps[pooling.name] = self.ops.conv_pool(others[-1], held.pop())
            return full
        return held.pop()

    def _enter(self, node: Node, layer: ConvNormAct, maps: dict[str, Tensor], unread: Counter[str]) -> Tensor:
        """Merge the node's inputs and run its first convolution, in one op where there is one."""
        edge = node.inputs[-1]
        plain = edge is node.deeper and not edge.conv and not edge.project and not any(e.gate for e in node.inputs)
        if self.ops.up_concat_conv and plain and not edge.up and node.merge == "concat":
            arrivals = list(self._arrivals(node, maps, unread, raw=True))
            return self.ops.up_concat_conv(layer, arrivals, 1 << edge.shift, cast("str", edge.mode))
        if (
            self.ops.relu_concat and node.concatenates_relus and not torch.compiler.is_compiling()
        ):  # no generators there
            shape = self._merged(node, maps)
            held = [self.ops.relu_concat(self._arrivals(node, maps, unread, act=False), shape)]
            return self.ops.conv_norm_act(layer, held.pop())
        if self.ops.merge_conv is None:
            held = [self.ops.merge(list(self._arrivals(node, maps, unread)), node.merge)]
            return self.ops.conv_norm_act(layer, held.pop())
        up = cast("nn.ConvTranspose2d", self._layers(edge).up) if edge.up and plain else None
        arrivals = list(self._arrivals(node, maps, unread, raw=up is not None))
        return self.ops.merge_conv(layer, arrivals, node.merge, up)

    def _merged(self, node: Node, maps: dict[str, Tensor]) -> tuple[int, int, int]:
        """Channels, height and width of what arrives at a node, concatenated, before any of it is made."""
        valid = self.graph.padding == "valid"
        height, width = (
            min(arrival(int(maps[edge.source].shape[axis]), edge, valid=valid) for edge in node.inputs)
            for axis in (2, 3)
        )
        return node.convs[0].in_channels, height, width

    def _pooling(self, node: Node) -> Edge | None:
        """The edge on which the next encoder level pools this node; None in the decoder and at the bottom."""
        reads = (edge for edge in self.graph.edges if edge.source == node.name)
        return next((edge for edge in reads if edge.shift == -1 and not edge.skip), None)

    def _arrivals(
        self, node: Node, maps: dict[str, Tensor], unread: Counter[str], *, raw: bool = False, act: bool = True
    ) -> Iterator[Tensor]:
        """Carry every input to the node; the map that steers a gate is up-sampled once, for the gate and its edge.

        With `raw` the deeper map arrives as it is; what its last convolution pooled already arrives as that. Without
        `act` the edges' convolutions leave ReLU to the caller.
        """
        signal: list[Tensor] = []
        if node.deeper and any(edge.gate for edge in node.inputs):
            signal.append(self._resample(node.deeper, _read(node.deeper, maps, unread)))
        for edge in node.inputs:
            if edge.name in maps:
                _read(edge, maps, unread)
                yield maps.pop(edge.name)
            elif raw and edge is node.deeper:
                yield _read(edge, maps, unread).pop()
            elif signal and edge is node.deeper:
                yield self._convolve(edge, signal, resampled=True)
            elif edge.gate:
                layers = self._layers(edge)
                held = [self._resample(edge, _read(edge, maps, unread))]
                held.append(self.ops.gate(cast("AttentionGate", layers.gate), held.pop(), signal[0]))
                yield self._convolve(edge, held, resampled=True)
            else:
                yield self._convolve(edge, _read(edge, maps, unread), resampled=False, act=act)

    def _resample(self, edge: Edge, held: list[Tensor]) -> Tensor:
        if edge.up:
            return self.ops.up_conv(cast("nn.ConvTranspose2d", self._layers(edge).up), held.pop())
        if edge.shift > 0:
            return self.ops.up_sample(held.pop(), 1 << edge.shift, cast("str", edge.mode))
        return self.ops.pool(held.pop(), 1 << -edge.shift, ceil=edge.skip) if edge.shift < 0 else held.pop()

    def _convolve(self, edge: Edge, held: list[Tensor], *, resampled: bool, act: bool = True) -> Tensor:
        """Take the map through what is left of its edge: resampling unless done, 3x3 convolution, projection."""
        layer = cast("ConvNormAct", self._layers(edge).conv) if edge.conv else None
        if layer and not act:
            layer = layer.without_act()
        if layer and edge.shift > 0 and not resampled:
            held.append(self.ops.up_sample_conv(layer, held.pop(), 1 << edge.shift, cast("str", edge.mode)))
        else:
            if not resampled:
                held.append(self._resample(edge, held))
            if layer:
                held.append(self.ops.conv_norm_act(layer, held.pop()))
        if edge.project:
            held.append(self.ops.conv_norm_act(cast("ConvNormAct", self._layers(edge).project), held.pop()))
        return held.pop()

    def _layers(self, edge: Edge) -> EdgeLayers:
        return cast("EdgeLayers", self.edges[edge.name])

    def _run_head(self, head: Head, x: Tensor) -> Tensor:
        logits = self.ops.conv_norm_act(cast("ConvNormAct", self.heads[head.node]), x)
        return self.ops.up_sample(logits, 1 << head.shift, head.mode) if head.shift else logits

    def _classify(self, x: Tensor) -> Tensor:
        """Huang et al. (2020), sec. 2.4: dropout, 1x1 convolution, global max pooling: (N, C, h, w) -> (N, 2)."""
        x = functional.dropout(x, 0.5, self.training)
        return self.ops.conv_norm_act(cast("ConvNormAct", self.classifier), x).amax((2, 3))


def _read(edge: Edge, maps: dict[str, Tensor], unread: Counter[str]) -> list[Tensor]:
    """Return the edge's source as the only element of a list; the last reader takes it out of the maps."""
    unread[edge.source] -= 1
    return [maps[edge.source] if unread[edge.source] else maps.pop(edge.source)]


def _masked(logits: list[Tensor], class_logits: Tensor) -> list[Tensor]:
    """Turn logits (N, 1, H, W) into probabilities, 0 where the image was judged to have no organ.

    Compared as logits: after a sigmoid in 32 bits two saturated scores would tie. The comparison passes no gradient;
    the classifier learns from its own loss.
    """
    present = (class_logits[:, 1] > class_logits[:, 0]).to(logits[0].dtype).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
    return [torch.sigmoid(each) * present for each in logits]


def build(spec: ModelSpec, ops: Ops = REFERENCE, outputs: str = "all") -> SkipNet:
    """Build the network of `spec` with fresh weights.

    outputs: "all" has every head; "final" is the deployed form, with the first head and what it reads.
    """
    if outputs not in OUTPUTS:
        message = f"outputs={outputs!r} is unknown; accepted: {', '.join(OUTPUTS)}"
        raise ValueError(message)
    graph = spec.graph()
    return SkipNet(graph.final() if outputs == "final" else graph, ops)
