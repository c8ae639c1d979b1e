"""The networks that tests go through, made from the project's own tables, and how to read what they return."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import Tensor

from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, Program, SkipNet
from skipcost.unet_models.rewriting import Group, apply, layer_at


def cells(depths: tuple[int, ...], width: int = 2, **values: Any) -> list[ModelSpec]:
    """VARIANTS x SKIPS x heads x depths."""
    return [
        ModelSpec(variant, depth, width, skip, classes=1, head=head, **values)
        for variant, skip, depth in itertools.product(VARIANTS, SKIPS, depths)
        for head in VARIANTS[variant].heads
    ]


def label_of(value: object) -> str:
    """Name a value of a test's parameters: a spec by its label."""
    return value.label if isinstance(value, ModelSpec) else str(value)


def by_label(specs: list[ModelSpec]) -> pytest.MarkDecorator:
    """Parametrise a test over specs, each named by its label."""
    return pytest.mark.parametrize("spec", specs, ids=label_of)


def outputs_of(result: Any) -> list[Tensor]:
    """Everything that a network returned, as a flat list: the maps, then class logits where there are any."""
    parts = result if isinstance(result, tuple) else (result,)
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]


def layered(program: Program) -> Program:
    """The program with every convolution, its norm and its ReLU as one op of kind "layer"."""
    readers = program.readers()
    layers = [layer_at(program, number, readers) for number, op in enumerate(program.ops) if op.kind == "conv"]
    return apply(program, [Group("layer", each, each[-1], program.ops[each[0]].reads) for each in layers])


def maps_of(net: SkipNet, image: Tensor) -> list[Tensor]:
    """The maps of all heads for an image, without class logits."""
    result = net(image)
    return outputs_of(result[0] if isinstance(result, tuple) else result)
