"""Arithmetic, the measure that counters are held against: MACs of one forward pass, by layer and kind of operator.

A MAC for each element of the weight and position of every convolution, for each pair that a matrix product or an
attention multiplies. KINDS at the bottom is the one place for a further operator. A layer is a module by its path; one
that is registered under several paths has the first of them.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipcost.bench.measure.watching import Layers, Watching

CONVOLUTION, TRANSPOSED, PRODUCT = "convolution", "transposed convolution", "matrix product"
ATTENTION, RECURRENT = "attention", "recurrent layer"
ACTIVATED = "matrix product with activation"  # PyTorch's one operator for both

Macs = list[tuple[str, int]]  # by kind


@dataclass(frozen=True, slots=True)
class Place:
    """One layer by its module's path, the kind of operator in it, and its MACs.

    `whole`: PyTorch runs the layer in one piece; what a counter says of modules inside of it is the layer's.
    """

    layer: str
    kind: str
    macs: int
    whole: bool = False


def paths_of(network: nn.Module) -> dict[str, str]:
    """Every path under which a module is registered, in order, and the first path of that module."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}

    def walk(path: str, module: nn.Module, above: frozenset[int]) -> None:
        found[path] = first.setdefault(id(module), path)
        for name, child in module._modules.items():  # noqa: SLF001 - named_children leaves out a second name
            if child is not None and id(child) not in above:
                walk(f"{path}.{name}" if path else name, child, above | {id(child)})

    walk("", network, frozenset({id(network)}))
    return found


def aliases_of(paths: dict[str, str]) -> dict[str, list[str]]:
    """First paths of modules with several, and the others; what lies inside of an alias is not named again."""
    found: dict[str, list[str]] = {}
    for path, first in paths.items():
        above = path.rpartition(".")[0]
        if path != first and paths[above] == above:
            found.setdefault(first, []).append(path)
    return found


def layers_of(network: nn.Module) -> Layers:
    """Follow the path of the module that runs; empty in the network itself."""
    return Layers({id(module): name for name, module in network.named_modules()})


def arithmetic(network: nn.Module, image: Tensor) -> list[Place]:
    """Every convolution, matrix product and attention of a forward pass, by the shapes that it is called with.

    Summed by layer and kind. A mask saves nothing: every pair of positions counts.
    """
    sums: Tally[tuple[str, str, bool]] = Tally()

    def seen(func: Any, args: tuple[Any, ...], _keywords: object, result: Any) -> None:
        if macs := KINDS.get(func.overloadpacket):
            for kind, count in macs(args, result):
                sums[layers.layer, kind, macs in WHOLE] += count

    with torch.no_grad(), layers_of(network) as layers, Watching(seen):
        network(image)
    return [Place(layer, kind, macs, whole) for (layer, kind, whole), macs in sums.items()]


def _convolution(args: tuple[Any, ...], result: Tensor) -> Macs:
    image, weight, transposed = args[0], args[1], args[6]
    positions = image.shape[0] * math.prod((image if transposed else result).shape[2:])
    return [(TRANSPOSED if transposed else CONVOLUTION, weight.numel() * positions)]


def _product(left: int, kind: str = PRODUCT) -> Callable[[tuple[Any, ...], Tensor], Macs]:
    """A product whose left factor (..., M, K) is the argument of this number; the result is (..., M, N)."""
    return lambda args, result: [(kind, result.numel() * args[left].shape[-1])]


def _summed_product(args: tuple[Any, ...], result: Tensor) -> Macs:
    batch, _, inner = args[1].shape
    return [(PRODUCT, result.numel() * batch * inner)]


def _attention(args: tuple[Any, ...], _result: object) -> Macs:
    """Of query (..., L, E), key (..., S, E) and value (..., S, V): the scores, and the values that they weigh."""
    query, key, value = args[:3]
    return [(ATTENTION, query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1]))]


def _multi_head(query: Tensor, key: Tensor) -> int:
    """The four projections of (N, L, E) and (N, S, E), and attention between them over all heads."""
    batch, length, width = query.shape
    return 2 * batch * width * (length + key.shape[1]) * width + 2 * batch * length * key.shape[1] * width


def _native_attention(args: tuple[Any, ...], _result: object) -> Macs:
    """MultiheadAttention in one piece, as at inference: matrix products inside."""
    return [(PRODUCT, _multi_head(args[0], args[1]))]


def _native_encoder(args: tuple[Any, ...], _result: object) -> Macs:
    """TransformerEncoderLayer in one piece: the first of its two linear layers is one operator with the activation."""
    image, first, second = args[0], args[14], args[16]
    positions = image.shape[:-1].numel()
    products = _multi_head(image, image) + positions * second.numel()
    return [(PRODUCT, products), (ACTIVATED, positions * first.numel())]


def _recurrent(args: tuple[Any, ...], _result: object) -> Macs:
    """A layer of oneDNN's over (T, N, C): its two weights, at every step."""
    image, inner, hidden = args[:3]
    return [(RECURRENT, image.shape[:2].numel() * (inner.numel() + hidden.numel()))]


KINDS: dict[Any, Callable[[tuple[Any, ...], Any], Macs]] = {
    getattr(torch.ops.aten, name): macs
    for macs, names in (
        (_convolution, "convolution"),
        (_product(0), "mm bmm mv dot vdot _int_mm"),
        (_product(1), "addmm addmm_ addmv addmv_ baddbmm baddbmm_"),
        (_product(1, ACTIVATED), "_addmm_activation"),
        (_summed_product, "addbmm"),
        (_attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
        (_attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
        (_native_attention, "_native_multi_head_attention"),
        (_native_encoder, "_transformer_encoder_layer_fwd"),
        (_recurrent, "mkldnn_rnn_layer"),
    )
    for name in names.split()
}
WHOLE = (_native_attention, _native_encoder)
