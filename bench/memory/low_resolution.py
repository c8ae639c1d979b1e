"""Calls of convolutions over up-sampled maps that are computed at low resolution, as `backend=rewritten` makes them.

What kernels/rewriting/low.py and kernels/low_resolution/tap_first.py do, step by step, without tensors; which
convolutions it is done to is the caller's rule, `Takes`. What the steps make and keep is in `tap_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

from skipcost.bench.memory.calls import WEIGHTS, Calls, ConvDetail, Place, Shape
from skipcost.kernels.dispatch.low_resolution import folds
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.unet_models.names import moment_name
from skipcost.unet_models.program import Op
from skipcost.unet_models.topology import Conv

Takes = Callable[[Axis, Axis, tuple[int, int]], bool]  # whether rows, columns and channels (in, out) go tap-first
Composes = Callable[[tuple[int, int], tuple[int, int, int], int], bool]  # size, channels (in, between, out), padding


class Rule(NamedTuple):
    """Which convolutions over up-sampled maps run at low resolution, by interpolation and by transposed convolution.

    gradients: whether they are asked for; otherwise a sum's second term is added where the first one is. folds: whether
    batch norms may go into the weights in front of them.
    """

    takes: Takes
    composes: Composes
    gradients: bool
    folds: bool


class Joint(NamedTuple):
    """A convolution over concatenated maps, the last of which, `x`, is up-sampled by `up`; `others` may be none."""

    others: tuple[int, ...]
    x: int
    up: Op
    conv: Conv
    padding: int

    @property
    def factor(self) -> int:
        """How many times the sides of `x` are enlarged."""
        return self.up.conv.kernel if self.up.conv else self.up.factor


def is_low(calls: Calls, joint: Joint, rule: Rule) -> bool:
    """Whether the rule takes a convolution to low resolution."""
    conv, factor = joint.conv, joint.factor
    channels, *small = calls.shapes[joint.x]
    if joint.up.conv:
        whole = _seen(calls, joint) == (small[0] * factor, small[1] * factor)
        through = channels, joint.up.conv.out_channels, conv.out_channels
        return bool(joint.others) and whole and rule.composes((small[0], small[1]), through, joint.padding)
    rows, columns = (
        _axis(side, factor, joint.up.how, (side * factor - length) // 2, length, conv.kernel, joint.padding)
        for side, length in zip(small, _seen(calls, joint), strict=True)
    )
    return rule.takes(rows, columns, (channels, conv.out_channels))


def is_folded(conv: Conv, shape: Shape, rule: Rule) -> bool:
    """Whether the norm of a convolution with such a result goes into its weights."""
    channels, height, width = shape
    return rule.folds and conv.norm == "batch" and folds(conv.weights, channels * height * width)


def fold(calls: Calls, conv: Conv, weight: int, where: str) -> tuple[int, int]:
    """Add the calls that put a norm into weight and bias, and return these."""
    vector = conv.out_channels, 1, 1
    scale = calls.call("scale", where, (weight,), vector)
    shift = calls.call("shift", where, (weight, scale), vector)
    return calls.call("scaled", where, (weight, scale), vector, weights=conv.weights), shift


def at_low(calls: Calls, joint: Joint, rule: Rule, where: str, places: tuple[Place, Place]) -> int:
    """Add the calls of a convolution at low resolution, its norm and ReLU; the op's frame holds what it has cast.

    places: that of the convolution's weights, and of those that `x` is up-sampled with, if any.
    """
    conv, shape, alone, place = joint.conv, _shape(calls, joint), not joint.others, places[0]
    narrow = alone and calls.shapes[joint.x][0] == 1
    flat = narrow or shape[0] == 1 or shape[1] * shape[2] == 1
    detail = ConvDetail(conv.bias, conv.norm, conv.act, flat, first=False, place=place, narrow=narrow, tap=alone)
    vector = conv.out_channels, 1, 1
    x = calls.call("cast", where, (joint.x,), calls.shapes[joint.x])
    groups = conv.norm_groups if conv.norm == "group" else 0
    weight = calls.call("weight", where, (), vector, detail, conv.weights, groups)
    layer: tuple[int, ...] = (weight,)
    folded = is_folded(conv, shape, rule) and not joint.up.conv
    if folded:
        layer = fold(calls, conv, weight, where)
    elif conv.bias:
        layer = weight, calls.call("bias", where, (weight,), vector)
    if joint.up.conv:
        result = _compose(calls, joint._replace(x=x), weight, where, places[1])
    elif alone:
        result = calls.call("tap_first", where, (x, *layer), shape)
    else:
        result = _split(calls, joint._replace(x=x), layer, where, gradients=rule.gradients)
    if not folded:
        result = calls.call("norm_act", where, (result, weight), shape, detail)
    elif conv.act:
        result = calls.call("relu", where, (result,), shape)
    calls.hold(*layer) if joint.up.conv else calls.hold(x, *layer)
    return result


def _split(calls: Calls, joint: Joint, layer: tuple[int, ...], where: str, *, gradients: bool) -> int:
    """A convolution over the other maps, and one over the up-sampled map added to it."""
    (weight, *bias), shape = layer, _shape(calls, joint)
    weights, vector, channels = calls.numbers[weight][WEIGHTS], calls.shapes[weight], calls.shapes[joint.x][0]
    of_x = weights // joint.conv.in_channels * channels
    others = [calls.call("cast", where, (each,), calls.shapes[each]) for each in joint.others]
    cropped = [calls.crop(each, *_seen(calls, joint), where) for each in others]
    first = calls.call("part", where, (weight,), vector, weights=weights - of_x)
    last = calls.call("rest", where, (weight, first), vector, weights=of_x)
    merged = calls.merge(cropped, "concat", where)
    result = calls.call("convolve", where, (merged, first, *bias), shape)
    if gradients:
        low = calls.call("tap_first", where, (joint.x, last), shape)
        result = calls.call("add_", where, (result, low), shape)
    else:
        result = calls.call("tap_first_into", where, (result, joint.x, last), shape)
    calls.hold(*others)
    return result


def _compose(calls: Calls, joint: Joint, weight: int, where: str, place: Place) -> int:
    """A convolution over the other maps, and the composed one of x, whose phases and border are added to it.

    What kernels/low_resolution/composed.py does. The composed weights are kept from the first step on.
    """
    up, conv, shape = cast("Conv", joint.up.conv), joint.conv, _shape(calls, joint)
    channels, height, width = calls.shapes[joint.x]
    vector, more = calls.shapes[weight], 2 * joint.padding - 1
    own = ConvDetail(up.bias, up.norm, up.act, flat=True, first=False, place=place)
    name = moment_name(joint.up)
    layer = calls.call("layer", name, (), (up.out_channels, 1, 1), own, up.weights)
    others = [calls.call("cast", where, (each,), calls.shapes[each]) for each in joint.others]
    kept = calls.call("compose", where, (layer,), (conv.out_channels, 3, 3), weights=16 * channels * conv.out_channels)
    rest = conv.weights // conv.in_channels * (conv.in_channels - up.out_channels)
    first = calls.call("part", where, (weight,), vector, weights=rest)
    cropped = [calls.crop(each, *_seen(calls, joint), where) for each in others]
    result = calls.call("convolve", where, (calls.merge(cropped, "concat", where), first), shape)
    positions = 4 * conv.out_channels, height + more, width + more
    calls.call("convolve", f"{where}, four phases", (joint.x, kept), positions)  # added to the result, and dropped
    if joint.padding:
        result = calls.call("border", where, (result, kept), shape)
    calls.hold(joint.x)
    return result


def _seen(calls: Calls, joint: Joint) -> tuple[int, int]:
    """Height and width of what is left of the up-sampled map beside the others."""
    _, height, width = calls.shapes[joint.x]
    sides = [calls.shapes[each][1:] for each in joint.others]
    sides.append((height * joint.factor, width * joint.factor))
    return min(side[0] for side in sides), min(side[1] for side in sides)


def _shape(calls: Calls, joint: Joint) -> Shape:
    lost = joint.conv.kernel - 1 - 2 * joint.padding
    height, width = _seen(calls, joint)
    return joint.conv.out_channels, height - lost, width - lost


@lru_cache(maxsize=1024)  # one axis is asked about for many channels
def _axis(extent: int, factor: int, mode: str, start: int, length: int, kernel: int, padding: int) -> Axis:
    return Axis(extent, factor, mode, align_corners=False, start=start, length=length, kernel=kernel, padding=padding)
