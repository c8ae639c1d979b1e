"""What each operator of a network makes, what autograd keeps of it, and what its backward pass makes.

One function per operator of `schedule`, in the table OPERATORS; they write on a `Tape`. Those that `backend=rewritten`
adds are in `tap_operators`. Bytes inside an operator (workspaces, packed copies) are not modelled. Sources: PyTorch
2.13, tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp; lists of casts of torch.autocast,
aten/src/ATen/autocast_mode.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from skipcost.bench.memory.calls import MAP, Call, ConvDetail
from skipcost.bench.memory.forward import BOOL, LONG, Forward, Given, cast_parameter, cast_to
from skipcost.bench.memory.normalising import NORMS
from skipcost.bench.memory.tap_operators import TAP_OPERATORS
from skipcost.bench.memory.tape import Size, Tape, Value


def conv(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Convolution, then norm and ReLU where the layer has them."""
    weights = run.weights[row]
    bias = (cast_parameter(run, weights.bias),) if weights.bias else ()
    weight = cast_parameter(run, weights.weight)
    x = cast_to(run.tape, x, run.compute_item)
    return _norm_act(run, row, call, convolve(run, row, call, x, weight, *bias))


def convolve(run: Forward, row: int, call: Call, x: Value, weight: Value, *bias: Value) -> Value:
    """Convolution alone, of what has one type."""
    inputs = (x, weight, *bias)
    result = run.tape.result(Size(row, MAP, run.compute_item, per_image=True), inputs, call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        wanted = [tape.make(each.size, call.where, "map gradient") for each in inputs if each.needs_gradient]
        tape.run(wanted, (gradient, x, weight))
        return wanted if x.needs_gradient else (None, *wanted)

    return run.tape.differentiate(result, inputs, backward, (x, weight))


def norm_act(run: Forward, _row: int, call: Call, x: Value, weight: Value) -> Value:
    """Norm and ReLU of the layer whose weight is given."""
    return _norm_act(run, weight.size.row, call, x)


def _norm_act(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Norm and ReLU where the layer has them; `row` is that of its parameters."""
    detail = cast("ConvDetail", call.detail)
    if detail.norm != "none":
        x = NORMS[detail.norm](run, row, call, x)
    return relu(run, row, call, x, viewed=detail.norm == "instance") if detail.act else x


def relu(run: Forward, _row: int, _call: Call, x: Value, *, viewed: bool = False) -> Value:
    """ReLU in place; `viewed`: on a view, of which autograd keeps track by copying slices of gradients."""
    tape = run.tape
    tape.hold(x)
    if viewed:
        return _relu_of_view(tape, x)

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient, x), tape.names[x.storage], "map gradient"),)

    return tape.differentiate(x, (x,), backward, (x,))


def _relu_of_view(tape: Tape, x: Value) -> Value:
    name = tape.names[x.storage]

    def copied(tape: Tape, gradient: Value) -> Given:
        whole = tape.result(x.size, (gradient,), name, "map gradient")
        share = tape.result(x.size, (whole,), name, "map gradient")
        given = tape.result(x.size, (share, x), name, "map gradient")
        tape.hold(given, whole)
        return (whole,)

    def viewed(tape: Tape, gradient: Value) -> Given:
        """The view's own step: a new map, or, for a fake tensor, which replays its view, the same one."""
        return (gradient if tape.traced and replayed else tape.result(x.size, (gradient,), name, "map gradient"),)

    replayed = tape.replays_views
    result = tape.differentiate(x, (x,), copied, (x,))
    return tape.differentiate(result, (result,), viewed)


def cat(run: Forward, row: int, call: Call, *maps: Value) -> Value:
    """Concatenate channels; the gradient's shares stay views of it."""
    item = max(each.item for each in maps)
    cast_maps = [cast_to(run.tape, each, item) for each in maps]
    result = run.tape.result(Size(row, MAP, item, per_image=True), cast_maps, call.where, "map")

    def backward(_tape: Tape, gradient: Value) -> Given:
        return [Value(gradient.storage, each.size, whole=False) for each in cast_maps]

    return run.tape.differentiate(result, cast_maps, backward)


def _both(values: tuple[Value, Value]) -> Callable[[Tape, Value], Given]:
    """The backward pass of a sum: both get the gradient itself, in their own type."""

    def backward(tape: Tape, gradient: Value) -> Given:
        return [
            gradient if each.item == gradient.item else tape.result(each.size, (gradient,), kind="map gradient")
            for each in values
        ]

    return backward


def add(run: Forward, row: int, call: Call, first: Value, second: Value) -> Value:
    """Add two maps into a new one."""
    size = Size(row, MAP, max(first.item, second.item), per_image=True)
    result = run.tape.result(size, (first, second), call.where, "map")
    return run.tape.differentiate(result, (first, second), _both((first, second)))


def add_in_place(run: Forward, _row: int, _call: Call, first: Value, second: Value) -> Value:
    """Add the second map to the first."""
    run.tape.hold(first, second)
    return run.tape.differentiate(first, (first, second), _both((first, second)))


def up_sample(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Bilinear or nearest: neither keeps anything."""
    result = run.tape.result(Size(row, MAP, x.item, per_image=True), (x,), call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient,), call.where, "map gradient"),)

    return run.tape.differentiate(result, (x,), backward)


def pool(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Max-pool: its indices are made, 8 bytes each, whether or not anybody asked for them."""
    size = Size(row, MAP, x.item, per_image=True)
    result = run.tape.make(size, call.where, "map")
    indices = run.tape.make(size.typed(LONG), f"{call.where}: indices", "map")
    run.tape.run((result, indices), (x,))

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient, x, indices), call.where, "map gradient"),)

    return run.tape.differentiate(result, (x,), backward, (x, indices))


def slice_(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Take part of the rows or columns, a view; its gradient is a whole map with zeros around."""
    part = Value(x.storage, Size(row, MAP, x.item, per_image=True), whole=False)

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient,), call.where, "map gradient"),)

    return run.tape.differentiate(part, (x,), backward)


def sigmoid(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Sigmoid; its result is kept."""
    result = run.tape.result(Size(row, MAP, x.item, per_image=True), (x,), call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient, result), call.where, "map gradient"),)

    return run.tape.differentiate(result, (x,), backward, (result,))


def weigh(run: Forward, row: int, call: Call, x: Value, weight: Value) -> Value:
    """Multiply a map by coefficients of one channel; their gradient is summed over the channels."""
    (reduced,) = call.detail
    result = run.tape.result(Size(row, MAP, max(x.item, weight.item), per_image=True), (x, weight), call.where, "map")
    saved = [weight] if not weight.needs_gradient else [x, weight]

    def backward(tape: Tape, gradient: Value) -> Given:
        if not weight.needs_gradient:
            return tape.result(x.size, (gradient, weight), call.where, "map gradient"), None
        of_weight = tape.result(result.size, (gradient, x), call.where, "map gradient")
        of_x = tape.result(x.size, (gradient, weight), call.where, "map gradient")
        if reduced:
            of_weight = tape.result(weight.size, (of_weight,), call.where, "map gradient")
        return of_x, of_weight

    return run.tape.differentiate(result, (x, weight), backward, saved)


def dropout(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Dropout while training: the mask is kept, in the map's type."""
    size = Size(row, MAP, x.item, per_image=True)
    mask = run.tape.result(size, (x,), f"{call.where}: mask", "map")
    result = run.tape.result(size, (x, mask), call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient, mask), call.where, "map gradient"),)

    return run.tape.differentiate(result, (x,), backward, (mask,))


def amax(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Maximum over rows and columns; the gradient is shared out among equal maxima."""
    result = run.tape.result(Size(row, MAP, x.item, per_image=True), (x,), call.where, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        equal = tape.result(x.size.typed(BOOL), (x, result), call.where)
        count = tape.result(result.size.typed(LONG), (equal,), call.where)
        share = tape.result(result.size, (gradient, count), call.where)
        given = tape.result(x.size, (share, equal), call.where, "map gradient")
        tape.hold(share, count, equal)
        return (given,)

    return run.tape.differentiate(result, (x,), backward, (x, result))


def present(run: Forward, row: int, call: Call, scores: Value, logits: Value) -> Value:
    """Whether the classifier sees an organ, as 0 and 1 in the logits' type; no gradient."""
    size = Size(row, MAP, logits.item, per_image=True)
    above = run.tape.result(size.typed(BOOL), (scores,), call.where)
    return run.tape.result(size, (above,), call.where, "map")


OPERATORS: dict[str, Callable[..., Value]] = {
    "conv": conv,
    "convolve": convolve,
    "norm_act": norm_act,
    "cat": cat,
    "add": add,
    "add_": add_in_place,
    "relu": relu,
    "up_sample": up_sample,
    "pool": pool,
    "slice": slice_,
    "sigmoid": sigmoid,
    "weigh": weigh,
    "dropout": dropout,
    "amax": amax,
    "present": present,
    **TAP_OPERATORS,
}


def run_forward(run: Forward, calls: tuple[Call, ...], image: Value) -> None:
    """Run the calls; their results, one a call, are in `run.values` after it."""
    run.values, run.cached = [image], []
    for row, call in enumerate(calls[1:], 1):
        reads = [run.values[index] for index in call.reads]
        run.tape.where = call.where or run.tape.where
        if call.op == "hold":
            run.tape.hold(*reads)
            run.values.append(reads[0])
        else:
            run.values.append(OPERATORS[call.op](run, row, call, *reads))
    run.tape.hold(*run.cached)  # autocast's cache is emptied when it ends
