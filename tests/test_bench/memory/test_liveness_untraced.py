"""Live bytes by arithmetic are those of a real run on the CPU that only the profiler watches, to the byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from live_cells import cells, changes, turns
from profiled import profiled

from skipcost.bench.cases.case import Case
from skipcost.bench.memory.liveness import peak_bytes, timeline
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def _runs(case: Case) -> bool:
    """Whether the step can be predicted: random weights in fp16 overflow, and a scaler then leaves a step out."""
    return "fp16" not in case.precision or case.mode == "inference"


CELLS = list(islice((replace(case, device="cpu") for case in cells(2) if _runs(case)), 26))


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_the_arithmetic_equals_a_run(case: Case) -> None:
    """Both peaks, and every turn that live bytes take in the steps."""
    real = profiled(case)

    assert peak_bytes(case) == (real.peaks[0], real.peaks[-1])
    assert turns(changes(timeline(case))) == real.turns


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cell_of_the_grid_does_in_training(variant: str, skip: str) -> None:
    """A training step of every variant and skip scheme, two images of an odd size."""
    case = Case(spec=ModelSpec(variant=variant, skip=skip, depth=2, width=4), batch=2, height=19, width=22)
    case = replace(case, mode="training")

    real = profiled(case)

    assert peak_bytes(case) == (real.peaks[0], real.peaks[-1])
    assert turns(changes(timeline(case))) == real.turns


def test_a_scaler_is_counted() -> None:
    """Under amp-fp16 a training step has a gradient scaler, with numbers of its own."""
    case = Case(spec=ModelSpec(depth=1, width=2, norm="group"), height=16, width=16, mode="training", loss="dice")

    real = profiled(replace(case, precision="amp-fp16"))

    assert peak_bytes(replace(case, precision="amp-fp16")) == (real.peaks[0], real.peaks[-1])
