"""The variants: which maps reach which node. Each is a pure function from a spec to a graph.

Nodes are named as in the papers, X^{level,column} -> x{level}_{column}. The decoder map of level i of U-Net and
UNet 3+ is x{i}_{depth-i}, which is where UNet++ has it too, so that the three can be laid over each other: UNet 3+'s
X_En^{i+1} is x{i}_0 and its X_De^{i+1} is x{i}_{depth-i}. Inputs are merged encoder maps first, the up-sampled map
last; implementations differ in this (counts do not), so weights of other code bases need their channels permuted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skipcost.unet_models.program import IMAGE
from skipcost.unet_models.topology import INTERPOLATIONS, Conv, Edge, Head, Node, SkipGraph

if TYPE_CHECKING:
    from skipcost.unet_models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of VARIANTS: the wiring, and what a spec of this variant may ask for."""

    wire: Callable[[ModelSpec], SkipGraph]
    title: str
    paper: str
    upsamples: tuple[str, ...]  # the first is the paper's own, the default
    heads: tuple[str, ...] = ("single",)
    prunable: bool = False


def level_width(spec: ModelSpec, level: int) -> int:
    """Channels of the encoder at `level`: doubled at every level, up to `max_width`."""
    doubled = spec.width << level
    return doubled if spec.max_width is None else min(doubled, spec.max_width)


def _conv3(spec: ModelSpec, in_channels: int, out_channels: int) -> Conv:
    return Conv(in_channels, out_channels, 3, bias=spec.bias, norm=spec.norm, act=True)


def _block(spec: ModelSpec, level: int, column: int, inputs: tuple[Edge, ...]) -> Node:
    """Two 3x3 convolutions on the concatenated inputs, as in U-Net and UNet++."""
    width = level_width(spec, level)
    arriving = sum(edge.out_channels for edge in inputs)
    convs = (_conv3(spec, arriving, width), _conv3(spec, width, width))
    return Node(f"x{level}_{column}", level, width, inputs, convs)


def _encoder(spec: ModelSpec, depth: int) -> list[Node]:
    """The contracting path, alike in all variants."""
    nodes = [_block(spec, 0, 0, (Edge(IMAGE, "x0_0", 0, spec.in_channels, skip=False),))]
    for level in range(1, depth + 1):
        above = nodes[-1]
        edge = Edge(above.name, f"x{level}_0", -1, above.width, skip=False)
        nodes.append(_block(spec, level, 0, (edge,)))
    return nodes


def _up_edge(spec: ModelSpec, source: str, target: str, level: int) -> Edge:
    """The edge from the next deeper level: a 2x2 transposed convolution to the node's width, or parameter-free."""
    channels = level_width(spec, level + 1)
    learned = Conv(channels, level_width(spec, level), 2, transposed=True)
    up = learned if spec.upsample == "transpose" else None
    return Edge(source, target, 1, channels, skip=False, mode=spec.upsample, up=up)


def _stay(spec: ModelSpec, source: str, target: str, level: int) -> Edge:
    return Edge(source, target, 0, level_width(spec, level), skip=True)


def unet(spec: ModelSpec) -> SkipGraph:
    """Ronneberger et al. (2015), fig. 1: each decoder node reads the encoder map of its level and the map below.

    We differ from the paper in that batch norm and zero padding are the defaults (its own network is
    norm=none/padding=valid), and dropout at the end of the contracting path is left out.
    """
    nodes = _encoder(spec, spec.depth)
    for column in range(1, spec.depth + 1):
        level = spec.depth - column
        name = f"x{level}_{column}"
        inputs = (_stay(spec, f"x{level}_0", name, level), _up_edge(spec, nodes[-1].name, name, level))
        nodes.append(_block(spec, level, column, inputs))
    head = Head(nodes[-1].name, Conv(spec.width, spec.classes, 1))
    return SkipGraph(tuple(nodes), (head,), spec.in_channels, spec.padding)


def unet_plus_plus(spec: ModelSpec) -> SkipGraph:
    """Zhou et al. (2018, 2020), eq. 1: X^{i,j} = H([X^{i,0}, ..., X^{i,j-1}, U(X^{i+1,j-1})]).

    `pruned_to` d keeps the nodes with i + j <= d, sec. 3.4. The authors' dropout after each convolution is left out.
    """
    depth = spec.pruned_to or spec.depth
    nodes = _encoder(spec, depth)
    for column in range(1, depth + 1):
        for level in range(depth - column + 1):
            name = f"x{level}_{column}"
            same = tuple(_stay(spec, f"x{level}_{k}", name, level) for k in range(column))
            inputs = (*same, _up_edge(spec, f"x{level + 1}_{column - 1}", name, level))
            nodes.append(_block(spec, level, column, inputs))
    columns = range(depth, 0, -1) if spec.head == "deep" else (depth,)
    heads = tuple(Head(f"x0_{column}", Conv(spec.width, spec.classes, 1)) for column in columns)
    return SkipGraph(tuple(nodes), heads, spec.in_channels, spec.padding)


def unet_3plus(spec: ModelSpec) -> SkipGraph:
    """Huang et al. (2020), eq. 1: every decoder node reads the encoder maps of its level and above, and all below.

    Each source is resampled, then brought to `width` channels by 3x3 convolution, norm and ReLU (the same-scale one
    too); the depth + 1 results are concatenated and fused by one more. The bottleneck is X_De^{depth+1}. Sec. 2.2:
    one head per decoder map and one on the bottleneck; sec. 2.4: the classifier on the bottleneck (guided).
    """
    nodes = _encoder(spec, spec.depth)
    encoder = nodes[: spec.depth]
    decoder = [nodes[-1]]  # deepest first
    fused = spec.width * (spec.depth + 1)
    for level in reversed(range(spec.depth)):
        name = f"x{level}_{spec.depth - level}"
        sources = (*encoder[: level + 1], *reversed(decoder))
        inputs = tuple(_full_scale_edge(spec, source, name, level) for source in sources)
        decoder.append(Node(name, level, fused, inputs, (_conv3(spec, fused, fused),)))
    mode = spec.upsample or "bilinear"
    heads = [Head(node.name, Conv(node.width, spec.classes, 3), node.level, mode) for node in reversed(decoder)]
    kept = heads[:1] if spec.head == "single" else heads
    classifier = Head(nodes[-1].name, Conv(nodes[-1].width, 2, 1)) if spec.head == "guided" else None
    return SkipGraph((*nodes, *decoder[1:]), tuple(kept), spec.in_channels, spec.padding, classifier)


def _full_scale_edge(spec: ModelSpec, source: Node, target: str, level: int) -> Edge:
    shift = source.level - level
    mode = spec.upsample if shift > 0 else None
    conv = _conv3(spec, source.width, spec.width)
    return Edge(source.name, target, shift, source.width, skip=shift != 1, mode=mode, conv=conv)


VARIANTS: dict[str, Variant] = {
    "unet": Variant(
        wire=unet,
        title="U-Net",
        paper="Ronneberger, Fischer, Brox: U-Net (MICCAI 2015)",
        upsamples=("transpose", *INTERPOLATIONS),
    ),
    "unet++": Variant(
        wire=unet_plus_plus,
        title="UNet++",
        paper="Zhou et al.: UNet++ (DLMIA 2018; IEEE TMI 2020)",
        upsamples=("transpose", *INTERPOLATIONS),
        heads=("single", "deep"),
        prunable=True,
    ),
    "unet3+": Variant(
        wire=unet_3plus,
        title="UNet 3+",
        paper="Huang et al.: UNet 3+ (ICASSP 2020)",
        upsamples=tuple(INTERPOLATIONS),
        heads=("single", "deep", "guided"),
    ),
}
