"""What a network's program does, call by call, with the sizes: a fold over the very list that the executor runs.

The calls say what is done to what and are the same for all widths and image sizes that need the same steps; the
numbers beside them are this network's. A result ends with its last reader; a `hold` stands where a function of
`backend=rewritten` keeps a map longer. With a `rule` the list is that backend's (kernels/programs/low.py), and the rule
says of each op that can be done at low resolution whether it is; such an op does what kernels/rewriting/low.py and
kernels/low_resolution/tap_first.py do, step by step. What the calls make and keep is the business of `operators` and
`tap_operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

from skipcost.bench.memory.tape import WEIGHTS
from skipcost.kernels.dispatch.low_resolution import folds
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.programs.low import low
from skipcost.unet_models.names import moment_name
from skipcost.unet_models.program import Op, lower
from skipcost.unet_models.sizes import follow, shapes
from skipcost.unet_models.topology import INTERPOLATIONS, Conv, SkipGraph

Place = tuple[int, int, int]  # where a convolution's weights are registered: sorting gives the parameters' order
Shape = tuple[int, int, int]  # channels, height, width
OWNERS = ("conv", "weight", "layer")  # calls that have a layer's parameters


class Call(NamedTuple):
    """One step: `reads` are the numbers of the calls whose results it takes, `detail` what else `op` must know."""

    op: str
    where: str
    reads: tuple[int, ...]
    detail: tuple[object, ...] = ()


class ConvDetail(NamedTuple):
    """What a call that has a layer's parameters, or runs its norm, must know of its record."""

    bias: bool
    norm: str
    act: bool
    flat: bool  # its result has one channel or one position, or is laid out by such a map: all layouts are the same
    first: bool  # reads the image, and that has several channels
    place: Place
    narrow: bool = False  # one channel goes in: its weight is the same in all layouts
    tap: bool = False  # its result is tap_first's alone, which keeps the weight's layout without data, too


class Calls:
    """The calls so far, with their results' sizes; a map is the number of the call that makes it."""

    def __init__(self, graph: SkipGraph, height: int, width: int) -> None:
        """Begin with the image; ValueError where a map would vanish."""
        shapes(lower(graph), (height, width))
        self.calls: list[Call] = []
        self.numbers: list[tuple[int, int, int, int, int]] = []  # the columns above
        self.shapes: list[Shape] = []
        self.image = self.call("image", "", (), (graph.in_channels, height, width))

    def call(
        self,
        op: str,
        where: str,
        reads: tuple[int, ...],
        shape: Shape,
        detail: tuple[object, ...] = (),
        weights: int = 0,
        groups: int = 0,
    ) -> int:
        """Add a call and return its number; `shape` is its result's."""
        self.calls.append(Call(op, where, reads, detail))
        self.numbers.append((shape[0] * shape[1] * shape[2], shape[0], weights, groups, 1))
        self.shapes.append(shape)
        return len(self.calls) - 1

    def hold(self, *maps: int) -> None:
        """Say that maps are referred to up to here."""
        self.call("hold", "", maps, self.shapes[maps[0]])

    def convolved(self, x: int, conv: Conv, padding: int) -> Shape:
        """The shape of a convolution's result."""
        _, height, width = self.shapes[x]
        if conv.transposed:
            return conv.out_channels, height * conv.kernel, width * conv.kernel
        lost = conv.kernel - 1 - 2 * padding
        return conv.out_channels, height - lost, width - lost

    def conv(self, x: int, conv: Conv, where: str, place: Place, padding: int) -> int:
        """Convolve, normalise and activate, in one call."""
        shape = self.convolved(x, conv, padding)
        flat = shape[0] == 1 or shape[1] * shape[2] == 1
        detail = ConvDetail(conv.bias, conv.norm, conv.act, flat, x == self.image and self.shapes[x][0] > 1, place)
        groups = conv.norm_groups if conv.norm == "group" else 0
        return self.call("conv", where, (x,), shape, detail, conv.weights, groups)

    def crop_all(self, maps: list[int], where: str, *, first: bool = False) -> list[int]:
        """Crop all maps, or the first alone, to the smallest height and width among them."""
        height, width = min(self.shapes[x][1] for x in maps), min(self.shapes[x][2] for x in maps)
        return [self.crop(x, height, width, where) for x in (maps[:1] if first else maps)]

    def crop(self, x: int, height: int, width: int, where: str) -> int:
        """Slice rows, then columns; a slice that takes everything is left out, as Python's indexing does."""
        channels, rows, columns = self.shapes[x]
        if rows > height:
            x = self.call("slice", f"{where}: crop", (x,), (channels, height, columns))
        return x if columns == width else self.call("slice", f"{where}: crop", (x,), (channels, height, width))

    def merge(self, maps: list[int], how: str, where: str) -> int:
        """Crop, then concatenate or add; a single map stays what it is."""
        cropped = self.crop_all(maps, where)
        if len(cropped) == 1:
            return cropped[0]
        channels, height, width = self.shapes[cropped[0]]
        if how == "concat":
            channels = sum(self.shapes[x][0] for x in cropped)
            return self.call("cat", f"{where}: concatenation", tuple(cropped), (channels, height, width))
        first, more = ("add", "add_") if how == "sum" else (how, how)
        result = self.call(first, f"{where}: {how}", (cropped[0], cropped[1]), (channels, height, width))
        for other in cropped[2:]:
            result = self.call(more, f"{where}: {how}", (result, other), (channels, height, width))
        return result


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
def _axis(extent: int, factor: int, how: str, start: int, length: int, kernel: int, padding: int) -> Axis:
    return Axis(extent, factor, *INTERPOLATIONS[how], start=start, length=length, kernel=kernel, padding=padding)


ON_EDGES = ("up", "gate.x", "gate.signal", "gate.psi", "conv", "project")  # as they are registered


class Schedule(NamedTuple):
    """The calls of one forward pass, the results that the network returns, and the numbers of each call's result.

    One row more than there are calls has the numbers of an output of one channel, which targets have.
    """

    calls: tuple[Call, ...]
    logits: tuple[int, ...]
    class_logits: int | None
    numbers: list[tuple[int, int, int, int, int]]  # elements an image, channels, weights, groups of its norm, 1


def schedule(
    graph: SkipGraph, height: int, width: int, *, training: bool, rule: Rule | None = None
) -> Schedule:  # fmt: skip
    """Follow one forward pass on images of height x width pixels; ValueError where a map would vanish.

    rule: that of `backend=rewritten`; without one nothing is rewritten, as with eager.
    """
    walk = _Fold(graph, (height, width), rule, training=training)
    program = low(lower(graph)) if rule else lower(graph)
    made = [walk.image]
    walk.run(program.ops[1:], made)
    outputs = [made[each] for each in program.outputs]
    _, rows, columns = walk.shapes[outputs[0]]
    walk.numbers.append((rows * columns, 1, 0, 0, 1))
    scores = None if program.class_logits is None else made[program.class_logits]
    return Schedule(tuple(walk.calls), tuple(outputs), scores, walk.numbers)


@lru_cache(maxsize=256)
def _places(graph: SkipGraph) -> dict[tuple[str, ...], Place]:
    """Where a layer's weights are registered, by its path."""
    edges = {edge.name: at for at, edge in enumerate(graph.edges)}
    nodes = {node.name: at for at, node in enumerate(graph.nodes)}
    heads = {head.node: at for at, head in enumerate(graph.heads)}
    places: dict[tuple[str, ...], Place] = {}
    for op in lower(graph).ops:
        if op.layer:
            room, *names = op.layer
            if room == "edges":
                places[op.layer] = 0, edges[op.where], ON_EDGES.index(op.part)
            elif room == "nodes":
                places[op.layer] = 1, nodes[op.where], int(op.part)
            else:
                places[op.layer] = (2, heads[names[0]], 0) if names else (3, 0, 0)
    return places


class _Fold(Calls):
    """The fold: every op becomes calls, and its result is the number of the call that makes it.

    bare: whether ReLUs are left to the concatenation that follows.
    """

    def __init__(self, graph: SkipGraph, size: tuple[int, int], rule: Rule | None, *, training: bool) -> None:
        super().__init__(graph, *size)
        self.places, self.training, self.bare = _places(graph), training, False
        self.rule = rule or Rule(lambda *_: False, lambda *_: False, gradients=training, folds=False)

    def run(self, ops: Iterable[Op], made: list[int]) -> None:
        """Add what ops do to what is there."""
        for op in ops:
            made.append(FOLDS[op.kind](self, op, [made[read] for read in op.reads]))

    def record(self, op: Op) -> Conv:
        assert op.conv is not None
        return replace(op.conv, act=False) if self.bare else op.conv

    def conv_op(self, op: Op, reads: list[int]) -> int:
        """A convolution with its norm and ReLU, which are ops of their own that need no call more."""
        return self.conv(reads[0], self.record(op), moment_name(op), self.places[op.layer], op.padding)

    def relu(self, op: Op, reads: list[int]) -> int:
        if op.layer:
            return reads[0]
        return self.call("relu", moment_name(op), tuple(reads), self.shapes[reads[0]])

    def up_sample(self, op: Op, reads: list[int]) -> int:
        channels, height, width = self.shapes[reads[0]]
        shape = channels, height * op.factor, width * op.factor
        return self.call("up_sample", moment_name(op), (reads[0],), shape)

    def pool(self, op: Op, reads: list[int]) -> int:
        channels, height, width = self.shapes[reads[0]]
        more = op.factor - 1 if op.how == "ceil" else 0
        shape = channels, (height + more) // op.factor, (width + more) // op.factor
        return self.call("pool", moment_name(op), (reads[0],), shape)

    def crop_op(self, op: Op, reads: list[int]) -> int:
        return self.crop_all(reads, op.where, first=True)[0]

    def join(self, op: Op, reads: list[int]) -> int:
        return self.merge(reads, op.how, op.where)

    def same(self, op: Op, reads: list[int]) -> int:
        """What makes a map like the one that it reads."""
        return self.call(op.kind, moment_name(op), tuple(reads), self.shapes[reads[0]])

    def multiply(self, op: Op, reads: list[int]) -> int:
        """Weigh by one channel; its gradient, where it has one, is summed over the channels of the map."""
        summed = self.shapes[reads[0]][0] > 1
        return self.call("weigh", moment_name(op), tuple(reads), self.shapes[reads[0]], (summed,))

    def dropout(self, op: Op, reads: list[int]) -> int:
        return self.same(op, reads) if self.training else reads[0]

    def amax(self, op: Op, reads: list[int]) -> int:
        return self.call("amax", op.where, tuple(reads), (self.shapes[reads[0]][0], 1, 1))

    def present(self, op: Op, reads: list[int]) -> int:
        return self.call("present", op.where, tuple(reads), (1, 1, 1))

    def layer(self, op: Op, reads: list[int]) -> int:
        """A convolution, its norm in the weights where the rule says so."""
        (x,), part = reads, op.part_of("conv")
        assert part is not None
        conv, where, place = self.record(part), moment_name(op), self.places[op.layer]
        shape = self.convolved(x, conv, part.padding)
        if not is_folded(conv, shape, self.rule):
            return self.conv(x, conv, where, place, part.padding)
        detail = ConvDetail(conv.bias, conv.norm, conv.act, flat=False, first=False, place=place)
        weight = self.call("weight", where, (), (conv.out_channels, 1, 1), detail, conv.weights)
        made = fold(self, conv, weight, where)
        result = self.call("convolve", where, (x, *made), shape)
        if conv.act:
            result = self.call("relu", where, (result,), shape)
        self.hold(*made)
        return result

    def up_layer(self, op: Op, reads: list[int]) -> int:
        """A convolution over an up-sampled map, and over others beside it: at low resolution, or step by step."""
        up, part = op.parts[0], op.part_of("conv")
        assert part is not None
        joint = Joint(tuple(reads[:-1]), reads[-1], up, self.record(part), part.padding)
        if is_low(self, joint, self.rule):
            places = self.places[op.layer], self.places.get(up.layer, (0, 0, 0))
            return at_low(self, joint, self.rule, moment_name(op), places)
        made = [FOLDS[up.kind](self, up, reads[-1:])]
        if reads[:-1]:
            made = [self.merge([*reads[:-1], *made], "concat", op.where)]
        return self.layer(op, made)

    def relu_join(self, op: Op, reads: list[int]) -> int:
        """What kernels/ops/relu_concat.py does: ReLU into one buffer, of all maps, or of each as it arrives."""
        *parts, join = op.parts
        shapes: list[Any] = [self.shapes[each] for each in reads]
        follow(op.parts, shapes)
        shape, where, buffer = shapes[-1], moment_name(join), None
        made, arrived, self.bare = list(reads), list[int](), True
        cropped = []
        for number, part in enumerate(parts, len(reads)):
            self.run([part], made)
            if number not in join.reads:
                continue
            arrived.append(made[-1])
            cropped.append(self.crop(made[-1], shape[1], shape[2], where))
            if not self.rule.gradients:
                buffer = self.call("room", where, (cropped[-1],), shape) if buffer is None else buffer
                buffer = self.call("relu_into", where, (buffer, cropped[-1]), shape)
        self.bare = False
        return self.call("relu_concat", where, (*arrived, *cropped), shape) if buffer is None else buffer


FOLDS: dict[str, Callable[[_Fold, Op, list[int]], int]] = {
    "conv": _Fold.conv_op,
    "up_conv": _Fold.conv_op,
    "norm": _Fold.relu,
    "relu": _Fold.relu,
    "up_sample": _Fold.up_sample,
    "pool": _Fold.pool,
    "crop": _Fold.crop_op,
    "join": _Fold.join,
    "add": _Fold.same,
    "sigmoid": _Fold.same,
    "multiply": _Fold.multiply,
    "dropout": _Fold.dropout,
    "amax": _Fold.amax,
    "present": _Fold.present,
    "layer": _Fold.layer,
    "up_layer": _Fold.up_layer,
    "up_join_layer": _Fold.up_layer,
    "up_conv_layer": _Fold.up_layer,
    "relu_join": _Fold.relu_join,
}
