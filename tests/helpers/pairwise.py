"""Variants, skip schemes and modes so that any two of them meet: half of their product."""

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
