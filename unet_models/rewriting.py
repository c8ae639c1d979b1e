"""Rewrites of a `Program`: several ops become one, which stands for them, and all others are renumbered.

What a rewrite looks for is its own business; here is how a `Group` takes the place of its members. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from skipcost.unet_models.program import Op, Program


class Group(NamedTuple):
    """Ops, by their numbers, that become one of a kind where `at` is; at last the reads, in the order that it wants.

    at: the member in whose place it comes; it also lends it its name and record. outputs: members whose results others
    read, if more than the last one's.
    """

    kind: str
    members: tuple[int, ...]
    at: int
    reads: tuple[int, ...]
    outputs: tuple[int, ...] = ()


def layer_at(program: Program, number: int, readers: list[list[int]]) -> tuple[int, ...]:
    """Return a convolution with its norm and ReLU, by their numbers; nothing else may read what is in between."""
    found, results, layer = [number], program.results, program.ops[number].layer
    while len(readers[found[-1]]) == 1 and found[-1] not in results:
        (after,) = readers[found[-1]]
        op = program.ops[after]
        if op.kind not in ("norm", "relu") or op.layer != layer:
            break
        found.append(after)
    return tuple(found)


def apply(program: Program, groups: Iterable[Group]) -> Program:
    """Put groups in the place of their members."""
    at = {group.at: group for group in groups}
    gone = {member for group in at.values() for member in group.members}
    ops: list[Op] = []
    numbers: dict[int, int] = {}  # of ops, in the new program
    for number, op in enumerate(program.ops):
        if number in at:
            group = at[number]
            ops.append(_joined(program, group, tuple(numbers[read] for read in group.reads)))
            for index, output in enumerate(group.outputs):
                picked = program.ops[output]
                ops.append(Op("pick", picked.where, picked.part, (len(ops) - 1 - index,), factor=index))
                numbers[output] = len(ops) - 1
            if not group.outputs:
                numbers[group.members[-1]] = len(ops) - 1
        elif number not in gone:
            ops.append(op.reading(tuple([numbers[read] for read in op.reads])))
            numbers[number] = len(ops) - 1
    scores = None if program.class_logits is None else numbers[program.class_logits]
    return program._replace(
        ops=tuple(ops), outputs=tuple(numbers[each] for each in program.outputs), class_logits=scores
    )


def _joined(program: Program, group: Group, reads: tuple[int, ...]) -> Op:
    """The op that stands for a group; `reads` are numbers in the new program."""
    inside = {read: index for index, read in enumerate(group.reads)}
    parts = []
    for member in group.members:
        op = program.ops[member]
        parts.append(op.reading(tuple([inside[read] for read in op.reads])))
        inside[member] = len(reads) + len(parts) - 1
    outputs = tuple(inside[each] for each in group.outputs)
    conv = program.ops[group.at]
    return Op(group.kind, conv.where, conv.part, reads, conv.layer, conv.conv, parts=tuple(parts), outputs=outputs)


def flat(op: Op) -> Iterator[Op]:
    """Yield an op's parts and theirs, or the op itself where it has none."""
    if not op.parts:
        yield op
    for part in op.parts:
        yield from flat(part)
