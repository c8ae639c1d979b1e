"""The arithmetic of a network: a table of functions, one a kind of op, and the loop that runs a program on them.

`REFERENCE` is plain PyTorch and the definition of every op: kernels are validated against it, and counting is always
done on it. `REFERENCE.replacing(join=...)` is a one-kernel ablation. Functions take the modules that hold the weights,
so that a replacement may fold or pack them, and never own state of their own.

Lifetimes are one rule: a result is dropped by its last reader. It hands over what it alone still holds in a list, so
that a function which lets go of its input, and goes on, has freed it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipcost.unet_models.program import Op, Program
from skipcost.unet_models.program import drops as last_reads
from skipcost.unet_models.topology import INTERPOLATIONS

if TYPE_CHECKING:
    from skipcost.unet_models.topology import Conv, Gate


class ConvNormAct(nn.Module):
    """The weights of a convolution, its norm and its ReLU.

    `valid` takes the padding away; a 1x1 or transposed convolution has none. Padding is a number, never the word
    "same", which fvcore counts as zero operations.
    """

    def __init__(self, record: Conv, *, valid: bool) -> None:
        super().__init__()
        padding = 0 if valid else record.kernel // 2
        self.conv = nn.Conv2d(record.in_channels, record.out_channels, record.kernel, padding=padding, bias=record.bias)
        self.norm = _norm(record)
        self.act = record.act

    def without_act(self) -> ConvNormAct:
        """Return the same layer, the same weights, without its ReLU."""
        layer = copy(self)
        layer.act = False
        return layer


class AttentionGate(nn.Module):
    """The weights of a gate: three 1x1 convolutions, each with the network's norm."""

    def __init__(self, record: Gate) -> None:
        super().__init__()
        self.x = ConvNormAct(record.x, valid=False)
        self.signal = ConvNormAct(record.signal, valid=False)
        self.psi = ConvNormAct(record.psi, valid=False)


def _norm(record: Conv) -> nn.Module | None:
    channels = record.out_channels
    match record.norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return nn.InstanceNorm2d(channels, affine=True)
        case "group":
            return nn.GroupNorm(record.norm_groups, channels)
    return None


def conv_norm_act(layer: ConvNormAct, x: Tensor) -> Tensor:
    """Convolve (N, C, H, W), then norm and ReLU where the layer has them."""
    x = layer.conv(x)
    if layer.norm is not None:
        x = layer.norm(x)
    return functional.relu(x, inplace=True) if layer.act else x


def up_conv(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """2x2 transposed convolution, stride 2: (N, C, H, W) -> (N, C', 2H, 2W)."""
    result: Tensor = layer(x)
    return result


def up_sample(x: Tensor, factor: int, how: str) -> Tensor:
    """Enlarge (N, C, H, W) by a whole factor. how: a key of INTERPOLATIONS."""
    mode, align_corners = INTERPOLATIONS[how]  # PyTorch takes no False for nearest
    return functional.interpolate(x, scale_factor=float(factor), mode=mode, align_corners=align_corners or None)


def pool(x: Tensor, factor: int, *, ceil: bool) -> Tensor:
    """Max-pool (N, C, H, W) by `factor`, which is kernel and stride; an incomplete window counts only with `ceil`."""
    return functional.max_pool2d(x, factor, ceil_mode=ceil)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Centre-crop (N, C, H, W) at offset (H - height) // 2; a view."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    if x.shape[-2:] == (height, width):
        return x
    return x[..., top : top + height, left : left + width]


def smallest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Return the smallest height and width among maps."""
    return min(m.shape[-2] for m in maps), min(m.shape[-1] for m in maps)


def crop_all(maps: Sequence[Tensor]) -> list[Tensor]:
    """Centre-crop all maps to the smallest height and width among them."""
    height, width = smallest(maps)
    return [crop(m, height, width) for m in maps]


def _concatenated(maps: list[Tensor]) -> Tensor:
    return torch.cat(maps, 1)


def _added(maps: list[Tensor]) -> Tensor:
    result = maps[0] + maps[1]  # a new map: an encoder map that others still read is never written to
    for other in maps[2:]:
        result += other
    return result


JOINS: dict[str, Callable[[list[Tensor]], Tensor]] = {"concat": _concatenated, "sum": _added}


def merge(maps: list[Tensor], how: str) -> Tensor:
    """Centre-crop all maps to the smallest of them, then join them: concatenate the channels, or add."""
    cropped = crop_all(maps)
    return cropped[0] if len(cropped) == 1 else JOINS[how](cropped)


def present(scores: Tensor, like: Tensor) -> Tensor:
    """Return 1 where the second of two scores (N, 2) is the larger, 0 elsewhere and in a tie: (N, 1, 1, 1).

    Compared as logits: after a sigmoid in 32 bits two saturated scores would tie. The comparison passes no gradient;
    the classifier learns from its own loss. like: whose type the result has.
    """
    return (scores[:, 1] > scores[:, 0]).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Step(NamedTuple):
    """An op, ready to run: its function, the paths of its modules, and what it is the last to read."""

    function: Function
    op: Op
    layers: tuple[tuple[str, ...], ...]
    drops: tuple[int, ...]
    inside: tuple[Step, ...] = ()  # its parts, which its function may run one by one


Function = Callable[[Step, list[Any], list[Any]], Any]
"""What runs an op, given its modules and the maps that it reads. It owns the list of maps: what it takes out of it, and
nobody reads later, is dropped as soon as it lets go of it."""


def _conv(_: Step, layers: list[Any], maps: list[Any]) -> Any:
    return layers[0].conv(maps.pop())


def _norm_of(_: Step, layers: list[Any], maps: list[Any]) -> Any:
    return layers[0].norm(maps.pop())


def _relu(_step: Step, _layers: list[Any], maps: list[Any]) -> Tensor:
    return functional.relu(maps.pop(), inplace=True)


def _up_conv(_: Step, layers: list[Any], maps: list[Any]) -> Tensor:
    return up_conv(layers[0], maps.pop())


def _up_sample(step: Step, _: list[Any], maps: list[Any]) -> Tensor:
    return up_sample(maps.pop(), step.op.factor, step.op.how)


def _pool(step: Step, _: list[Any], maps: list[Any]) -> Tensor:
    return pool(maps.pop(), step.op.factor, ceil=step.op.how == "ceil")


def _crop(_step: Step, _layers: list[Any], maps: list[Any]) -> Tensor:
    return crop(maps[0], *smallest(maps))


def _join(step: Step, _: list[Any], maps: list[Any]) -> Tensor:
    return merge(maps, step.op.how)


def _add(_step: Step, _layers: list[Any], maps: list[Any]) -> Any:
    return maps[0] + maps[1]


def _sigmoid(_step: Step, _layers: list[Any], maps: list[Any]) -> Tensor:
    return torch.sigmoid(maps.pop())


def _multiply(_step: Step, _layers: list[Any], maps: list[Any]) -> Any:
    return maps[0] * maps[1]


def _dropout(_: Step, layers: list[Any], maps: list[Any]) -> Tensor:
    return functional.dropout(maps.pop(), 0.5, layers[0].training)


def _amax(_step: Step, _layers: list[Any], maps: list[Any]) -> Any:
    """Global max pooling: (N, C, H, W) -> (N, C)."""
    return maps[0].amax(tuple(range(2, maps[0].ndim)))


def _present(_step: Step, _layers: list[Any], maps: list[Any]) -> Tensor:
    return present(*maps)


def _pick(step: Step, _: list[Any], maps: list[Any]) -> Any:
    return maps[0][step.op.factor]


FUNCTIONS: dict[str, Function] = {
    "conv": _conv,
    "norm": _norm_of,
    "relu": _relu,
    "up_conv": _up_conv,
    "up_sample": _up_sample,
    "pool": _pool,
    "crop": _crop,
    "join": _join,
    "add": _add,
    "sigmoid": _sigmoid,
    "multiply": _multiply,
    "dropout": _dropout,
    "amax": _amax,
    "present": _present,
    "pick": _pick,
}


def _as_it_is(program: Program) -> Program:
    return program


@dataclass(frozen=True, slots=True)
class Ops:
    """How a network is executed: the function of every kind of op, and what is rewritten before.

    rewrite: makes the list that runs of the one that `lower` gives; the kinds that it makes need functions.
    around: makes the context in which one forward pass runs.
    """

    functions: Mapping[str, Function]
    rewrite: Callable[[Program], Program] = _as_it_is
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    def replacing(self, **functions: Function) -> Ops:
        """Return the same with other functions for some kinds."""
        return replace(self, functions={**self.functions, **functions})


REFERENCE = Ops(FUNCTIONS)


def prepare(ops: Sequence[Op], functions: Mapping[str, Function], kept: Container[int], given: int) -> tuple[Step, ...]:
    """Make ops ready to run, where so many results are there before; `kept` are those that stay."""
    return tuple(
        Step(functions[op.kind], op, op.layers, drops, _inside(op, functions))
        for op, drops in zip(ops, last_reads(ops, kept, given), strict=True)
    )


def _inside(op: Op, functions: Mapping[str, Function]) -> tuple[Step, ...]:
    last = len(op.reads) + len(op.parts) - 1
    return prepare(op.parts, functions, op.outputs or (last,), len(op.reads)) if op.parts else ()


def run(steps: Sequence[Step], find: Callable[[tuple[str, ...]], Any], results: list[Any]) -> None:
    """Run steps one after the other, and drop each result when its last reader takes it.

    find: returns the module at a path. results: what is given; every step adds its own.
    """
    for step in steps:
        layers = [find(path) for path in step.layers]
        results.append(step.function(step, layers, take(step, results)))


def take(step: Step, results: list[Any]) -> list[Any]:
    """Return the results that a step reads; those that it is the last to read are its alone."""
    taken = [results[read] for read in step.op.reads]
    for number in step.drops:
        if number < len(results):
            results[number] = None
    return taken
