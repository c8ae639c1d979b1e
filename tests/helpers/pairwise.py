"""Variants, skip schemes and modes without their whole product.

each_pair   any two of them meet: half of the product
each_value  each skip scheme once, each variant in both modes: for what follows from another test of the same values
"""

from __future__ import annotations

import pytest

from skipcost.bench.cases.case import CHOICES
from skipcost.unet_models import SKIPS, VARIANTS

MODES = tuple(CHOICES["mode"])
PAIRWISE = [
    (variant, skip, MODES[(row + column) % len(MODES)])
    for row, variant in enumerate(VARIANTS)
    for column, skip in enumerate(SKIPS)
]
each_pair = pytest.mark.parametrize(("variant", "skip", "mode"), PAIRWISE)
each_value = pytest.mark.parametrize(
    ("variant", "skip", "mode"),
    [
        (tuple(VARIANTS)[at % len(VARIANTS)], skip, MODES[at // len(VARIANTS) % len(MODES)])
        for at, skip in enumerate(SKIPS)
    ],
)
