"""Live bytes by arithmetic equal a dispatch-mode trace without data, to the byte, all over the project's tables."""

from __future__ import annotations

from itertools import islice

import pytest
from live_cells import cells, pairs

from skipcost.bench.cases import CHOICES, Case
from skipcost.bench.counting import predicted_peaks
from skipcost.bench.liveness import peak_bytes
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = list(islice(cells(0), 320))


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_the_arithmetic_equals_the_trace(case: Case) -> None:
    """First and steady peak, as a dispatch mode sees them."""
    first, steady, _ = predicted_peaks(case)

    assert peak_bytes(case, traced=True) == (first, steady)


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_does_at_depth_3(variant: str, skip: str, mode: str) -> None:
    """The same for deeper networks."""
    case = Case(spec=ModelSpec(variant=variant, skip=skip, depth=3, width=4), height=32, width=48, mode=mode)

    first, steady, _ = predicted_peaks(case)

    assert peak_bytes(case, traced=True) == (first, steady)


def test_the_cells_meet_every_pair_of_values() -> None:
    """Any two values of the tables that can meet in a case do so in one that is checked."""
    possible = set().union(*map(pairs, islice(cells(1), 2000)))

    assert set().union(*map(pairs, CELLS)) == possible
