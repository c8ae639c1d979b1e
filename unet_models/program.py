"""A network as the list of what is done: `lower` puts a graph into the order in which it runs.

This is the one place that knows the order. Everything else about a network is a fold over the list (sizes, MACs, live
bytes, kernel calls) or a rewrite of it, list to list (the backends); the executor runs it op by op. It knows neither
sizes nor the number of dimensions: where maps meet, an op says that they are cropped to the smallest of them, not to
what. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from skipcost.unet_models.topology import Conv, Edge, Gate, Head, Node, SkipGraph

IMAGE = "image"  # the name of the network's input among the maps
MASK = "mask"  # where a classifier's verdict is applied to the heads' maps


class Op(NamedTuple):
    """One step: what is done (`kind`), where, and the numbers of the ops whose results it reads.

    where: an edge's or node's name, "head of x0_4", "classifier on x4_0" or "mask". part: what of that: "0" and so on
    for a node's convolutions, "merge"; "up", "resample", "gate.x", "gate.signal", "gate.psi", "gate", "conv" and
    "project" on an edge; "" where there is one thing alone. layer: the path of the module that has its weights.
    conv: the record of that layer, which a convolution, its norm and its ReLU share.

    Kinds, each with what else it needs: `image`; `conv` (padding) and `up_conv`; `norm`; `relu`; `pool` (factor; how:
    floor or ceil) and `up_sample` (factor; how: a key of INTERPOLATIONS); `crop`, the first of the maps to the smallest
    of all; `join`, all cropped to the smallest (how: concat or sum); a gate's `add`, `sigmoid` and `multiply`; a
    classifier's `dropout`, `amax` and `present`, which is 1 where its maxima say that there is an organ.

    A rewrite makes kinds of its own: one op that stands for several, its `parts`. They are a small program: their reads
    count what the op itself reads first, then the parts before them. Where it has several results, `outputs` says which
    parts make them, and a `pick` (factor: which) takes one.
    """

    kind: str
    where: str
    part: str
    reads: tuple[int, ...]
    layer: tuple[str, ...] = ()
    conv: Conv | None = None
    padding: int = 0
    factor: int = 1
    how: str = ""
    parts: tuple[Op, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The paths of all modules whose weights it needs, in the order in which they are used."""
        paths = (path for part in self.parts for path in part.layers) if self.parts else (self.layer,)
        return tuple(dict.fromkeys(path for path in paths if path))

    def reading(self, reads: tuple[int, ...]) -> Op:
        """Return the same op on other results. A rewrite makes most of its ops so: half of `_replace`'s time."""
        fields = list(self)
        fields[3] = reads
        return Op._make(fields)

    def part_of(self, *kinds: str) -> Op | None:
        """The first of its parts that is of one of the kinds."""
        return next((part for part in self.parts if part.kind in kinds), None)


class Program(NamedTuple):
    """The ops in the order in which they run, and the numbers of those whose results the network returns.

    outputs: one of each head, the deployed one first. class_logits: the classifier's, where there is one.
    """

    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    in_channels: int
    class_logits: int | None = None

    def __hash__(self) -> int:
        """Hash a part of it, which tells most networks apart: folds are cached by program, and ask each time."""
        return hash((len(self.ops), self.ops[-1], self.outputs))

    @property
    def results(self) -> tuple[int, ...]:
        """All that the network returns."""
        return self.outputs if self.class_logits is None else (*self.outputs, self.class_logits)

    def readers(self) -> list[list[int]]:
        """By op, the numbers of those that read its result, in order."""
        return readers(self.ops)

    def drops(self) -> list[tuple[int, ...]]:
        """By op, the numbers of those whose results nobody needs once it has run; what is returned stays."""
        return drops(self.ops, self.results)


def readers(ops: Sequence[Op], given: int = 0) -> list[list[int]]:
    """By what is given and by op, the numbers of the ops that read its result, in order; `given` come first."""
    found: list[list[int]] = [[] for _ in range(given + len(ops))]
    for number, op in enumerate(ops, given):
        for read in dict.fromkeys(op.reads):
            found[read].append(number)
    return found


def drops(ops: Sequence[Op], kept: Container[int], given: int = 0) -> list[tuple[int, ...]]:
    """By op, the numbers of those whose results nobody needs once it has run, but for those that are kept."""
    found: list[list[int]] = [[] for _ in ops]
    for number, reading in enumerate(readers(ops, given)):
        if number not in kept and (reading or number >= given):
            found[(reading[-1] if reading else number) - given].append(number)
    return [tuple(each) for each in found]


def near(op: Op) -> tuple[int, ...]:
    """Return what an op reads the values of, as opposed to a size alone or what passes no gradient."""
    if op.kind == "present":
        return ()
    return op.reads[:1] if op.kind == "crop" else op.reads


@lru_cache(maxsize=1024)  # many folds ask for the same few
def lower(graph: SkipGraph) -> Program:
    """Put a graph into the order in which it runs."""
    run = _Lowering(graph.padding == "valid")
    maps = {IMAGE: run.add("image", IMAGE, "", ())}
    heads, logits, scores = {head.node: head for head in graph.heads}, {}, None
    for node in graph.nodes:
        maps[node.name] = run.node(node, maps)
        if node.name in heads:
            logits[node.name] = run.head(heads[node.name], maps[node.name])
        if graph.classifier and graph.classifier.node == node.name:
            scores = run.classify(graph.classifier, maps[node.name])
    outputs = run.cropped([("heads", logits[head.node]) for head in graph.heads], "")
    if scores is not None:
        outputs = run.mask(outputs, scores)
    return Program(tuple(run.ops), tuple(outputs), graph.in_channels, scores)


@dataclass(slots=True)
class _Lowering:
    """The ops so far; a map is the number of the op that makes it."""

    valid: bool
    ops: list[Op] = field(default_factory=list)

    def add(
        self,
        kind: str,
        where: str,
        part: str,
        reads: tuple[int, ...],
        layer: tuple[str, ...] = (),
        conv: Conv | None = None,
        padding: int = 0,
        factor: int = 1,
        how: str = "",
    ) -> int:
        self.ops.append(Op(kind, where, part, reads, layer, conv, padding, factor, how))
        return len(self.ops) - 1

    def layer(self, x: int, conv: Conv, at: tuple[str, str], path: tuple[str, ...], *, valid: bool = False) -> int:
        """Convolve, then norm and ReLU where the record has them."""
        where, part = at
        x = self.add("conv", where, part, (x,), path, conv, 0 if valid else conv.kernel // 2)
        if conv.norm != "none":
            x = self.add("norm", where, part, (x,), path, conv)
        return self.add("relu", where, part, (x,), path, conv) if conv.act else x

    def cropped(self, maps: list[tuple[str, int]], part: str) -> list[int]:
        """Crop maps, each with where it is, to the smallest of them."""
        if len(maps) == 1:
            return [maps[0][1]]
        rest = [tuple(other for _, other in maps if other != x) for _, x in maps]
        return [self.add("crop", where, part, (x, *others)) for (where, x), others in zip(maps, rest, strict=True)]

    def node(self, node: Node, maps: dict[str, int]) -> int:
        """Carry every input to the node; the map that steers a gate is up-sampled once, for the gate and its edge."""
        signal, deeper, arriving = None, node.deeper, []
        if deeper and any(edge.gate for edge in node.inputs):
            signal = self.resample(maps[deeper.source], deeper)
        for edge in node.inputs:
            where = edge.name
            x = signal if signal is not None and edge is deeper else self.resample(maps[edge.source], edge)
            if edge.gate and signal is not None:
                x = self.gate(edge.gate, x, signal, where)
            if edge.conv:
                x = self.layer(x, edge.conv, (where, "conv"), ("edges", where, "conv"), valid=self.valid)
            if edge.project:
                x = self.layer(x, edge.project, (where, "project"), ("edges", where, "project"))
            arriving.append(x)
        x = arriving[0]
        if len(arriving) > 1:
            x = self.add("join", node.name, "merge", tuple(arriving), how=node.merge)
        for index, conv in enumerate(node.convs):
            path = "nodes", node.name, str(index)
            x = self.layer(x, conv, (node.name, str(index)), path, valid=self.valid)
        return x

    def resample(self, x: int, edge: Edge) -> int:
        if edge.up:
            return self.add("up_conv", edge.name, "up", (x,), ("edges", edge.name, "up"), edge.up)
        if edge.shift > 0:
            return self.add("up_sample", edge.name, "resample", (x,), factor=1 << edge.shift, how=edge.mode or "")
        if edge.shift < 0:
            how = "ceil" if edge.skip else "floor"
            return self.add("pool", edge.name, "resample", (x,), factor=1 << -edge.shift, how=how)
        return x

    def gate(self, gate: Gate, x: int, signal: int, where: str) -> int:
        x, signal = self.cropped([(where, x), (where, signal)], "gate")
        path = "edges", where, "gate"
        left = self.layer(x, gate.x, (where, "gate.x"), (*path, "x"))
        right = self.layer(signal, gate.signal, (where, "gate.signal"), (*path, "signal"))
        joint = self.add("relu", where, "gate", (self.add("add", where, "gate", (left, right)),))
        psi = self.layer(joint, gate.psi, (where, "gate.psi"), (*path, "psi"))
        weight = self.add("sigmoid", where, "gate", (psi,))
        return self.add("multiply", where, "gate", (x, weight))

    def head(self, head: Head, x: int) -> int:
        where = f"head of {head.node}"
        x = self.layer(x, head.conv, (where, ""), ("heads", head.node), valid=self.valid)
        if not head.shift:
            return x
        return self.add("up_sample", where, "resample", (x,), factor=1 << head.shift, how=head.mode)

    def classify(self, head: Head, x: int) -> int:
        """Huang et al. (2020), sec. 2.4: dropout, 1x1 convolution, global max pooling: (N, C, ...) -> (N, 2)."""
        at, path = (f"classifier on {head.node}", ""), ("classifier",)
        x = self.layer(self.add("dropout", *at, (x,), path), head.conv, at, path)
        return self.add("amax", *at, (x,))

    def mask(self, outputs: list[int], scores: int) -> list[int]:
        """Turn logits into probabilities, 0 where the image was judged to have no organ."""
        present = self.add("present", MASK, "", (scores, outputs[0]))
        return [self.add("multiply", MASK, "", (self.add("sigmoid", MASK, "", (each,)), present)) for each in outputs]
