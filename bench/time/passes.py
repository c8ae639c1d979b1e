"""Every pass over memory of the eager program: what a step multiplies, reads and writes, operator by operator.

A fold over the network's program on the reference ops: each operator that PyTorch runs as a kernel of its own is one
pass, in the order in which it runs. A pass moves every map that it reads once, every map that it writes
once, and its weights once; a view (a crop, the slices of a concatenation's gradient) moves nothing. Left out: vectors
of one value per channel (bias, scale, shift, statistics), what a library copies or tries inside an operator, and what
a loss or an optimizer moves beyond the least. Arithmetic alone; needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from skipcost.bench.cases.case import Case
from skipcost.kernels.devices import VALUE_BYTES
from skipcost.unet_models.names import map_name, pass_name
from skipcost.unet_models.program import MASK, Op, lower, near
from skipcost.unet_models.sizes import Shape, shapes

INDEX_BYTES = 8  # of a class label, and of where max-pool found each maximum, which it writes at inference too
FULL_BYTES = 4  # of a value in the loss, and of a parameter under mixed precision: fp32
OPTIMIZER_VALUES = {"adamw": 7, "sgd": 5}  # per parameter: itself, gradient and state read, itself and state written


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

    ValueError where the size leaves a map without a pixel.
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
        self.case, self.graph, self.program = case, case.graph(), lower(case.graph())
        self.made = shapes(self.program, (case.height, case.width))
        self.value = VALUE_BYTES[case.precision]
        self.mixed = case.precision.startswith("amp-")
        self.trains = case.mode == "training"
        self.done: list[Pass] = []
        self.later: list[Pass] = []
        self.readers: Counter[int] = Counter()

    def values(self, shape: Shape) -> int:
        """How many values a map of the batch has."""
        return self.case.batch * math.prod(shape)

    def back(self, name: str, kind: str, macs: int, moved: int) -> None:
        """Add a pass of the backward half, which is listed from its end."""
        if self.trains:
            self.later.append(Pass(name, kind, macs, moved))

    def run(self, name: str, kind: str, values: int, back: int = 0, other: int = 0) -> None:
        """Add a pass over `values` values of maps, and its backward over `back`; `other` bytes move in both."""
        self.done.append(Pass(name, kind, 0, values * self.value + other))
        if back:
            self.back(f"backward of {name}", kind, 0, back * self.value + other)

    def read(self, number: int) -> None:
        """Note a reader of a map: the gradients that its readers return are added, from the second on."""
        self.readers[number] += 1
        if self.readers[number] > 1:
            name = map_name(self.program.ops[number])
            self.back(f"gradients of {name}: sum", "gradient", 0, 3 * self.values(self.made[number]) * self.value)

    def crop(self, name: str, whole: Shape, window: Shape) -> None:
        """A crop is a view; its backward pass puts the gradient into zeros, once for columns and once for rows."""
        channels, height, width = whole
        between = channels, window[1], width
        for what, small, large in (
            ("rows", between, (channels, height, width)),
            ("columns", (channels, *window[1:]), between),
        ):
            if small != large:
                moved = (self.values(small) + self.values(large)) * self.value
                self.back(f"backward of {name}: crop of {what}", "gradient", 0, moved)

    def forward(self) -> None:
        """The network, in the program's order."""
        if self.mixed:
            image = self.values(self.made[0])
            self.done.append(Pass("casts to 16 bits", "cast", 0, (image + self._weights()) * (FULL_BYTES + self.value)))
        for number, op in enumerate(self.program.ops[1:], 1):
            for read in near(op):
                if self.program.ops[read].kind not in ("image", "present"):  # which have no gradient
                    self.read(read)
            PASSES[op.kind](self, op, number)

    def _weights(self) -> int:
        return sum(conv.weights for conv in self.graph.convs())

    def _output(self) -> Shape:
        return self.made[self.program.outputs[0]]

    def convolve(self, op: Op, number: int) -> None:
        """A convolution; an image gets no gradient."""
        assert op.conv is not None
        (read,) = op.reads
        arriving, leaving = self.made[read], self.made[number]
        moved = (self.values(arriving) + self.values(leaving) + op.conv.weights) * self.value
        at = arriving if op.conv.transposed else leaving
        macs = self.values((op.conv.weights, *at[1:]))
        what, kind = pass_name(op), "transposed convolution" if op.conv.transposed else "convolution"
        self.done.append(Pass(what, kind, macs, moved))
        for gradient in ("weights", "input") if read else ("weights",):
            self.back(f"backward of {what}: {gradient}", kind, macs, moved)

    def in_place(self, op: Op, number: int) -> None:
        """A norm or a ReLU: reads and writes a map; backwards it reads the gradient, too."""
        written = self.values(self.made[number])
        kind = "gate" if op.part == "gate" else op.kind
        self.run(pass_name(op), kind, 2 * written, 3 * written)

    def sigmoid(self, op: Op, number: int) -> None:
        values = self.values(self.made[number])
        kind = "output" if op.where == MASK else "gate"
        self.run(self._name(op), kind, 2 * values, 3 * values)

    def multiply(self, op: Op, _number: int) -> None:
        """By a gate's weight for every pixel, whose gradient is summed up, or by a mask's for every image."""
        whole, weight = (self.values(self.made[read]) for read in op.reads)
        if op.where == MASK:
            self.run(self._name(op), "output", 2 * whole + weight, 2 * whole + weight)
        else:
            self.run(pass_name(op), "gate", 2 * whole + weight, 6 * whole + 2 * weight)

    def _name(self, op: Op) -> str:
        """The name of what is done to the maps of heads together, by the head whose map it is."""
        read = op
        while op.where in (MASK, "heads") and not read.where.startswith("head of"):
            read = self.program.ops[read.reads[0]]
        return pass_name(op._replace(where=read.where))

    def resample(self, op: Op, number: int) -> None:
        written = self.values(self.made[number])
        moved = self.values(self.made[op.reads[0]]) + written
        kind = "pool" if op.kind == "pool" else "up-sampling"
        self.run(pass_name(op), kind, moved, moved, INDEX_BYTES * written if op.kind == "pool" else 0)

    def cropped(self, op: Op, number: int) -> None:
        self.crop(self._name(op), self.made[op.reads[0]], self.made[number])

    def join(self, op: Op, number: int) -> None:
        """Concatenation is one pass, a sum as many as there are more than one map; their gradients are views."""
        result = self.made[number]
        for read in op.reads:
            source = self.program.ops[read]
            edge = source.where if "->" in source.where else f"{source.where}->{op.where}"
            self.crop(edge, self.made[read], result)
        if op.how == "concat":
            self.run(pass_name(op), "merge", 2 * self.values(result))
        for more in range(1, len(op.reads) if op.how != "concat" else 0):
            self.run(f"{pass_name(op)} {more}", "merge", 3 * self.values(result))

    def add(self, op: Op, number: int) -> None:
        self.run(pass_name(op), "gate", 3 * self.values(self.made[number]))

    def dropout(self, op: Op, number: int) -> None:
        """In training alone, with a byte of mask for each value."""
        whole = self.values(self.made[number])
        if self.trains:
            self.run(pass_name(op), "output", 2 * whole, 2 * whole, other=whole)

    def amax(self, op: Op, _number: int) -> None:
        scores = self.values(self.made[op.reads[0]])
        self.run(pass_name(op), "output", scores, 2 * scores)

    def nothing(self, _op: Op, _number: int) -> None:
        """A comparison of one value an image."""

    def loss(self) -> None:
        """The least that a loss moves: logits and labels to a map in fp32, and that with the labels to a gradient."""
        size = self._output()[1:]
        label = FULL_BYTES if self.case.spec.classes == 1 else INDEX_BYTES
        moved = self.values(self._output()) * (self.value + FULL_BYTES) + self.values((1, *size)) * label
        for head in self.graph.heads:
            self.done.append(Pass(f"loss of {head.node}", "loss", 0, moved))
            self.back(f"backward of loss of {head.node}", "loss", 0, moved)

    def update(self) -> tuple[Pass, ...]:
        """The optimizer, after gradients are cast to its precision under mixed precision."""
        parameter = FULL_BYTES if self.mixed else self.value
        moved = self.graph.params() * OPTIMIZER_VALUES[self.case.optimizer] * parameter
        casts = Pass("casts of gradients", "cast", 0, self._weights() * (FULL_BYTES + self.value))
        return (*([casts] if self.mixed else []), Pass("optimizer", "optimizer", 0, moved))


PASSES: dict[str, Callable[[_Step, Op, int], None]] = {
    "conv": _Step.convolve,
    "up_conv": _Step.convolve,
    "norm": _Step.in_place,
    "relu": _Step.in_place,
    "pool": _Step.resample,
    "up_sample": _Step.resample,
    "crop": _Step.cropped,
    "join": _Step.join,
    "add": _Step.add,
    "sigmoid": _Step.sigmoid,
    "multiply": _Step.multiply,
    "dropout": _Step.dropout,
    "amax": _Step.amax,
    "present": _Step.nothing,
}
