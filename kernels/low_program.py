"""The program that `backend=rewritten` runs: a network's own, with ops joined that can be done at low resolution.

`layer`: a convolution and the batch norm that may go into its weights. `up_layer`: up-sampling without weights, then a
layer. `up_join_layer`: that with other maps concatenated in between, before which the last one is up-sampled;
`up_conv_layer`: the same of a transposed convolution. `relu_join`: all that edges do up to the ReLU with which each
ends, and their concatenation. What is done of each is decided where the sizes are known. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from skipcost.unet_models.program import Op, Program
from skipcost.unet_models.rewriting import Group, apply, flat, layer_at

UPS = ("up_layer", "up_join_layer", "up_conv_layer")  # the last map that they read is up-sampled, by the first part
JOINED = {"up_sample": "up_join_layer", "up_conv": "up_conv_layer"}


@lru_cache(maxsize=256)
def low(program: Program) -> Program:
    """Join what can be done at low resolution, then what ends in a concatenation of ReLUs."""
    return relu_joins(apply(program, _layers(program)))


def relu_joins(program: Program) -> Program:
    """Join all that edges do, where each ends in ReLU, with the concatenation of what they give."""
    return apply(program, _relu_joins(program))


def _layers(program: Program) -> Iterator[Group]:
    readers = program.readers()
    for number, op in enumerate(program.ops):
        if op.kind != "conv" or not op.conv or op.part.startswith("gate"):
            continue
        (source,), layer = op.reads, layer_at(program, number, readers)
        before = program.ops[source]
        alone = readers[source] == [number] and op.conv.kernel > 1  # a projection is few MACs either way
        last = before.reads[-1] if before.kind == "join" and before.how == "concat" else source
        up = program.ops[last]
        if alone and up.kind in JOINED and (last == source or readers[last] == [source]):
            between = () if last == source else (source,)
            kind = "up_layer" if up.kind == "up_sample" and last == source else JOINED[up.kind]
            others = before.reads[:-1] if between else ()
            yield Group(kind, (last, *between, *layer), layer[-1], (*others, *up.reads))
        elif op.conv.norm == "batch":
            yield Group("layer", layer, layer[-1], (source,))


def _relu_joins(program: Program) -> Iterator[Group]:
    readers = program.readers()
    for number, op in enumerate(program.ops):
        if op.kind != "join" or op.how != "concat":
            continue
        ends = [(read, program.ops[read]) for read in op.reads]
        if not all(_is_relu_of_edge(end) and readers[read] == [number] for read, end in ends):
            continue
        edges = {end.where for _, end in ends}
        members = [*(at for at, each in enumerate(program.ops[:number]) if each.where in edges), number]
        if any(program.ops[at].part.startswith("gate") for at in members):
            continue
        sources = dict.fromkeys(read for at in members for read in program.ops[at].reads if read not in members)
        yield Group("relu_join", tuple(members), number, tuple(sources))


def _is_relu_of_edge(op: Op) -> bool:
    return op.part == "conv" and tuple(flat(op))[-1].kind == "relu"
