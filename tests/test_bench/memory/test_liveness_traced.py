"""Live bytes by arithmetic equal a dispatch-mode trace without data, to the byte, all over the project's tables."""

from __future__ import annotations

from itertools import islice

import pytest
from live_cells import Followed, cells, changes, covering, pairs, turns
from pairwise import each_value

from skipcost.bench.cases.case import Case
from skipcost.bench.measure.counting import predicted_peaks
from skipcost.bench.measure.subject import AUTOCAST, Subject
from skipcost.bench.measure.tracing import trace
from skipcost.bench.memory.liveness import peak_bytes, peaks_of, timeline
from skipcost.unet_models import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = covering(islice(cells(0), 400), pairs)


def _traced(case: Case) -> tuple[tuple[int, int], list[int]]:
    """Peaks of the first step and the last, and the course of live bytes."""

    def follow(subject: Subject) -> tuple[list[int], list[int]]:
        peaks = []
        with Followed(subject.tensors) as tracker:
            for _ in range(2 if case.mode == "training" else 1):
                tracker.peak = tracker.live
                subject.step()
                peaks.append(tracker.peak)
            return peaks, turns(tracker.changes)

    peaks, course = trace(case, follow)[0]
    return (peaks[0], peaks[-1]), course


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_the_arithmetic_equals_the_trace(case: Case) -> None:
    """First and steady peak, as a dispatch mode sees them, and every turn that live bytes take.

    Fake tensors, on which autocast is traced, keep layouts and replay views otherwise than tensors do, so that some
    gradients are copied in passing: there only the peaks are compared.
    """
    peaks, course = _traced(case)
    line = timeline(case, traced=True)

    assert peaks_of(line) == peak_bytes(case, traced=True) == peaks
    if case.precision not in AUTOCAST:
        assert turns(changes(line)) == course


@each_value
def test_it_does_at_depth_3(variant: str, skip: str, mode: str) -> None:
    """The same for deeper networks."""
    case = Case(spec=ModelSpec(variant=variant, skip=skip, depth=3, width=4), height=32, width=48, mode=mode)

    first, steady, _ = predicted_peaks(case)

    assert peak_bytes(case, traced=True) == (first, steady)


def test_the_cells_meet_every_pair_of_values() -> None:
    """Any two values of the tables that can meet in a case do so in one that is checked."""
    possible = set().union(*map(pairs, islice(cells(1), 2000)))

    assert set().union(*map(pairs, CELLS)) == possible
