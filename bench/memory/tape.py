"""A step as data: which storage is made when, who reads it, what autograd keeps for the way back.

A `Tape` is written from front to back, as PyTorch would run: operators make storages, a storage lives until the last
line that reads it. Sizes stay symbols (a column of a table of numbers, times bytes, times the batch or not), so one
tape serves every network of the same structure. Which operators there are is `operators`' business, in which order a
network runs them is `schedule`'s; nothing here knows of networks.

Source of the rules of the backward pass: PyTorch 2.13, torch/csrc/autograd: engine.cpp (nodes run in the reverse order
of their making), input_buffer.cpp (when gradients are added in place), functions/accumulate_grad.h (a parameter takes
over its first gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAP, CHANNELS, WEIGHTS, GROUPS, ONE = range(5)  # columns of the table of numbers
KINDS = (
    "parameter",
    "buffer",
    "input",
    "optimizer",
    "gradient",  # of a parameter
    "saved",  # made by the forward pass and kept for the backward pass
    "map",  # made by the forward pass and dropped in it
    "map gradient",  # flows backwards
    "temporary",
)


class Size(NamedTuple):
    """Bytes as a symbol: the number in `row` and `column` of the network's table, times `item`, times the batch or not.

    `item` is bytes an element, and stands for the element type.
    """

    row: int
    column: int
    item: int
    per_image: bool

    def typed(self, item: int) -> Size:
        """As many elements of another type."""
        return self._replace(item=item)


@dataclass(eq=False, slots=True)
class Value:
    """A tensor on a storage. `whole` is false for a view, which holds on to the tensor that it is a view of."""

    storage: int
    size: Size
    whole: bool = True
    node: Node | None = None  # what made it, where it needs a gradient
    parameter: bool = False

    @property
    def item(self) -> int:
        """Bytes an element."""
        return self.size.item

    @property
    def needs_gradient(self) -> bool:
        """Whether the backward pass comes by here."""
        return self.parameter or self.node is not None


Backward = Callable[["Tape", Value], Sequence["Value | None"]]


@dataclass(eq=False, slots=True)
class Node:
    """One step of the backward pass: takes the gradient of its result, returns one for each of `inputs`."""

    where: str
    inputs: tuple[Value, ...]
    saved: tuple[Value, ...]
    backward: Backward
    gradient: Value | None = None


class Line(NamedTuple):
    """One operator: where in the network it runs, the storages that it makes and reads, in this order."""

    where: str
    makes: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass(slots=True)
class Tape:
    """What was recorded so far.

    `traced` records what a TorchDispatchMode sees in place of what runs without one: under a mode autograd adds
    gradients out of place.
    """

    traced: bool = False
    replays_views: bool = False  # fake tensors replay a view where others take it by its strides
    recording: bool = True  # whether autograd keeps what the backward pass needs
    where: str = ""
    sizes: list[Size] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    gradients: dict[int, Value] = field(default_factory=dict)  # by the parameter's storage

    def make(self, size: Size, name: str = "", kind: str = "temporary") -> Value:
        """Return a tensor with a storage of its own; it begins with the line that makes it."""
        self.sizes.append(size)
        self.names.append(name)
        self.kinds.append(kind)
        return Value(len(self.sizes) - 1, size)

    def run(self, makes: Sequence[Value], reads: Sequence[Value] = ()) -> None:
        """Record an operator."""
        line = Line(self.where, tuple([value.storage for value in makes]), tuple([value.storage for value in reads]))
        self.lines.append(line)

    def result(self, size: Size, reads: Sequence[Value], name: str = "", kind: str = "temporary") -> Value:
        """Record an operator with one result and return that."""
        made = self.make(size, name, kind)
        self.run((made,), reads)
        return made

    def hold(self, *values: Value) -> None:
        """Say that these are referred to up to here."""
        self.run((), values)

    def differentiate(
        self, result: Value, inputs: Sequence[Value], backward: Backward, saved: Sequence[Value] = ()
    ) -> Value:
        """Return `result` as autograd knows it: with a node, if any input needs a gradient."""
        if not (self.recording and any(value.needs_gradient for value in inputs)):
            return result
        for value in saved:
            if self.kinds[value.storage] == "map":
                self.kinds[value.storage] = "saved"
        node = Node(self.where, tuple(inputs), tuple(saved), backward)
        self.nodes.append(node)
        return Value(result.storage, result.size, result.whole, node)

    def run_backward(self, loss: Value) -> None:
        """Run the nodes, the last made first; what a node saved is dropped once it has run."""
        root = self.result(loss.size, (loss,), "gradient of the loss", "map gradient")
        if loss.node:
            loss.node.gradient = root
        for node in reversed(self.nodes):
            if node.gradient is None:
                continue
            self.where = f"backward of {node.where}"
            gradient, node.gradient = node.gradient, None
            given = list(node.backward(self, gradient))
            self.hold(gradient, *node.saved)
            for value, each in zip(node.inputs, given, strict=True):
                if each is not None and value.needs_gradient:
                    self._pass_on(value, each)
        self.nodes.clear()
        self.hold(root)

    def _pass_on(self, value: Value, gradient: Value) -> None:
        if value.parameter:
            self.kinds[gradient.storage] = "gradient"
            self.names[gradient.storage] = f"gradient of {self.names[value.storage]}"
            self.gradients[value.storage] = gradient
        elif value.node and value.node.gradient is None:
            value.node.gradient = gradient
        elif value.node and value.node.gradient:
            value.node.gradient = self._sum(value.node.gradient, gradient)

    def _sum(self, first: Value, second: Value) -> Value:
        """Add two gradients of one tensor; in place if nobody else refers to the first and it is no view."""
        holders = sum(node.gradient is not None and node.gradient.storage == first.storage for node in self.nodes)
        if not self.traced and first.whole and holders == 1:
            self.hold(first, second)
            return first
        return self.result(first.size, (first, second), self.names[second.storage], "map gradient")

    def ends(self) -> list[list[int]]:
        """For each line the storages that end after it; one that is never read ends with the line that makes it."""
        last = {storage: index for index, line in enumerate(self.lines) for storage in (*line.makes, *line.reads)}
        ends: list[list[int]] = [[] for _ in self.lines]
        for storage, index in last.items():
            ends[index].append(storage)
        return ends
