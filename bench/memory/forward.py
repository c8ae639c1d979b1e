"""A forward pass under way on a tape: what of a case matters to it, its weights, and what autocast casts.

The operators themselves are in `derivatives`, norms in `normalising`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from skipcost.bench.memory.calls import CHANNELS, ONE, WEIGHTS, Call, ConvDetail
from skipcost.bench.memory.tape import Size, Tape, Value

FLOAT, HALF, LONG, BOOL = 4, 2, 8, 1  # bytes an element, standing for the element type
Given = Sequence[Value | None]


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
