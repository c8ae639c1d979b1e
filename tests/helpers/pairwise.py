"""Variants, skip schemes and modes without their product: each skip scheme once, each variant in both modes.

For what follows, for all that is not drawn here, from other tests of the same values.
"""

from __future__ import annotations

import pytest

from skipcost.bench.cases.case import CHOICES
from skipcost.unet_models import SKIPS, VARIANTS

MODES, NAMES = tuple(CHOICES["mode"]), tuple(VARIANTS)
each_value = pytest.mark.parametrize(
    ("variant", "skip", "mode"),
    [(NAMES[at % len(NAMES)], skip, MODES[at // len(NAMES) % len(MODES)]) for at, skip in enumerate(SKIPS)],
)
