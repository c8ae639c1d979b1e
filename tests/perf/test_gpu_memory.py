"""Predicting GPU memory: one replay of a training step's timeline, and a whole prediction with its three."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skipcost.bench.cases.case import Case, usual_values
from skipcost.bench.memory.allocator import replay
from skipcost.bench.memory.liveness import timeline
from skipcost.bench.memory.on_gpu import predict
from skipcost.kernels.devices import devices
from skipcost.unet_models import VARIANTS, ModelSpec


def case_of(variant: str) -> Case:
    """A training step as a GPU usually runs it, at depth 4."""
    return Case(spec=ModelSpec(variant=variant, width=32), **usual_values("cuda", "training", 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay(timed: Callable[..., None], variant: str) -> None:
    """Time the allocator's replay of two steps."""
    steps = timeline(case_of(variant))

    timed(lambda: replay(steps), events=len(steps.events))


@pytest.mark.parametrize("variant", VARIANTS)
def test_predict(timed: Callable[..., None], variant: str) -> None:
    """Time a prediction from the case to the intervals; the timeline's program is known by then."""
    case, device = case_of(variant), devices()["h100"]

    timed(lambda: predict(case, device))
