"""A step as data: which storage is made when, who reads it, what autograd keeps for the way back.

A `Tape` is written from front to back, as PyTorch would run: operators make storages, a storage lives until the last
line that reads it. Sizes stay symbols (a column of a table of numbers, times bytes, times the batch or not), so one
tape serves every network of the same structure. Which operators there are is `operators`' business, in which order a
network runs them is `schedule`'s. At the end is what all operators work on: what of a case matters to them (`Setting`),
a layer's weights, a forward pass under way, what autocast casts.

Source of the rules of the backward pass: PyTorch 2.13, torch/csrc/autograd: engine.cpp (nodes run in the reverse order
of their making), input_buffer.cpp (when gradients are added in place), functions/accumulate_grad.h (a parameter takes
over its first gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from skipcost.bench.memory.schedule import Call, ConvDetail

MAP, CHANNELS, WEIGHTS, GROUPS, ONE = range(5)  # columns of the table of numbers
FLOAT, HALF, LONG, BOOL = 4, 2, 8, 1  # bytes an element, standing for the element type
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


Given = Sequence["Value | None"]  # gradients, one for each input
Backward = Callable[["Tape", Value], Given]


@dataclass(eq=False, slots=True)
class Node:
    """One step of the backward pass: takes the gradient of its result, returns one for each of `inputs`."""

    where: str
    inputs: tuple[Value, ...]
    saved: tuple[Value, ...]
    backward: Backward
    gradient: Value | None = None


@dataclass(slots=True)
class Tape:
    """What was recorded so far; a line is one operator, told by its number.

    `traced` records what a TorchDispatchMode sees in place of what runs without one: under a mode autograd adds
    gradients out of place. `made` has the storages in the order in which lines make them, `begins` the line of each.
    `ends` has by storage the last line that makes or reads it.
    """

    traced: bool = False
    replays_views: bool = False  # fake tensors replay a view where others take it by its strides
    recording: bool = True  # whether autograd keeps what the backward pass needs
    where: str = ""
    sizes: list[Size] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    moments: list[tuple[int, str]] = field(default_factory=list)  # from which line on what runs
    lines: int = 0
    nodes: list[Node] = field(default_factory=list)
    gradients: dict[int, Value] = field(default_factory=dict)  # by the parameter's storage

    def make(self, size: Size, name: str = "", kind: str = "temporary") -> Value:
        """Return a tensor with a storage of its own; it begins with the line that makes it."""
        self.sizes.append(size)
        self.names.append(name)
        self.kinds.append(kind)
        self.ends.append(0)
        return Value(len(self.ends) - 1, size)

    def run(self, makes: Sequence[Value], reads: Sequence[Value] = ()) -> None:
        """Record an operator."""
        line, ends = self.lines, self.ends
        self.lines += 1
        if not self.moments or self.moments[-1][1] != self.where:
            self.moments.append((line, self.where))
        for value in makes:
            self.made.append(value.storage)
            self.begins.append(line)
            ends[value.storage] = line
        for value in reads:
            ends[value.storage] = line

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

    def again(self, line: int, storage: int) -> None:
        """Record all lines from `line` on once more, with storages of their own in place of those from `storage` on.

        An optimizer's are made once; the gradients that parameters have got end where the second time begins.
        """
        shift = self.lines - line
        copied = [each for each in range(storage, len(self.ends)) if self.kinds[each] != "optimizer"]
        number = dict(zip(copied, range(len(self.ends), len(self.ends) + len(copied)), strict=True))
        once = [(at + shift, number[each]) for at, each in zip(self.begins, self.made, strict=True) if each in number]
        self.begins += [at for at, _ in once]
        self.made += [each for _, each in once]
        self.moments += [(at + shift, where) for at, where in self.moments if at >= line]
        self.ends += [self.ends[each] + shift for each in copied]
        self.sizes += [self.sizes[each] for each in copied]
        self.names += [self.names[each] for each in copied]
        self.kinds += [self.kinds[each] for each in copied]
        for parameter, gradient in self.gradients.items():
            self.ends[gradient.storage] = self.lines
            self.gradients[parameter] = Value(number[gradient.storage], gradient.size)
        self.lines += shift

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


class Setting(NamedTuple):
    """What of a case, besides its network, decides which operators run."""

    training: bool
    item: int  # of parameters and inputs
    autocast: bool
    device: str
    loss: str
    optimizer: str
    scaled: bool  # a gradient scaler is at work
    channels_last: bool
    one_image: bool


@dataclass(slots=True)
class Weights:
    """The parameters of a convolution and its norm; None where there is none."""

    weight: Value
    bias: Value | None
    scale: Value | None
    shift: Value | None
    place: tuple[int, int, int]

    def present(self) -> list[Value]:
        """All there are, in the order in which they are registered."""
        return [value for value in (self.weight, self.bias, self.scale, self.shift) if value]


@dataclass(slots=True)
class Forward:
    """A forward pass under way: the tape, the weights by their call, and the results of the calls so far."""

    tape: Tape
    setting: Setting
    weights: dict[int, Weights]
    values: list[Value] = field(default_factory=list)
    cached: list[Value] = field(default_factory=list)  # autocast's copies of the parameters
    kept: dict[int, tuple[Value, ...]] = field(default_factory=dict)  # what a call made in the first step, for all

    @property
    def compute_item(self) -> int:
        """Bytes of what a convolution returns."""
        return HALF if self.setting.autocast else self.setting.item


def cast_to(tape: Tape, value: Value, item: int, kind: str = "map") -> Value:
    """Return the value in another type; itself where it has it."""
    if value.item == item:
        return value
    copy = tape.result(value.size.typed(item), (value,), f"{tape.names[value.storage]}, cast", kind)

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(value.size, (gradient,), kind="map gradient"),)

    return tape.differentiate(copy, (value,), backward)


def cast_parameter(run: Forward, value: Value) -> Value:
    """Return the parameter as autocast hands it to an operator; while training, a copy is kept until autocast ends."""
    if not run.setting.autocast:
        return value
    copy = cast_to(run.tape, value, HALF, "temporary")
    if run.setting.training:
        run.cached.append(copy)
    return copy


def make_weights(tape: Tape, setting: Setting, row: int, call: Call) -> tuple[Weights, list[Value]]:
    """Make the parameters of a call that has a layer's, and the buffers of its norm."""
    detail = cast("ConvDetail", call.detail)

    def parameter(column: int, name: str) -> Value:
        made = tape.make(Size(row, column, setting.item, per_image=False), f"{call.where}: {name}", "parameter")
        made.parameter = True
        return made

    weight = parameter(WEIGHTS, "weight")
    bias = parameter(CHANNELS, "bias") if detail.bias else None
    normed = detail.norm != "none"
    scale, shift = (parameter(CHANNELS, "scale"), parameter(CHANNELS, "shift")) if normed else (None, None)
    buffers = []
    if detail.norm == "batch":
        for name, column, item in (
            ("mean", CHANNELS, setting.item),
            ("variance", CHANNELS, setting.item),
            ("", ONE, LONG),
        ):
            size = Size(row, column, item, per_image=False)
            buffers.append(tape.make(size, f"{call.where}: running {name or 'count'}", "buffer"))
    return Weights(weight, bias, scale, shift, detail.place), buffers
