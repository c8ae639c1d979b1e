"""A network as data: nodes, the edges that feed them, and the convolutions on both.

Nothing here knows of tensors. A graph says what is connected to what and with which weights; `program` says in which
order that runs, `sizes` what every map measures, `network` executes it. Every convolution of a network is one `Conv`
record, so that counting and building read the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from skipcost.unet_models import sizes
from skipcost.unet_models.program import lower


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution and what follows it; `kernel` x `kernel`, stride 1, or stride = kernel when transposed."""

    in_channels: int
    out_channels: int
    kernel: int
    bias: bool = True
    norm: str = "none"
    act: bool = False
    transposed: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight, which are also the MACs per output position (per input position if transposed)."""
        return self.kernel * self.kernel * self.in_channels * self.out_channels

    @property
    def norm_groups(self) -> int:
        """Groups of a group norm: 32 as in Wu & He (2018), or the largest power of two below that divides."""
        return math.gcd(32, self.out_channels)

    def params(self) -> int:
        """Trainable parameters: weight, bias, and the norm's scale and shift."""
        affine = 2 if self.norm != "none" else 0
        return self.weights + self.out_channels * (self.bias + affine)


@dataclass(frozen=True, slots=True)
class Gate:
    """The additive attention gate of Oktay et al. (2018), eq. 1: sigmoid(psi(relu(x-map + signal-map))) times x."""

    x: Conv
    signal: Conv
    psi: Conv

    @property
    def convs(self) -> tuple[Conv, ...]:
        """The three 1x1 convolutions, in the order in which they run."""
        return (self.x, self.signal, self.psi)


INTERPOLATIONS = {  # up-sampling without weights: mode and align_corners of torch.nn.functional.interpolate
    "bilinear": ("bilinear", False),
    "align_corners": ("bilinear", True),
    "nearest": ("nearest", False),
}


@dataclass(frozen=True, slots=True)
class Edge:
    """How one map reaches one node: resample, gate, convolve, project, in this order; then the node crops and merges.

    `shift` is the source's level minus the target's: above 0 the map is up-sampled by 2**shift with `mode` (a key of
    INTERPOLATIONS, or the convolution `up`), below 0 it is max-pooled by 2**-shift, at 0 it stays. `skip` tells a skip
    from the edge that no skip scheme may remove (the encoder's own, and the one from the next deeper level).
    """

    source: str
    target: str
    shift: int
    in_channels: int
    skip: bool
    mode: str | None = None
    up: Conv | None = None
    gate: Gate | None = None
    conv: Conv | None = None
    project: Conv | None = None

    @property
    def name(self) -> str:
        """`source->target`, the edge's key everywhere."""
        return f"{self.source}->{self.target}"

    @property
    def resampled_channels(self) -> int:
        """Channels after up-sampling or pooling, before the edge's own convolution."""
        return self.up.out_channels if self.up else self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels as the target's merge sees them."""
        last = self.project or self.conv
        return last.out_channels if last else self.resampled_channels

    @property
    def convs(self) -> tuple[Conv, ...]:
        """Every convolution on the edge, in the order in which it runs."""
        gate = self.gate.convs if self.gate else ()
        return tuple(conv for conv in (self.up, *gate, self.conv, self.project) if conv)


@dataclass(frozen=True, slots=True)
class Node:
    """X^{level,column} of the papers: its inputs are merged, then run through `convs`."""

    name: str
    level: int
    width: int
    inputs: tuple[Edge, ...]
    convs: tuple[Conv, ...]
    merge: str = "concat"

    @property
    def deeper(self) -> Edge | None:
        """The edge from the next deeper level, which is not a skip; None in the encoder."""
        return next((edge for edge in self.inputs if not edge.skip and edge.shift == 1), None)

    @property
    def concatenates_relus(self) -> bool:
        """Whether it concatenates maps that all come straight from a convolution with ReLU on their edge."""
        ended = (edge.conv and edge.conv.act and not edge.gate and not edge.project for edge in self.inputs)
        return self.merge == "concat" and len(self.inputs) > 1 and all(ended)

    def rewired(self, inputs: tuple[Edge, ...], merge: str = "concat") -> Node:
        """Return the node with other inputs; its first convolution is fitted to them, its width stays."""
        channels = inputs[0].out_channels if merge == "sum" else sum(edge.out_channels for edge in inputs)
        first = replace(self.convs[0], in_channels=channels)
        return replace(self, inputs=inputs, merge=merge, convs=(first, *self.convs[1:]))


@dataclass(frozen=True, slots=True)
class Head:
    """A convolution from a node to `out_channels` logits, up-sampled by 2**shift to the finest level."""

    node: str
    conv: Conv
    shift: int = 0
    mode: str = "bilinear"


@dataclass(frozen=True, slots=True)
class SkipGraph:
    """A whole network: nodes in the order of execution, heads (the first is the one that is deployed), classifier.

    Equal graphs are equal networks, weights included, whatever the specs that led to them are called.
    """

    nodes: tuple[Node, ...]
    heads: tuple[Head, ...]
    in_channels: int
    padding: str
    classifier: Head | None = None

    def __hash__(self) -> int:
        """Hash a part, which tells most networks apart: what is worked out is kept by graph, and asks each time."""
        last = self.nodes[-1]
        return hash((len(self.nodes), self.heads, self.in_channels, last.merge, len(last.inputs), last.inputs[0].gate))

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in the order in which the executor reads it."""
        return tuple(edge for node in self.nodes for edge in node.inputs)

    @property
    def depth(self) -> int:
        """The deepest level that is left: the number of 2x down-samplings."""
        return max(node.level for node in self.nodes)

    def convs(self) -> Iterator[Conv]:
        """Every convolution of the network."""
        for node in self.nodes:
            for edge in node.inputs:
                yield from edge.convs
            yield from node.convs
        for head in self.heads:
            yield head.conv
        if self.classifier:
            yield self.classifier.conv

    def params(self) -> int:
        """Count trainable parameters, exactly."""
        return sum(conv.params() for conv in self.convs())

    def conv_macs(self, height: int, width: int) -> int:
        """Multiply-adds of every convolution for one image of height x width pixels, exactly."""
        return sizes.conv_macs(lower(self), (height, width))

    def activations(self, height: int, width: int) -> int:
        """Elements of every convolution's output for one image, exactly (fvcore's definition of activations)."""
        return sizes.activations(lower(self), (height, width))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of height x width pixels."""
        rows, columns = sizes.output_size(lower(self), (height, width))
        return rows, columns

    def receptive_field(self) -> int:
        """Side, in pixels, of the smallest window that holds all inputs of one output pixel; see `sizes`."""
        return sizes.receptive_field(lower(self))

    def final(self) -> SkipGraph:
        """Return the network as it is deployed: the first head alone, without what only the others read."""
        return replace(self, heads=self.heads[:1]).pruned()

    def pruned(self) -> SkipGraph:
        """Return the graph without the nodes that no head reads, directly or through other nodes."""
        wanted = {head.node for head in self.heads}
        if self.classifier:
            wanted.add(self.classifier.node)
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted.update(edge.source for edge in node.inputs)
        return replace(self, nodes=tuple(node for node in self.nodes if node.name in wanted))
