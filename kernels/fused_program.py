"""The program that `backend=fused` runs: a network's own, with ops joined that one call of a kernel does.

`layer`: a convolution with a norm that can be in it, and its ReLU. `layer_pool`: that, then also its 2x2 maximum.
`join_layer`: the maps that a layer reads concatenated, the last of them up-sampled before, by a transposed convolution
or not at all. `join_up`: that without the layer, where its norm needs the whole map first. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from skipcost.unet_models.program import Program
from skipcost.unet_models.rewriting import Group, apply, layer_at

FOLDABLE = ("batch", "none")  # norms that can be in a convolution; others need the whole map first


@lru_cache(maxsize=256)
def fuse(program: Program) -> Program:
    """Join what one call does."""
    return apply(program, _groups(program))


def _groups(program: Program) -> Iterator[Group]:
    readers = program.readers()
    for number, op in enumerate(program.ops):
        if op.kind != "conv" or not op.conv:
            continue
        (source,), layer = op.reads, layer_at(program, number, readers)
        joined = program.ops[source]
        foldable = op.conv.norm in FOLDABLE
        if joined.kind == "join" and joined.how == "concat" and readers[source] == [number]:
            *others, last = joined.reads
            up = (last,) if program.ops[last].kind == "up_conv" and readers[last] == [source] else ()
            reads = (*others, program.ops[last].reads[0] if up else last)
            if foldable:
                yield Group("join_layer", (*up, source, *layer), layer[-1], reads)
            elif up:
                yield Group("join_up", (*up, source), source, reads)
        elif foldable:
            pools = [each for each in readers[layer[-1]] if _halves(program, each)]
            if pools and layer[-1] not in program.results:
                yield Group("layer_pool", (*layer, pools[0]), layer[-1], (source,), (layer[-1], pools[0]))
            else:
                yield Group("layer", layer, layer[-1], (source,))


def _halves(program: Program, number: int) -> bool:
    op = program.ops[number]
    return op.kind == "pool" and (op.factor, op.how) == (2, "floor")
