"""What a network's program does, call by call, with the sizes: a fold over the very list that the executor runs.

The calls say what is done to what and are the same for all widths and image sizes that need the same steps; the
numbers beside them are this network's. A result ends with its last reader; a `hold` stands where a function of
`backend=rewritten` keeps a map longer. With a `rule` the list is that backend's (kernels/programs/low.py), and the rule
says of each op that can be done at low resolution whether it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from skipcost.bench.memory.calls import Call, Calls, ConvDetail, Place
from skipcost.bench.memory.low_resolution import Joint, Rule, at_low, fold, is_folded, is_low
from skipcost.kernels.programs.low import low
from skipcost.unet_models.names import moment_name
from skipcost.unet_models.program import Op, lower
from skipcost.unet_models.sizes import follow
from skipcost.unet_models.topology import Conv, SkipGraph

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
