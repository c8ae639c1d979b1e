"""What each operator of a network makes, what autograd keeps of it, and what its backward pass makes.

First the norms, then one function per operator of `schedule`, in the table OPERATORS; they write on a `Tape`. Those
that `backend=rewritten` adds are in `tap_operators`. Bytes inside an operator (workspaces, packed copies) are not
modelled. Sources: PyTorch 2.13, tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp; lists of
casts of torch.autocast, aten/src/ATen/autocast_mode.h; norms: aten/src/ATen/native: Normalization.cpp, group_norm.cpp
and their CUDA counterparts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from skipcost.bench.memory.tape import (
    BOOL,
    CHANNELS,
    FLOAT,
    GROUPS,
    LONG,
    MAP,
    Forward,
    Given,
    Size,
    Tape,
    Value,
    cast_parameter,
    cast_to,
)

if TYPE_CHECKING:
    from skipcost.bench.memory.schedule import Call, ConvDetail


def _statistics_item(run: Forward, x: Value, *, grouped: bool = False) -> int:
    """Bytes of a mean: 32 bits on a GPU, and on a CPU where parameters are of another type than the map.

    Group norm on a GPU takes the map's type. On the meta device PyTorch answers as a GPU does, except for fake CPU
    tensors, which follow the map.
    """
    fake = run.tape.traced and run.tape.replays_views
    if run.tape.traced or run.setting.device == "cuda":
        return x.item if grouped or fake else FLOAT
    return FLOAT if run.setting.autocast else x.item


def batch_norm(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Batch norm; at inference it makes no statistics."""
    tape, weights, item = run.tape, run.weights[row], _statistics_item(run, x)
    result = tape.make(x.size, f"{call.where}, normed", "map")
    size = Size(row, CHANNELS, item, per_image=False)
    if not run.setting.training:
        tape.run((result,), (x,))
        return result
    return _normalise(run, call, (result, x, weights.scale, weights.shift), size)


def group_norm(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Group norm; on a GPU autocast runs it, and so what follows, in 32 bits.

    It copies maps of the meta device to the contiguous layout, which CPU tensors keep; other convolutions than
    `tap_first` leave nothing to copy there.
    """
    tape, weights = run.tape, run.weights[row]
    given, on_meta = x, tape.traced and not tape.replays_views
    if on_meta:
        x = _one_after_another(run, call, x)
    if run.setting.autocast and run.setting.device == "cuda" and not tape.traced:
        x = cast_to(tape, x, FLOAT)
    size = Size(row, GROUPS, _statistics_item(run, x, grouped=True), per_image=True)
    result = tape.make(x.size, f"{call.where}, normed", "map")
    result = _normalise(run, call, (result, x, weights.scale, weights.shift), size)
    if on_meta:
        tape.hold(given)
    return result


def instance_norm(run: Forward, row: int, call: Call, x: Value) -> Value:
    """Instance norm: a batch norm over one image of batch x channels, its scale and shift repeated for each image."""
    tape, weights = run.tape, run.weights[row]
    each = Size(row, CHANNELS, run.setting.item, per_image=True)

    def repeat(value: Value) -> Value:
        def backward(tape: Tape, gradient: Value) -> Given:
            if run.setting.one_image:  # repeated once: nothing to sum
                return (gradient,)
            return (tape.result(value.size, (gradient,), kind="map gradient"),)

        return tape.differentiate(tape.result(each, (value,), f"{call.where}: repeated", "map"), (value,), backward)

    scale, shift = repeat(cast("Value", weights.scale)), repeat(cast("Value", weights.shift))
    flat = _one_after_another(run, call, x)
    size = each.typed(_statistics_item(run, x))
    result = _normalise(run, call, (tape.make(x.size, f"{call.where}, normed", "map"), flat, scale, shift), size)
    tape.hold(x)
    return result


def _one_after_another(run: Forward, call: Call, x: Value) -> Value:
    """Return the map channel by channel: a copy where it lies pixel by pixel (channels-last) and the two differ.

    On the meta device a convolution answers channel by channel, on fake CPU tensors in its input's layout, so that a
    trace sees no copy but that of the first map there, and on the meta device those of `tap_first`'s.
    """
    detail = cast("ConvDetail", call.detail)
    unseen = run.tape.traced and not (detail.first if run.tape.replays_views else detail.tap)
    if not run.setting.channels_last or detail.flat or unseen:
        return x
    copy = run.tape.result(x.size, (x,), f"{call.where}: channel by channel", "map")

    def backward(_tape: Tape, gradient: Value) -> Given:
        return (gradient,)

    return run.tape.differentiate(copy, (x,), backward)


def _normalise(run: Forward, call: Call, values: tuple[Value, Value, Value | None, Value | None], size: Size) -> Value:
    """One normalisation: `values` are result, input, scale and shift; `size` is that of its mean and its deviation.

    A gradient that comes in another type than the input's is cast to it by autograd.
    """
    result, x, scale, shift = values
    scale, shift = cast("Value", scale), cast("Value", shift)
    tape = run.tape
    mean, deviation = (tape.make(size, f"{call.where}: {name}", "map") for name in ("mean", "deviation"))
    tape.run((result, mean, deviation), (x, scale, shift))
    wide = scale.item if tape.traced and size.column == GROUPS and scale.item > x.item else 0

    def backward(tape: Tape, gradient: Value) -> Given:
        sizes = x.size.typed(wide or x.item), scale.size, shift.size
        made = [tape.make(each, call.where, "map gradient") for each in sizes]
        tape.run(made, (gradient, x, mean, deviation))
        if wide:
            made[0] = tape.result(x.size, (made[0],), call.where, "map gradient")
        return made

    return tape.differentiate(result, (x, scale, shift), backward, (x, scale, mean, deviation))


NORMS = {"batch": batch_norm, "instance": instance_norm, "group": group_norm}


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
}
