"""What the executor does to a graph, call by call, with the sizes: `unet_models/network.py` without tensors.

The calls say what is done to what and are the same for all widths and image sizes that need the same steps; the
numbers beside them are this network's. Maps arrive, are merged and are dropped in the executor's order; a `hold` stands
where its Python frames keep a map longer than its last reader. With a `rule` they are those of `backend=rewritten`
(kernels/rewriting/low.py, kernels/low_resolution/tap_first.py, kernels/ops/relu_concat.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

from skipcost.bench.memory.calls import Call, Calls, ConvDetail, Place
from skipcost.bench.memory.low_resolution import Joint, Rule, at_low, fold, is_folded, is_low
from skipcost.unet_models import geometry
from skipcost.unet_models.topology import IMAGE, Conv, Edge, Gate, Head, Node, SkipGraph


class Schedule(NamedTuple):
    """The calls of one forward pass, the results that the network returns, and the numbers of each call's result.

    One row more than there are calls has the numbers of an output of one channel, which targets have.
    """

    calls: tuple[Call, ...]
    logits: tuple[int, ...]
    class_logits: int | None
    numbers: list[tuple[int, int, int, int, int]]  # elements an image, channels, weights, groups of its norm, 1


class _Walk(Calls):
    """The walk over the graph; with a `rule` that of `backend=rewritten`."""

    def __init__(self, graph: SkipGraph, height: int, width: int, rule: Rule | None) -> None:
        super().__init__(graph, height, width)
        self.rule = rule

    def conv(self, x: int, conv: Conv, where: str, place: Place, *, valid: bool = False) -> int:
        """Convolve, normalise and activate; with the norm in the weights where the rule says so."""
        _, height, width = self.shapes[x]
        lost = conv.kernel - 1 if valid else 0
        shape = conv.out_channels, height - lost, width - lost
        if conv.transposed or not (self.rule and is_folded(conv, shape, self.rule)):
            return super().conv(x, conv, where, place, valid=valid)
        detail = ConvDetail(conv.bias, conv.norm, conv.act, flat=False, first=False, place=place)
        weight = self.call("weight", where, (), (conv.out_channels, 1, 1), detail, conv.weights)
        layer = fold(self, conv, weight, where)
        result = self.call("convolve", where, (x, *layer), shape)
        if conv.act:
            result = self.call("relu", where, (result,), shape)
        self.hold(*layer)
        return result

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

    def gate(self, gate: Gate, x: int, signal: int, where: str, place: int) -> int:
        x, signal = self.crop_all([x, signal], where)
        conv = super().conv  # the reference's, whatever the rule
        left = conv(x, gate.x, f"{where}: gate, map", (0, place, 1))
        right = conv(signal, gate.signal, f"{where}: gate, signal", (0, place, 2))
        joint = self.call("add", f"{where}: gate, sum", (left, right), self.shapes[left])
        joint = self.call("relu", f"{where}: gate, sum", (joint,), self.shapes[joint])
        psi = conv(joint, gate.psi, f"{where}: gate, coefficients", (0, place, 3))
        weight = self.call("sigmoid", f"{where}: gate, coefficients", (psi,), self.shapes[psi])
        gated = self.call("weigh", f"{where}: gate", (x, weight), self.shapes[x], (self.shapes[x][0] > 1,))
        self.hold(x, signal, joint)
        return gated

    def carry(self, source: int, edge: Edge, place: int, signal: int | None) -> int:
        """Take a map along its edge up to the merge; an op that up-samples and convolves holds the map it was given."""
        joined = Joint((), source, edge, edge.conv) if edge.conv and edge.shift > 0 and not edge.gate else None
        if joined and self.rule and is_low(self, joined, self.rule):
            x = at_low(self, joined, self.rule, f"{edge.name}: convolution", ((0, place, 4), (0, place, 0)))
        else:
            x = self.resample(source, edge, place)
            if edge.gate and signal is not None:
                x = self.gate(edge.gate, x, signal, edge.name, place)
            x = self.convolve(x, edge, place)
            if joined:
                self.hold(source)
        return self.project(x, edge, place)

    def convolve(self, x: int, edge: Edge, place: int) -> int:
        where = f"{edge.name}: convolution"
        return self.conv(x, edge.conv, where, (0, place, 4), valid=self.valid) if edge.conv else x

    def project(self, x: int, edge: Edge, place: int) -> int:
        return self.conv(x, edge.project, f"{edge.name}: projection", (0, place, 5)) if edge.project else x

    def node(self, node: Node, maps: dict[str, int], places: tuple[int, int]) -> int:
        first_edge, number = places
        if self.rule is not None and node.concatenates_relus:
            merged = self.relu_concat(node, maps, first_edge, gradients=self.rule.gradients)
            x = self.conv(merged, node.convs[0], f"{node.name}: convolution 1", (1, number, 0), valid=self.valid)
        else:
            x = self.enter(node, self.arrivals(node, maps, first_edge), places)
        for index, conv in enumerate(node.convs[1:], 1):
            x = self.conv(x, conv, f"{node.name}: convolution {index + 1}", (1, number, index), valid=self.valid)
        return x

    def arrivals(self, node: Node, maps: dict[str, int], first_edge: int) -> list[int]:
        signal = None
        deeper = node.deeper
        if deeper and any(edge.gate for edge in node.inputs):
            signal = self.resample(maps[deeper.source], deeper, first_edge + node.inputs.index(deeper))
        raw, arrivals = self.rule is not None and _joins(node), []
        for place, edge in enumerate(node.inputs, first_edge):
            if signal is not None and edge is deeper:
                arrivals.append(self.project(self.convolve(signal, edge, place), edge, place))
            elif raw and edge is deeper:
                arrivals.append(maps[edge.source])
            else:
                arrivals.append(self.carry(maps[edge.source], edge, place, signal))
        return arrivals

    def relu_concat(self, node: Node, maps: dict[str, int], first_edge: int, *, gradients: bool) -> int:
        """What kernels/ops/relu_concat.py does: ReLU into one buffer, of all maps, or of each as it arrives."""
        where, sides = (
            f"{node.name}: concatenation",
            zip(*(self.arriving(maps, edge) for edge in node.inputs), strict=True),
        )
        height, width = map(min, sides)
        shape, buffer = (node.convs[0].in_channels, height, width), None
        arrived, cropped = [], []
        for place, edge in enumerate(node.inputs, first_edge):
            plain = replace(edge, conv=replace(cast("Conv", edge.conv), act=False))
            arrived.append(self.carry(maps[edge.source], plain, place, None))
            cropped.append(self.crop(arrived[-1], height, width, where))
            if not gradients:
                buffer = self.call("room", where, (cropped[-1],), shape) if buffer is None else buffer
                buffer = self.call("relu_into", where, (buffer, cropped[-1]), shape)
        return self.call("relu_concat", where, (*arrived, *cropped), shape) if buffer is None else buffer

    def arriving(self, maps: dict[str, int], edge: Edge) -> tuple[int, int]:
        """Height and width with which a map comes out of its edge."""
        _, height, width = self.shapes[maps[edge.source]]
        return geometry.arrival(height, edge, valid=self.valid), geometry.arrival(width, edge, valid=self.valid)

    def enter(self, node: Node, arrivals: list[int], places: tuple[int, int]) -> int:
        """Merge and run the node's first convolution; where that is one op, the last map comes as it is."""
        conv, where, place = node.convs[0], f"{node.name}: convolution 1", (1, places[1], 0)
        if not self.rule or not _joins(node):
            return self.conv(self.merge(arrivals, node.merge, node.name), conv, where, place, valid=self.valid)
        (*others, x), edge, last = arrivals, node.inputs[-1], places[0] + len(node.inputs) - 1
        joint = Joint(tuple(others), x, edge, conv)
        if is_low(self, joint, self.rule):
            return at_low(self, joint, self.rule, where, (place, (0, last, 0)))
        up = self.resample(x, edge, last)
        merged = self.merge([*others, up], node.merge, node.name)
        return self.conv(merged, conv, where, place, valid=self.valid)

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


def _joins(node: Node) -> bool:
    """Whether up-sampling, concatenating and the first convolution are one op (`up_concat_conv`, `merge_conv`)."""
    edge = node.inputs[-1]
    plain = edge is node.deeper and not (edge.conv or edge.project or any(each.gate for each in node.inputs))
    return plain and node.merge == "concat"


def schedule(
    graph: SkipGraph, height: int, width: int, *, training: bool, rule: Rule | None = None
) -> Schedule:  # fmt: skip
    """Follow one forward pass on images of height x width pixels; ValueError where a map would vanish.

    rule: that of `backend=rewritten`; without one nothing is rewritten, as with eager.
    """
    walk = _Walk(graph, height, width, rule)
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
