"""What convolutions at low resolution make and keep: the operators that `schedule` calls for them.

A call of kernels/low_resolution/tap_first.py is one operator. It keeps the small map and the weight; its backward pass
is one operator with two results, and a sum for the bias. What it makes and drops inside (tap maps of 18 rows, copies in
fp32, packed weights) is not modelled here: kernels/low_resolution/costs.py counts it. The weights of
kernels/low_resolution/composed.py are made by one operator in the first step, whose sums in float64 are not modelled
either. A call of kernels/ops/relu_concat.py makes one buffer, and keeps that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from skipcost.bench.memory.tape import CHANNELS, MAP, WEIGHTS, Forward, Given, Size, Tape, Value, cast_to

if TYPE_CHECKING:
    from skipcost.bench.memory.schedule import Call, ConvDetail


def cast_map(run: Forward, _row: int, _call: Call, x: Value) -> Value:
    """Bring a map to the type that convolutions compute in."""
    return cast_to(run.tape, x, run.compute_item)


def weight(run: Forward, row: int, call: Call) -> Value:
    """Bring a layer's weight to that type; unlike autocast's own casts, this copy is made in every call."""
    detail, own = cast("ConvDetail", call.detail), run.weights[row].weight
    if own.item == run.compute_item:
        return _laid(run, own) if detail.tap and not detail.narrow else own
    return cast_to(run.tape, own if detail.narrow else _laid(run, own), run.compute_item, "map")


def bias(run: Forward, _row: int, _call: Call, weight: Value) -> Value:
    """Bring the bias of the layer whose weight is given to that type."""
    return cast_to(run.tape, cast("Value", run.weights[weight.size.row].bias), run.compute_item, "map")


def scale(run: Forward, _row: int, _call: Call, weight: Value) -> Value:
    """What a norm multiplies by, of the layer whose weight is given: three steps, each with a result of its own."""
    size, tape = _vector(weight), run.tape
    above = tape.result(size, (weight,))
    root = tape.result(size, (above,))
    return tape.result(size, (root,))


def shift(run: Forward, _row: int, _call: Call, weight: Value, scale: Value) -> Value:
    """What it then adds, the layer's bias in it: three more."""
    size, tape = _vector(weight), run.tape
    centred = tape.result(size, (weight,))
    scaled = tape.result(size, (centred, scale))
    return tape.result(size, (scaled,))


def scaled(run: Forward, row: int, call: Call, weight: Value, scale: Value) -> Value:
    """The layer's weight times that."""
    size = Size(row, WEIGHTS, weight.item, per_image=False)
    return run.tape.result(size, (weight, scale), f"{call.where}: weight, scaled", "map")


def _vector(weight: Value) -> Size:
    return Size(weight.size.row, CHANNELS, weight.item, per_image=False)


def _laid(run: Forward, parameter: Value) -> Value:
    """A parameter whose gradient comes contiguous: autograd copies it where the parameter itself is channels-last.

    Source: PyTorch 2.13, torch/csrc/autograd/utils/grad_layout_contract.h. A trace under autocast has its parameters
    contiguous.
    """
    tape = run.tape
    if not run.setting.channels_last or (tape.traced and run.setting.autocast):
        return parameter

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(parameter.size, (gradient,), kind="map gradient"),)

    return tape.differentiate(parameter, (parameter,), backward)


def part(run: Forward, row: int, call: Call, weight: Value) -> Value:
    """The weight's share for the first of the concatenated maps, a view; backwards all shares are concatenated."""
    whole = _laid(run, weight) if weight.parameter else weight
    share = Value(weight.storage, Size(row, WEIGHTS, weight.item, per_image=False), whole=False)

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(whole.size, (gradient,), call.where, "map gradient"),)

    return run.tape.differentiate(share, (whole,), backward)


def rest(run: Forward, row: int, _call: Call, weight: Value, first: Value) -> Value:
    """The weight's share for the last map. To autograd both shares are one node: this one's gradient waits for it."""
    share = Value(weight.storage, Size(row, WEIGHTS, weight.item, per_image=False), whole=False)

    def backward(_tape: Tape, gradient: Value) -> Given:
        if first.node:
            first.node.saved = (*first.node.saved, gradient)
        return (None,)

    return run.tape.differentiate(share, (weight,), backward)


def tap_first(run: Forward, row: int, call: Call, x: Value, weight: Value, *bias: Value) -> Value:
    """The convolution over the up-sampled x, from x as it is."""
    inputs = (x, weight, *bias)
    result = run.tape.result(Size(row, MAP, x.item, per_image=True), inputs, call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        both = [tape.make(each.size, call.where, "map gradient") for each in (x, weight)]
        tape.run(both, (gradient, x, weight))
        return *both, *(tape.result(each.size, (gradient,), call.where, "map gradient") for each in bias)

    return run.tape.differentiate(result, inputs, backward, (x, weight))


def tap_first_into(run: Forward, _row: int, _call: Call, result: Value, x: Value, weight: Value) -> Value:
    """The same, added to `result` without gradients: nothing is made."""
    run.tape.hold(result, x, weight)
    return result


def relu_concat(run: Forward, row: int, call: Call, *reads: Value) -> Value:
    """ReLU of maps, of which then follow the crops, into one buffer, all that is kept; backwards rims are zeros."""
    maps, crops = reads[: len(reads) // 2], reads[len(reads) // 2 :]
    result = room(run, row, call, maps[0])
    run.tape.hold(*maps)

    def backward(tape: Tape, gradient: Value) -> Given:
        given = []
        for x, crop in zip(maps, crops, strict=True):
            share = tape.result(crop.size, (gradient, result), call.where, "map gradient")
            given.append(share if crop is x else tape.result(x.size, (share,), call.where, "map gradient"))
        return given

    return run.tape.differentiate(result, maps, backward, (result,))


def room(run: Forward, row: int, call: Call, x: Value) -> Value:
    """An empty buffer for a concatenation of maps like x."""
    return run.tape.result(Size(row, MAP, x.item, per_image=True), (x,), call.where, "map")


def relu_into(run: Forward, _row: int, _call: Call, buffer: Value, x: Value) -> Value:
    """ReLU of a map into its place in the buffer: nothing is made."""
    run.tape.hold(buffer, x)
    return buffer


def layer(run: Forward, row: int, _call: Call) -> Value:
    """A layer's weight, as it is."""
    return run.weights[row].weight


def compose(run: Forward, row: int, call: Call, _weight: Value) -> Value:
    """Compose two layers' weights: kernel, bias and what the border misses of it, kept from the first step on."""
    if row not in run.kept:
        sizes = (Size(row, column, run.compute_item, per_image=False) for column in (WEIGHTS, CHANNELS, MAP))
        names = (f"{call.where}: composed {name}" for name in ("weight", "bias", "border"))
        run.kept[row] = tuple(run.tape.make(size, name, "buffer") for size, name in zip(sizes, names, strict=True))
        run.tape.run(run.kept[row])
    return run.kept[row][0]


def border(run: Forward, _row: int, call: Call, x: Value, kernel: Value) -> Value:
    """Take what taps outside would pass on from the border of x: two rows and two columns, a sum of vectors each."""
    for _ in range(4):
        run.tape.result(Size(kernel.size.row, CHANNELS, kernel.item, per_image=False), (x,), call.where)
    return x


TAP_OPERATORS: dict[str, Callable[..., Value]] = {
    "cast": cast_map,
    "weight": weight,
    "bias": bias,
    "scale": scale,
    "shift": shift,
    "scaled": scaled,
    "part": part,
    "rest": rest,
    "tap_first": tap_first,
    "tap_first_into": tap_first_into,
    "relu_concat": relu_concat,
    "room": room,
    "relu_into": relu_into,
    "layer": layer,
    "compose": compose,
    "border": border,
}
