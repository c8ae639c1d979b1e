"""What the executor does to a graph, call by call, with the sizes: `unet_models/network.py` without tensors.

The calls say what is done to what and are the same for all widths and image sizes that need the same steps; the
numbers beside them are this network's. Maps arrive, are merged and are dropped in the executor's order; a `hold` stands
where its Python frames keep a map longer than its last reader.
"""

from __future__ import annotations

from typing import NamedTuple

from skipcost.unet_models import geometry
from skipcost.unet_models.topology import IMAGE, Conv, Edge, Gate, Head, Node, SkipGraph

MAP, CHANNELS, WEIGHTS, GROUPS, ONE = range(5)  # columns of the table of numbers
Place = tuple[int, int, int]  # where a convolution's weights are registered: sorting gives the parameters' order


class Call(NamedTuple):
    """One step: `reads` are the numbers of the calls whose results it takes, `detail` what else `op` must know."""

    op: str
    where: str
    reads: tuple[int, ...]
    detail: tuple[object, ...] = ()


class ConvDetail(NamedTuple):
    """What a `conv` call must know of its record."""

    bias: bool
    norm: str
    act: bool
    flat: bool  # one channel or one position: all layouts are the same
    first: bool  # reads the image, and that has several channels
    place: Place


class Schedule(NamedTuple):
    """The calls of one forward pass, the results that the network returns, and the numbers of each call's result.

    One row more than there are calls has the numbers of an output of one channel, which targets have.
    """

    calls: tuple[Call, ...]
    logits: tuple[int, ...]
    class_logits: int | None
    numbers: list[tuple[int, int, int, int, int]]  # elements an image, channels, weights, groups of its norm, 1


class _Walk:
    """The walk so far; a map is the number of the call that makes it."""

    def __init__(self, graph: SkipGraph, height: int, width: int) -> None:
        self.graph, self.size = graph, (height, width)
        self.valid = graph.padding == "valid"
        self.calls: list[Call] = []
        self.numbers: list[tuple[int, int, int, int, int]] = []
        self.shapes: list[tuple[int, int, int]] = []
        self.image = self.call("image", "", (), (graph.in_channels, height, width))

    def call(
        self,
        op: str,
        where: str,
        reads: tuple[int, ...],
        shape: tuple[int, int, int],
        detail: tuple[object, ...] = (),
        weights: int = 0,
        groups: int = 0,
    ) -> int:
        if shape[1] < 1 or shape[2] < 1:
            geometry.sizes(self.graph, *self.size)  # which says what vanishes, and which size would do
        self.calls.append(Call(op, where, reads, detail))
        self.numbers.append((shape[0] * shape[1] * shape[2], shape[0], weights, groups, 1))
        self.shapes.append(shape)
        return len(self.calls) - 1

    def hold(self, *maps: int) -> None:
        self.call("hold", "", maps, self.shapes[maps[0]])

    def conv(self, x: int, conv: Conv, where: str, place: Place, *, valid: bool = False) -> int:
        _, height, width = self.shapes[x]
        lost = conv.kernel - 1 if valid else 0
        grown = conv.kernel if conv.transposed else 1
        shape = conv.out_channels, (height - lost) * grown, (width - lost) * grown
        flat = shape[0] == 1 or shape[1] * shape[2] == 1
        detail = ConvDetail(conv.bias, conv.norm, conv.act, flat, x == self.image and self.shapes[x][0] > 1, place)
        groups = conv.norm_groups if conv.norm == "group" else 0
        return self.call("conv", where, (x,), shape, detail, conv.weights, groups)

    def resample(self, x: int, edge: Edge, place: int) -> int:
        if edge.up:
            return self.conv(x, edge.up, f"{edge.name}: transposed convolution", (0, place, 0))
        if edge.shift > 0:
            return self.up_sample(x, edge.shift, f"{edge.name}: up-sampling")
        if edge.shift == 0:
            return x
        channels, height, width = self.shapes[x]
        factor, more = 1 << -edge.shift, (1 << -edge.shift) - 1 if edge.skip else 0
        shape = channels, (height + more) // factor, (width + more) // factor
        return self.call("pool", f"{edge.name}: max-pooling", (x,), shape)

    def up_sample(self, x: int, shift: int, where: str) -> int:
        channels, height, width = self.shapes[x]
        return self.call("up_sample", where, (x,), (channels, height << shift, width << shift))

    def crop_all(self, maps: list[int], where: str) -> list[int]:
        height, width = min(self.shapes[x][1] for x in maps), min(self.shapes[x][2] for x in maps)
        return [self.crop(x, height, width, where) for x in maps]

    def crop(self, x: int, height: int, width: int, where: str) -> int:
        """Slice rows, then columns; a slice that takes everything is left out, as Python's indexing does."""
        channels, rows, columns = self.shapes[x]
        if rows > height:
            x = self.call("slice", f"{where}: crop", (x,), (channels, height, columns))
        return x if columns == width else self.call("slice", f"{where}: crop", (x,), (channels, height, width))

    def merge(self, maps: list[int], how: str, where: str) -> int:
        cropped = self.crop_all(maps, where)
        if len(cropped) == 1:
            return cropped[0]
        channels, height, width = self.shapes[cropped[0]]
        if how == "concat":
            channels = sum(self.shapes[x][0] for x in cropped)
            return self.call("cat", f"{where}: concatenation", tuple(cropped), (channels, height, width))
        result = self.call("add", f"{where}: sum", (cropped[0], cropped[1]), (channels, height, width))
        for other in cropped[2:]:
            result = self.call("add_", f"{where}: sum", (result, other), (channels, height, width))
        return result

    def gate(self, gate: Gate, x: int, signal: int, where: str, place: int) -> int:
        x, signal = self.crop_all([x, signal], where)
        left = self.conv(x, gate.x, f"{where}: gate, map", (0, place, 1))
        right = self.conv(signal, gate.signal, f"{where}: gate, signal", (0, place, 2))
        joint = self.call("add", f"{where}: gate, sum", (left, right), self.shapes[left])
        joint = self.call("relu", f"{where}: gate, sum", (joint,), self.shapes[joint])
        psi = self.conv(joint, gate.psi, f"{where}: gate, coefficients", (0, place, 3))
        weight = self.call("sigmoid", f"{where}: gate, coefficients", (psi,), self.shapes[psi])
        gated = self.call("weigh", f"{where}: gate", (x, weight), self.shapes[x], (self.shapes[x][0] > 1,))
        self.hold(x, signal, joint)
        return gated

    def convolve(self, x: int, edge: Edge, place: int, joined: int | None) -> int:
        """Convolve and project; `joined` is the map that the op which also up-samples was called with."""
        if edge.conv:
            x = self.conv(x, edge.conv, f"{edge.name}: convolution", (0, place, 4), valid=self.valid)
            if joined is not None:
                self.hold(joined)
        if edge.project:
            x = self.conv(x, edge.project, f"{edge.name}: projection", (0, place, 5))
        return x

    def node(self, node: Node, maps: dict[str, int], places: tuple[int, int]) -> int:
        first_edge, number = places
        signal = None
        deeper = node.deeper
        if deeper and any(edge.gate for edge in node.inputs):
            signal = self.resample(maps[deeper.source], deeper, first_edge + node.inputs.index(deeper))
        arrivals = []
        for place, edge in enumerate(node.inputs, first_edge):
            source, joined = maps[edge.source], None
            if signal is not None and edge is deeper:
                x = signal
            else:
                x = self.resample(source, edge, place)
                joined = source if edge.shift > 0 and not edge.gate else None
            if edge.gate and signal is not None:
                x = self.gate(edge.gate, x, signal, edge.name, place)
            arrivals.append(self.convolve(x, edge, place, joined))
        x = self.merge(arrivals, node.merge, node.name)
        for index, conv in enumerate(node.convs):
            x = self.conv(x, conv, f"{node.name}: convolution {index + 1}", (1, number, index), valid=self.valid)
        return x

    def head(self, head: Head, x: int, number: int) -> int:
        where = f"head of {head.node}"
        logits = self.conv(x, head.conv, where, (2, number, 0), valid=self.valid)
        if head.shift:
            logits = self.up_sample(logits, head.shift, f"{where}: up-sampling")
        return logits

    def classify(self, head: Head, x: int, *, training: bool) -> int:
        where = f"classifier on {head.node}"
        dropped = self.call("dropout", where, (x,), self.shapes[x]) if training else x
        scores = self.conv(dropped, head.conv, where, (3, 0, 0))
        result = self.call("amax", where, (scores,), (self.shapes[scores][0], 1, 1))
        self.hold(x)
        return result

    def mask(self, logits: list[int], class_logits: int) -> list[int]:
        present = self.call("present", "mask", (class_logits, logits[0]), (1, 1, 1))
        result = []
        for each in logits:
            probability = self.call("sigmoid", "mask", (each,), self.shapes[each])
            result.append(self.call("weigh", "mask", (probability, present), self.shapes[each], (False,)))
        self.hold(present, *logits)
        return result


def schedule(graph: SkipGraph, height: int, width: int, *, training: bool) -> Schedule:
    """Follow one forward pass on images of height x width pixels; ValueError where a map would vanish."""
    walk = _Walk(graph, height, width)
    maps, logits, class_logits, first_edge = {IMAGE: walk.image}, {}, None, 0
    heads = {head.node: (number, head) for number, head in enumerate(graph.heads)}
    for number, node in enumerate(graph.nodes):
        maps[node.name] = walk.node(node, maps, (first_edge, number))
        first_edge += len(node.inputs)
        if node.name in heads:
            place, head = heads[node.name]
            logits[node.name] = walk.head(head, maps[node.name], place)
        if graph.classifier and graph.classifier.node == node.name:
            class_logits = walk.classify(graph.classifier, maps[node.name], training=training)
    outputs = walk.crop_all([logits[head.node] for head in graph.heads], "heads")
    if class_logits is not None:
        outputs = walk.mask(outputs, class_logits)
    _, rows, columns = walk.shapes[outputs[0]]
    walk.numbers.append((rows * columns, 1, 0, 0, 1))
    return Schedule(tuple(walk.calls), tuple(outputs), class_logits, walk.numbers)
