"""One network of every variant, inference and a training step, with what is counted and predicted of it beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.timing import Budget
from skipcost.unet_models import VARIANTS, ModelSpec

COUNTED = ("params", "conv_macs", "activations", "peak_memory_predicted_bytes")


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_network(timed: Callable[..., None], variant: str, mode: str) -> None:
    """Time a step as a sweep does."""
    case = Case(spec=ModelSpec(variant=variant, depth=3, width=16), batch=2, height=96, width=96, mode=mode)
    counted = {
        result.metric: result.samples[0]
        for name in COUNTED
        for result in METRICS[name].measure(case, Budget())
        if result.metric == name
    }

    timed(make_subject(case, "cpu").step, **counted)
