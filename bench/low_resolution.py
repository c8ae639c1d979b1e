"""Calls of convolutions over up-sampled maps that are computed at low resolution, as `backend=rewritten` makes them.

What kernels/rewritten.py and kernels/split_concat.py do, step by step, without tensors; which convolutions it is done
to is the caller's rule, `Takes`. What the steps make and keep is in `tap_operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from skipcost.bench.calls import WEIGHTS, Calls, ConvDetail, Place, Shape
from skipcost.kernels.tap_axis import Axis
from skipcost.unet_models.topology import Conv, Edge

Takes = Callable[[Axis, Axis, tuple[int, int]], bool]  # whether rows, columns and channels (in, out) go tap-first


class Joint(NamedTuple):
    """A convolution over concatenated maps, the last of which, `x`, an edge up-samples; `others` may be none."""

    others: tuple[int, ...]
    x: int
    edge: Edge
    conv: Conv


def is_low(calls: Calls, joint: Joint, takes: Takes) -> bool:
    """Whether the rule takes a convolution to low resolution; ValueError where its result would vanish."""
    edge, conv = joint.edge, joint.conv
    calls.check(_shape(calls, joint))
    channels, *small = calls.shapes[joint.x]
    padding, factor = 0 if calls.valid else conv.kernel // 2, 1 << edge.shift
    rows, columns = (
        _axis(side, factor, edge.mode or "", (side * factor - length) // 2, length, conv.kernel, padding)
        for side, length in zip(small, _seen(calls, joint), strict=True)
    )
    return takes(rows, columns, (channels, conv.out_channels))


def at_low(calls: Calls, joint: Joint, where: str, place: Place) -> int:
    """Add the calls of a convolution at low resolution, its norm and ReLU; the op's frame holds what it has cast."""
    conv, shape, alone = joint.conv, _shape(calls, joint), not joint.others
    narrow = alone and calls.shapes[joint.x][0] == 1
    flat = narrow or shape[0] == 1 or shape[1] * shape[2] == 1
    detail = ConvDetail(conv.bias, conv.norm, conv.act, flat, first=False, place=place, narrow=narrow, tap=alone)
    vector = conv.out_channels, 1, 1
    x = calls.call("cast", where, (joint.x,), calls.shapes[joint.x])
    groups = conv.norm_groups if conv.norm == "group" else 0
    weight = calls.call("weight", where, (), vector, detail, conv.weights, groups)
    layer = (weight, calls.call("bias", where, (weight,), vector)) if conv.bias else (weight,)
    if alone:
        result = calls.call("tap_first", where, (x, *layer), shape)
    else:
        result = _split(calls, joint._replace(x=x), layer, where)
    result = calls.call("norm_act", where, (result, weight), shape, detail)
    calls.hold(x, *layer)
    return result


def _split(calls: Calls, joint: Joint, layer: tuple[int, ...], where: str) -> int:
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
    low = calls.call("tap_first", where, (joint.x, last), shape)
    result = calls.call("add_", where, (result, low), shape)
    calls.hold(*others)
    return result


def _seen(calls: Calls, joint: Joint) -> tuple[int, int]:
    """Height and width of what is left of the up-sampled map beside the others."""
    _, height, width = calls.shapes[joint.x]
    sides = [calls.shapes[each][1:] for each in joint.others]
    sides.append((height << joint.edge.shift, width << joint.edge.shift))
    return min(side[0] for side in sides), min(side[1] for side in sides)


def _shape(calls: Calls, joint: Joint) -> Shape:
    lost = joint.conv.kernel - 1 if calls.valid else 0
    height, width = _seen(calls, joint)
    return joint.conv.out_channels, height - lost, width - lost


@lru_cache(maxsize=1024)  # one axis is asked about for many channels
def _axis(extent: int, factor: int, mode: str, start: int, length: int, kernel: int, padding: int) -> Axis:
    return Axis(extent, factor, mode, align_corners=False, start=start, length=length, kernel=kernel, padding=padding)
