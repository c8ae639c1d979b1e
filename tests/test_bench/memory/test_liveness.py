"""Peak live bytes by arithmetic: what a timeline promises, the envelope over batches, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_cells import cells

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.memory.liveness import (
    BACKENDS,
    KINDS,
    Timeline,
    at_peak,
    envelope,
    lives,
    moments,
    peak_bytes,
    peaks_of,
    predicted,
    summary,
    timeline,
    tracks,
)
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

TINY = Case(spec=ModelSpec(depth=1, width=1, norm="none", skip="none"), height=8, width=8)
CELLS = list(islice(cells(3), 60))
MOST_STORED = 4096  # characters of a stored timeline


def _live(line: Timeline) -> list[int]:
    """Bytes alive after each event."""
    found, live = [], 0
    for event in line.events:
        live += line.storages[abs(event) - 1].bytes * (1 if event > 0 else -1)
        found.append(live)
    return found


def test_a_tiny_network_by_hand() -> None:
    """Inference without norms: at the peak a map, its pooled half and the pool's indices are alive."""
    weights = 4 * ((9 + 1) + (9 + 1) + (18 + 2) + (36 + 2) + (8 + 1) + (9 + 1) + (9 + 1) + (2 + 2))
    image = up_sampled = 4 * 64
    bottleneck = 4 * 16 * 2
    pooled, indices = 4 * 16, 8 * 16

    peak, _ = peak_bytes(TINY)

    steps = (image + pooled + indices, bottleneck + up_sampled, 2 * up_sampled, up_sampled + 2 * up_sampled)
    assert peak == weights + image + max(steps)


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_every_storage_has_one_life(case: Case) -> None:
    """Each is made once and ends at most once, after that; kinds are KINDS; no more dies than lives."""
    line = timeline(case)

    made = [event for event in line.events if event > 0]
    ended = [event for event in line.events if event < 0]

    assert sorted(made) == list(range(1, len(line.storages) + 1))
    assert len(set(ended)) == len(ended)
    assert all(each.start < each.end for each in tracks(line))
    assert {each.kind for each in line.storages} <= set(KINDS)
    assert min(_live(line)) > 0
    assert [start for start, _ in line.moments] == sorted({start for start, _ in line.moments})


@pytest.mark.parametrize("case", [each for each in CELLS if each.mode == "training"], ids=lambda case: case.name)
def test_a_step_leaves_what_it_found(case: Case) -> None:
    """After the second training step as much is alive as after the first: a third would be like the second."""
    line = timeline(case)
    live = _live(line)

    assert live[line.steady_from - 1] == live[-1]


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_peaks_are_those_of_the_timeline(case: Case) -> None:
    """`peak_bytes`, `peaks_of` and the storages of `at_peak` say the same."""
    line = timeline(case)
    live = _live(line)

    moment, alive = at_peak(line)

    assert peaks_of(line) == peak_bytes(case)
    assert sum(each.bytes for each in alive) == peak_bytes(case)[1] == max(live[line.steady_from - 1 :])
    assert [each.bytes for each in alive] == sorted((each.bytes for each in alive), reverse=True)
    assert moment in {what for _, what in line.moments}


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_the_envelope_is_the_peak_of_every_batch(case: Case) -> None:
    """For one image and many, the lines give the larger of both peaks, and the case's batch does not matter."""
    lines = envelope(case)

    peaks = {batch: max(peak_bytes(replace(case, batch=batch))) for batch in (1, 2, 3, 7, 64, 1000)}

    assert {batch: lines.peak(batch) for batch in peaks} == peaks
    assert lines == envelope(replace(case, batch=5))


@given(index=st.integers(0, len(CELLS) - 1), limit=st.integers(0, 1 << 34))
def test_the_largest_batch_is_the_last_that_fits(index: int, limit: int) -> None:
    """Its peak is within the limit, that of one image more is not."""
    lines = envelope(CELLS[index])

    batch = lines.largest_batch(limit)

    assert batch == 0 or lines.peak(batch) <= limit
    assert lines.peak(batch + 1) > limit


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_moments_name_every_convolution(variant: str, skip: str) -> None:
    """In training each convolution runs forward and backward, and the loss and the optimizer have moments too."""
    case = Case(spec=ModelSpec(variant=variant, skip=skip, depth=2, width=4), height=32, width=32, mode="training")

    axis = moments(timeline(case))

    for node in case.graph().nodes:
        for index in range(len(node.convs)):
            where = f"{node.name}: convolution {index + 1}"
            assert axis.index(where) < axis.index("loss") < axis.index(f"backward of {where}") < axis.index("optimizer")


def test_a_map_lives_until_its_last_reader() -> None:
    """At inference the encoder's map is there from its norm to the concatenation that reads it, and no longer."""
    case = Case(spec=ModelSpec(depth=1, width=4), height=16, width=16)
    line = timeline(case)
    axis = moments(line)

    (skip,) = [each for each in lives(line) if each.name == "x0_0: convolution 2, normed"]

    assert (axis[skip.first], axis[skip.last]) == ("x0_0: convolution 2", "x0_1: concatenation")


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_stored_is_short_and_adds_up(variant: str, mode: str) -> None:
    """Storages at the peak and the rest are the peak; the whole is a few KB even of a large network."""
    case = Case(spec=ModelSpec(variant=variant, depth=5, width=32), mode=mode)

    results = predicted(case)

    stored = results[0].detail
    assert sum(size for _, _, size in stored["at_peak"]) + stored["rest"] == results[0].samples[0]
    assert [each.samples[0] for each in reversed(results)] == list(peak_bytes(case))
    assert len(json.dumps(stored)) < MOST_STORED
    assert stored == json.loads(json.dumps(summary(timeline(case))))


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"optimizer": "sgd"}, "one moment of each parameter"),
        ({"precision": "bf16"}, "half of everything"),
        ({"batch": 1}, "an image's maps"),
    ],
)
def test_what_needs_less_is_predicted_to(changes: dict[str, Any], saved: str) -> None:
    """A training step with less to keep has a lower peak."""
    case = Case(spec=ModelSpec(depth=2, width=8), batch=4, height=32, width=32, mode="training")

    less = replace(case, **changes)

    assert peak_bytes(less)[1] < peak_bytes(case)[1], saved


def test_the_first_training_step_keeps_no_gradients_yet() -> None:
    """Optimizer state is made at the end of the first step, so that a later one has it all along."""
    case = Case(spec=ModelSpec(depth=2, width=8), height=32, width=32, mode="training")
    params = 4 * case.graph().params()

    first, steady = peak_bytes(case)

    assert first < steady <= first + 2 * params + 4 * 100


def test_group_norm_under_autocast_takes_more_on_a_gpu() -> None:
    """CUDA's autocast runs group norm in 32 bits, the CPU's in 16."""
    case = Case(spec=ModelSpec(depth=2, width=8, norm="group"), height=32, width=32, mode="training")
    mixed = replace(case, precision="amp-bf16", batch=4)

    assert peak_bytes(replace(mixed, device="cuda"))[1] > peak_bytes(mixed)[1]


@pytest.mark.parametrize("backend", [each for each in CHOICES["backend"] if each not in BACKENDS])
def test_other_backends_are_refused(backend: str) -> None:
    """The arithmetic follows PyTorch's operators and says so."""
    with pytest.raises(ValueError, match=f"backend={backend} cannot be predicted by arithmetic.*eager or rewritten"):
        peak_bytes(replace(TINY, backend=backend))


@pytest.mark.parametrize("ask", [peak_bytes, timeline, envelope])
def test_a_size_at_which_a_map_vanishes_is_refused(ask: Any) -> None:
    """As geometry has it: what vanishes, and the nearest size that works."""
    case = Case(spec=ModelSpec(depth=4, padding="valid"), height=64, width=64)

    with pytest.raises(ValueError, match=r"64x64 leaves no pixel at x3_0.*188x188"):
        ask(case)
