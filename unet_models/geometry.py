"""Sizes: what every map measures, what is cropped, what the convolutions cost, how far an output pixel sees.

Height and width never interact, so everything is worked out along one axis and paired. The rules are DESIGN's:
pooling floors in the encoder and takes the ceiling on skip edges; where maps meet with different sizes, all are
centre-cropped to the smallest, after an edge's own convolution; `valid` takes 2 off at every 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipcost.unet_models.topology import Conv, Edge, SkipGraph

SEARCH_LIMIT = 65536  # pixels a side, the most that a case has: beyond it no workable size is looked for


@dataclass(frozen=True, slots=True)
class EdgeSize:
    """One edge along one axis: as read, after resampling, after the gate's crop, after its convolution, as merged."""

    source: int
    resampled: int
    gated: int
    convolved: int
    merged: int


@dataclass(frozen=True, slots=True)
class AxisSizes:
    """Every extent along one axis, by node, edge and head name."""

    nodes: dict[str, int]
    edges: dict[str, EdgeSize]
    heads: dict[str, int]
    output: int
    floored: tuple[str, ...]  # encoder edges whose pooling dropped a row


@dataclass(frozen=True, slots=True)
class PlacedConv:
    """One convolution at its place: `owner` is an edge's, node's or head's name; the sizes are of its output."""

    owner: str
    conv: Conv
    height: int
    width: int

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        positions = self.height * self.width
        if self.conv.transposed:
            positions //= self.conv.kernel**2
        return self.conv.weights * positions

    @property
    def outputs(self) -> int:
        """Elements of the output for one image."""
        return self.conv.out_channels * self.height * self.width


class _VanishedError(Exception):
    """A map has no pixel left; the argument says which."""


def _resampled(extent: int, edge: Edge) -> int:
    if edge.shift >= 0:
        return extent << edge.shift
    step = 1 << -edge.shift
    return -(-extent // step) if edge.skip else extent // step


def arrival(extent: int, edge: Edge, *, valid: bool) -> int:
    """One axis of a map of `extent` pixels at the end of an edge without a gate, before it is cropped."""
    return _resampled(extent, edge) - _lost(edge, valid=valid)


def _lost(edge: Edge, *, valid: bool) -> int:
    return 2 if valid and edge.conv else 0


def _positive(extent: int, where: str) -> int:
    if extent < 1:
        raise _VanishedError(where)
    return extent


def axis_sizes(graph: SkipGraph, extent: int) -> AxisSizes:
    """Follow one axis of `extent` pixels through the graph."""
    valid = graph.padding == "valid"
    nodes = {"image": extent}
    edges: dict[str, EdgeSize] = {}
    heads: dict[str, int] = {}
    floored = []
    for node in graph.nodes:
        arriving = []
        deeper = node.deeper
        signal = _resampled(nodes[deeper.source], deeper) if deeper else 0
        for edge in node.inputs:
            source = nodes[edge.source]
            resampled = _positive(_resampled(source, edge), edge.name)
            gated = min(resampled, signal) if edge.gate else resampled
            convolved = _positive(gated - _lost(edge, valid=valid), edge.name)
            arriving.append((edge, source, resampled, gated, convolved))
            if edge.shift < 0 and not edge.skip and source % 2:
                floored.append(edge.name)
        merged = min(item[-1] for item in arriving)
        for edge, source, resampled, gated, convolved in arriving:
            edges[edge.name] = EdgeSize(source, resampled, gated, convolved, merged)
        nodes[node.name] = _positive(merged - 2 * valid * len(node.convs), node.name)
    for head in graph.heads:
        lost = 2 if valid and head.conv.kernel > 1 else 0
        heads[head.node] = _positive(nodes[head.node] - lost, f"the head on {head.node}") << head.shift
    return AxisSizes(nodes, edges, heads, min(heads.values()), tuple(floored))


def _works(graph: SkipGraph, extent: int) -> bool:
    try:
        axis_sizes(graph, extent)
    except _VanishedError:
        return False
    return True


def smallest_size(graph: SkipGraph) -> int:
    """Return the smallest extent at which no map vanishes; every larger one works too."""
    low, high = 0, 1
    while not _works(graph, high):
        low, high = high, high * 2
        if high > SEARCH_LIMIT:
            message = f"no input of up to {SEARCH_LIMIT} pixels keeps every map of this network"
            raise ValueError(message)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _works(graph, middle) else (middle, high)
    return high


def lossless_size(graph: SkipGraph, extent: int) -> int:
    """Return the nearest extent, `extent` or above, at which no pooling drops a row."""
    candidate = max(extent, smallest_size(graph))
    while axis_sizes(graph, candidate).floored:
        candidate += 1
    return candidate


def sizes(graph: SkipGraph, height: int, width: int) -> tuple[AxisSizes, AxisSizes]:
    """Return the sizes along both axes; ValueError with the nearest sizes that work where a map would vanish."""
    try:
        rows = axis_sizes(graph, height)
        return rows, rows if width == height else axis_sizes(graph, width)
    except _VanishedError as vanished:
        smallest = smallest_size(graph)
        fits_height, fits_width = max(height, smallest), max(width, smallest)
        neat_height, neat_width = lossless_size(graph, fits_height), lossless_size(graph, fits_width)
        message = (
            f"an input of {height}x{width} leaves no pixel at {vanished}: this network needs at least "
            f"{smallest} pixels a side; the nearest size that works is {fits_height}x{fits_width}"
        )
        if (neat_height, neat_width) != (fits_height, fits_width):
            message += f", the nearest at which no pooling drops a row {neat_height}x{neat_width}"
        raise ValueError(message) from None


def size_note(graph: SkipGraph, height: int, width: int) -> str:
    """Say what the crop rule does to this size, and the size that avoids it; empty where nothing is dropped."""
    rows, columns = sizes(graph, height, width)
    if not rows.floored and not columns.floored:
        return ""
    return (
        f"{height}x{width} gives {rows.output}x{columns.output}: pooling drops a row or column of an odd map and the "
        f"others are cropped to match; pad to {lossless_size(graph, height)}x{lossless_size(graph, width)} to avoid it"
    )


def norm_note(graph: SkipGraph, case: tuple[int, int, int], *, training: bool) -> str:
    """Say why a norm cannot run on `case` = (batch, height, width); empty where it can."""
    batch, height, width = case
    for placed in place(graph, height, width):
        norm = placed.conv.norm
        if placed.height * placed.width > 1 or not _refused(placed.conv, norm, batch, training=training):
            continue
        remedy = "" if norm == "instance" else ", a batch of 2 or more"
        if not _refused(placed.conv, "group", batch, training=training):
            remedy += ", or norm=group"
        return (
            f"{norm} norm at {placed.owner} would normalise over a single value, because "
            f"{height}x{width} leaves a 1x1 map there; use {2 * height}x{2 * width}{remedy}"
        )
    return ""


def _refused(conv: Conv, norm: str, batch: int, *, training: bool) -> bool:
    """Whether PyTorch refuses to normalise a 1x1 map, where a channel or group may have one value alone.

    Batch norm in training; instance norm always; group norm, in PyTorch's own check, at batch 1 where each group has
    one channel, which is so up to 32 channels if they are a power of two.
    """
    match norm:
        case "batch":
            return training and batch == 1
        case "instance":
            return True
        case "group":
            return batch * conv.out_channels == conv.norm_groups
    return False


def place(graph: SkipGraph, height: int, width: int) -> Iterator[PlacedConv]:
    """Yield every convolution with the size of its output, in the order of execution."""
    rows, columns = sizes(graph, height, width)
    shrink = 2 if graph.padding == "valid" else 0
    for node in graph.nodes:
        for edge in node.inputs:
            y, x = rows.edges[edge.name], columns.edges[edge.name]
            if edge.up:
                yield PlacedConv(edge.name, edge.up, y.resampled, x.resampled)
            for conv in edge.gate.convs if edge.gate else ():
                yield PlacedConv(edge.name, conv, y.gated, x.gated)
            for late in (edge.conv, edge.project):
                if late:
                    yield PlacedConv(edge.name, late, y.convolved, x.convolved)
        last_y, last_x = rows.nodes[node.name], columns.nodes[node.name]
        for left, conv in zip(range(len(node.convs) - 1, -1, -1), node.convs, strict=True):
            yield PlacedConv(node.name, conv, last_y + left * shrink, last_x + left * shrink)
    for head in graph.heads:
        y0, x0 = rows.heads[head.node] >> head.shift, columns.heads[head.node] >> head.shift
        yield PlacedConv(f"head of {head.node}", head.conv, y0, x0)
    if graph.classifier:
        name = graph.classifier.node
        yield PlacedConv(f"classifier on {name}", graph.classifier.conv, rows.nodes[name], columns.nodes[name])


def _reach(edge: Edge, low: int, high: int) -> tuple[int, int]:
    """Map an interval of the target's coordinates to the source pixels that it reads."""
    if edge.conv:
        low, high = low - 1, high + 1
    if edge.shift < 0:
        step = 1 << -edge.shift
        return low * step, high * step + step - 1
    if edge.shift == 0:
        return low, high
    factor = 1 << edge.shift
    if edge.mode != "bilinear":
        return low // factor, high // factor
    # Bilinear, align_corners=False: output o reads floor((o + 1/2) / f - 1/2) and the pixel after it. The fraction
    # is never 0 for an even f, so both have weight.
    return (2 * low + 1 - factor) // (2 * factor), (2 * high + 1 - factor) // (2 * factor) + 1


def receptive_field(graph: SkipGraph) -> int:
    """Side of the window that holds every input pixel which one output pixel of the deployed head depends on.

    Worked out by running intervals backwards through convolutions, pooling and resampling, for every phase of the
    output grid, and taking the widest. Statistics over the whole map (instance and group norm, batch norm in
    training, the classification-guided mask) are left out, and maps are taken as aligned where they are cropped.
    """
    head = graph.heads[0]
    widest = 0
    for phase in range(1 << graph.depth):
        spans = {head.node: (phase - head.conv.kernel // 2, phase + head.conv.kernel // 2)}
        for node in reversed(graph.nodes):
            if node.name not in spans:
                continue
            grown = sum(conv.kernel // 2 for conv in node.convs)
            low, high = spans[node.name][0] - grown, spans[node.name][1] + grown
            for edge in node.inputs:
                start, end = _reach(edge, low, high)
                known = spans.get(edge.source, (start, end))
                spans[edge.source] = min(known[0], start), max(known[1], end)
        widest = max(widest, spans["image"][1] - spans["image"][0] + 1)
    return widest
