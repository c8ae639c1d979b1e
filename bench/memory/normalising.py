"""The norms on a tape: what they make, what autograd keeps, what their backward passes make.

Sources: PyTorch 2.13, aten/src/ATen/native: Normalization.cpp, group_norm.cpp and their CUDA counterparts.
"""

from __future__ import annotations

from typing import cast

from skipcost.bench.memory.calls import CHANNELS, GROUPS, Call, ConvDetail
from skipcost.bench.memory.forward import FLOAT, Forward, Given, cast_to
from skipcost.bench.memory.tape import Size, Tape, Value


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
