"""Every pass over memory of the eager program: what a step multiplies, reads and writes, operator by operator.

Follows the executor (`unet_models.network`) on its reference ops: each operator that PyTorch runs as a kernel of its
own is one pass, in the order in which it runs. A pass moves every map that it reads once, every map that it writes
once, and its weights once; a view (a crop, the slices of a concatenation's gradient) moves nothing. Left out: vectors
of one value per channel (bias, scale, shift, statistics), what a library copies or tries inside an operator, and what
a loss or an optimizer moves beyond the least. Arithmetic alone; needs no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from skipcost.bench.cases.case import Case
from skipcost.unet_models import geometry
from skipcost.unet_models.topology import IMAGE, Conv, Edge, Head, Node

MAP_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "amp-bf16": 2, "amp-fp16": 2}
INDEX_BYTES = 8  # of a class label, and of where max-pool found each maximum, which it writes at inference too
FULL_BYTES = 4  # of a value in the loss, and of a parameter under mixed precision: fp32
OPTIMIZER_VALUES = {"adamw": 7, "sgd": 5}  # per parameter: itself, gradient and state read, itself and state written

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pass:
    """One operator of a step on the whole batch: `macs` multiply-adds, `bytes` read and written.

    `kind`: convolution, transposed convolution, norm, relu, merge, pool, up-sampling, gate, output, gradient, cast,
    loss or optimizer.
    """

    name: str
    kind: str
    macs: int
    bytes: int


def passes(case: Case) -> tuple[Pass, ...]:
    """Every pass of one steady step of a case, backend=eager, in order: forward, and in training backward, optimizer.

    ValueError, as from geometry, where the size leaves a map without a pixel.
    """
    step = _Step(case)
    step.forward()
    if not step.trains:
        return tuple(step.done)
    step.loss()
    return (*step.done, *reversed(step.later), *step.update())


class _Step:
    """One step being listed: `done` has what ran, `later` the backward passes, in the order of the forward ones."""

    def __init__(self, case: Case) -> None:
        self.case, self.graph = case, case.graph()
        self.rows, self.columns = geometry.sizes(self.graph, case.height, case.width)
        self.value = MAP_BYTES[case.precision]
        self.mixed = case.precision.startswith("amp-")
        self.trains = case.mode == "training"
        self.done: list[Pass] = []
        self.later: list[Pass] = []
        self.readers: Counter[str] = Counter()

    def values(self, channels: int, size: Size) -> int:
        """How many values a map of the batch has."""
        return self.case.batch * channels * size[0] * size[1]

    def back(self, name: str, kind: str, macs: int, moved: int) -> None:
        """Add a pass of the backward half, which is listed from its end."""
        if self.trains:
            self.later.append(Pass(name, kind, macs, moved))

    def run(self, name: str, kind: str, values: int, back: int = 0, other: int = 0) -> None:
        """Add a pass over `values` values of maps, and its backward over `back`; `other` bytes move in both."""
        self.done.append(Pass(name, kind, 0, values * self.value + other))
        if back:
            self.back(f"backward of {name}", kind, 0, back * self.value + other)

    def read(self, source: str, values: int) -> None:
        """Note a reader of a map: the gradients that its readers return are added, from the second on."""
        self.readers[source] += 1
        if self.readers[source] > 1:
            self.back(f"gradients of {source}: sum", "gradient", 0, 3 * values * self.value)

    def crop(self, name: str, channels: int, full: Size, window: Size) -> None:
        """A crop is a view; its backward pass puts the gradient into zeros, once for columns and once for rows."""
        between = window[0], full[1]
        for what, small, large in (("rows", between, full), ("columns", window, between)):
            if small != large:
                moved = (self.values(channels, small) + self.values(channels, large)) * self.value
                self.back(f"backward of {name}: crop of {what}", "gradient", 0, moved)

    def convolve(
        self, name: str, conv: Conv, sizes: tuple[Size, Size], number: str = "", *, image: bool = False
    ) -> None:
        """A convolution from maps of one size to another's, its norm and its ReLU; an image gets no gradient."""
        arriving, leaving = sizes
        written = self.values(conv.out_channels, leaving)
        moved = (self.values(conv.in_channels, arriving) + written + conv.weights) * self.value
        macs = self.values(conv.weights, arriving if conv.transposed else leaving)
        what = f"{name}: {'transposed ' if conv.transposed else ''}convolution{number}"
        kind = "transposed convolution" if conv.transposed else "convolution"
        self.done.append(Pass(what, kind, macs, moved))
        for gradient in ("weights",) if image else ("weights", "input"):
            self.back(f"backward of {what}: {gradient}", kind, macs, moved)
        if conv.norm != "none":
            self.run(f"{name}: norm{number}", "norm", 2 * written, 3 * written)
        if conv.act:
            self.run(f"{name}: relu{number}", "relu", 2 * written, 3 * written)

    def forward(self) -> None:
        """The network, in the executor's order."""
        if self.mixed:
            image = self.values(self.graph.in_channels, (self.case.height, self.case.width))
            self.done.append(Pass("casts to 16 bits", "cast", 0, (image + self._weights()) * (FULL_BYTES + self.value)))
        for node in self.graph.nodes:
            self._edges(node)
            self._node(node)
            for head in self.graph.heads:
                if head.node == node.name:
                    self._head(head, node)
            if self.graph.classifier and self.graph.classifier.node == node.name:
                self._classify(self.graph.classifier, node)
        if self.graph.classifier:
            logits = self.values(self.case.spec.classes, self._output())
            for head in self.graph.heads:
                self.run(f"head of {head.node}: sigmoid", "output", 2 * logits, 3 * logits)
                mask = 2 * logits + self.case.batch  # one value an image
                self.run(f"head of {head.node}: mask", "output", mask, mask)

    def _weights(self) -> int:
        return sum(conv.weights for conv in self.graph.convs())

    def _output(self) -> Size:
        return self.rows.output, self.columns.output

    def _size(self, name: str) -> Size:
        return self.rows.nodes[name], self.columns.nodes[name]

    def _along(self, edge: Edge, step: str) -> Size:
        """A map's size on an edge: "source", "resampled", "gated", "convolved" or "merged"."""
        return getattr(self.rows.edges[edge.name], step), getattr(self.columns.edges[edge.name], step)

    def _edges(self, node: Node) -> None:
        """The map that steers the gates of a node is up-sampled before anything else, once for all."""
        signal = node.deeper if any(edge.gate for edge in node.inputs) else None
        if signal:
            self._resample(signal)
        for edge in node.inputs:
            if edge is signal:
                self.read(
                    f"{edge.name}: up-sampled", self.values(edge.resampled_channels, self._along(edge, "resampled"))
                )
            else:
                self._resample(edge)
            if edge.gate and signal:
                self._gate(edge, signal)
            gated, convolved = self._along(edge, "gated"), self._along(edge, "convolved")
            if edge.conv:
                self.convolve(edge.name, edge.conv, (gated, convolved))
            if edge.project:
                self.convolve(f"{edge.name}: projection", edge.project, (convolved, convolved))
            self.crop(edge.name, edge.out_channels, convolved, self._along(edge, "merged"))

    def _resample(self, edge: Edge) -> None:
        source, resampled = self._along(edge, "source"), self._along(edge, "resampled")
        read, written = self.values(edge.in_channels, source), self.values(edge.resampled_channels, resampled)
        if edge.source != IMAGE:
            self.read(edge.source, read)
        if edge.up:
            self.convolve(edge.name, edge.up, (source, resampled))
        elif edge.shift > 0:
            self.run(f"{edge.name}: up-sampling", "up-sampling", read + written, read + written)
        elif edge.shift < 0:
            self.run(f"{edge.name}: pool", "pool", read + written, read + written, INDEX_BYTES * written)

    def _gate(self, edge: Edge, signal: Edge) -> None:
        """Oktay's gate: two 1x1 convolutions, their sum's ReLU, a third one, its sigmoid times the map."""
        assert edge.gate is not None
        size, full, name = self._along(edge, "gated"), self._along(signal, "resampled"), f"{edge.name}: gate"
        channels, inside = edge.resampled_channels, edge.gate.x.out_channels
        self.crop(name, channels, self._along(edge, "resampled"), size)
        self.read(f"{signal.name}: up-sampled", self.values(signal.resampled_channels, full))
        self.crop(f"{name}'s signal", signal.resampled_channels, full, size)
        whole, joint, weight = (self.values(count, size) for count in (channels, inside, 1))
        self.read(f"{name}'s map", whole)
        self.convolve(f"{name}: map", edge.gate.x, (size, size))
        self.convolve(f"{name}: signal", edge.gate.signal, (size, size))
        self.run(f"{name}: sum", "gate", 3 * joint)
        self.run(f"{name}: relu", "gate", 2 * joint, 3 * joint)
        self.convolve(f"{name}: psi", edge.gate.psi, (size, size))
        self.run(f"{name}: sigmoid", "gate", 2 * weight, 3 * weight)
        self.read(f"{name}'s map", whole)
        self.run(f"{name}: product", "gate", 2 * whole + weight, 6 * whole + 2 * weight)

    def _node(self, node: Node) -> None:
        """Merge the arriving maps and run the node's convolutions."""
        size = self._along(node.inputs[0], "merged")
        arriving = self.values(sum(edge.out_channels for edge in node.inputs), size)
        if node.merge == "sum":
            for number in range(1, len(node.inputs)):
                self.run(f"{node.name}: sum {number}", "merge", 3 * arriving // len(node.inputs))
        elif len(node.inputs) > 1:
            self.run(f"{node.name}: concatenation", "merge", 2 * arriving)
        lost = 2 if self.graph.padding == "valid" else 0
        for number, conv in enumerate(node.convs, 1):
            leaving = size[0] - lost, size[1] - lost
            image = number == 1 and node.inputs[0].source == IMAGE
            self.convolve(node.name, conv, (size, leaving), f" {number}", image=image)
            size = leaving

    def _head(self, head: Head, node: Node) -> None:
        name, channels = f"head of {node.name}", head.conv.out_channels
        full = self.rows.heads[node.name], self.columns.heads[node.name]
        small = full[0] >> head.shift, full[1] >> head.shift
        self.read(node.name, self.values(node.width, self._size(node.name)))
        self.convolve(name, head.conv, (self._size(node.name), small))
        if head.shift:
            moved = self.values(channels, small) + self.values(channels, full)
            self.run(f"{name}: up-sampling", "up-sampling", moved, moved)
        self.crop(name, channels, full, self._output())

    def _classify(self, head: Head, node: Node) -> None:
        """Dropout in training, a 1x1 convolution, the maximum of each map."""
        name, size = f"classifier on {node.name}", self._size(node.name)
        whole, scores = self.values(node.width, size), self.values(head.conv.out_channels, size)
        self.read(node.name, whole)
        if self.trains:
            self.run(f"{name}: dropout", "output", 2 * whole, 2 * whole, other=whole)  # a byte of mask for each value
        self.convolve(name, head.conv, (size, size))
        self.run(f"{name}: maximum", "output", scores, 2 * scores)

    def loss(self) -> None:
        """The least that a loss moves: logits and labels to a map in fp32, and that with the labels to a gradient."""
        size = self._output()
        label = FULL_BYTES if self.case.spec.classes == 1 else INDEX_BYTES
        moved = self.values(self.case.spec.classes, size) * (self.value + FULL_BYTES) + self.values(1, size) * label
        for head in self.graph.heads:
            self.done.append(Pass(f"loss of {head.node}", "loss", 0, moved))
            self.back(f"backward of loss of {head.node}", "loss", 0, moved)

    def update(self) -> tuple[Pass, ...]:
        """The optimizer, after gradients are cast to its precision under mixed precision."""
        parameter = FULL_BYTES if self.mixed else self.value
        moved = self.graph.params() * OPTIMIZER_VALUES[self.case.optimizer] * parameter
        casts = Pass("casts of gradients", "cast", 0, self._weights() * (FULL_BYTES + self.value))
        return (*([casts] if self.mixed else []), Pass("optimizer", "optimizer", 0, moved))
