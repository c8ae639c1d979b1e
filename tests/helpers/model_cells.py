"""The networks that tests go through, made from the project's own tables, and how to read what they return."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import Tensor

from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipNet


def cells(depths: tuple[int, ...], width: int = 2, **values: Any) -> list[ModelSpec]:
    """VARIANTS x SKIPS x heads x depths."""
    return [
        ModelSpec(variant, depth, width, skip, classes=1, head=head, **values)
        for variant, skip, depth in itertools.product(VARIANTS, SKIPS, depths)
        for head in VARIANTS[variant].heads
    ]


def by_label(specs: list[ModelSpec]) -> pytest.MarkDecorator:
    """Parametrise a test over specs, each named by its label."""
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.label)


def outputs_of(result: Any) -> list[Tensor]:
    """Everything that a network returned, as a flat list: the maps, then class logits where there are any."""
    parts = result if isinstance(result, tuple) else (result,)
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]


def maps_of(net: SkipNet, image: Tensor) -> list[Tensor]:
    """The maps of all heads for an image, without class logits."""
    result = net(image)
    return outputs_of(result[0] if isinstance(result, tuple) else result)
