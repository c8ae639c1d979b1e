"""What a GPU reports of `backend=rewritten`: the claims, in predictions, metrics and `fit`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gpu_cells import CARD, LABELS, assert_ordered, case_of, everything

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.fitting.lattice import lattice, read_axes
from skipcost.bench.fitting.question import predicted_source, process_bytes, target_named
from skipcost.bench.measure import here
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory import liveness
from skipcost.bench.memory import on_gpu as gpu_memory
from skipcost.bench.memory.liveness import LowCall, envelope, low_calls, peak_bytes, timeline
from skipcost.bench.memory.on_gpu import predict
from skipcost.kernels.dispatch import low_resolution as tap_choice
from skipcost.kernels.low_resolution import parts as tap_parts
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.unet_models import ModelSpec


def test_the_peak_of_one_edge_by_hand() -> None:
    """A U-Net of depth 1, inference, fp32: the edge's tap maps stand beside all that is alive, and make the peak."""
    spec = ModelSpec("unet", 1, 64, upsample="bilinear", norm="none")
    case = Case(spec, 4, 256, 256, device="cuda", backend="rewritten")
    call = low_calls(case)["x0_1: convolution 1"]
    standing = sum(each.bytes for each in timeline(case).storages if each.kind in ("parameter", "buffer", "input"))

    found = predict(case, CARD)

    skip = result = 4 * 64 * 256 * 256 * 4  # of four images
    small = 4 * 128 * 128 * 128 * 4
    taps = 4 * 128 * 128 * 9 * 64 * 4  # 144 MiB, so in one part
    packed, pixels = 4 * 9 * 128 * 64, small
    tables = sum(sum(pair) for pair in tap_parts.tables(call.rows, call.columns))
    assert found.steady.requested.low == standing + skip + small + result + packed + pixels + taps + tables
    assert found.first.requested.low == found.steady.requested.low - tables
    assert found.steady.live.likely == peak_bytes(case)[1] < found.steady.requested.low


@everything
@pytest.mark.parametrize("label", LABELS[::3])
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_claims_are_ordered(label: str, mode: str, layout: str) -> None:
    """No less is requested than is live, allocated than requested, reserved than allocated; every part has a source."""
    case = case_of(label, mode=mode, layout=layout, precision="amp-bf16")

    found = predict(case, CARD)

    for step, live in zip((found.first, found.steady), peak_bytes(case), strict=True):
        assert_ordered(step, live)
    named = {part.name: part for part in found.parts}
    assert ("tap-first's workspace" in named) == bool(low_calls(case))
    assert all(part.source for part in found.parts)


def test_where_nothing_is_rewritten_the_claim_is_that_of_eager() -> None:
    """A network of transposed convolutions: no GPU composes them, so the same runs."""
    for mode in CHOICES["mode"]:
        case = case_of("unet/d2/w8/concat", mode=mode, precision="bf16")

        assert predict(case, CARD) == predict(replace(case, backend="eager"), CARD)


@pytest.mark.parametrize("backend", liveness.BACKENDS)
def test_what_counts_is_what_runs_on_the_gpu(backend: str) -> None:
    """A case that names the CPU is asked as if it named the GPU, where another form may be the cheaper."""
    case = Case(ModelSpec("unet3+", 3, 64), 1, 256, 256, "training", "bf16", device="cuda", backend=backend)
    cpu = replace(case, device="cpu")

    assert predict(cpu, CARD) == predict(case, CARD)
    assert (low_calls(cpu) != low_calls(case)) == (backend == "rewritten")


def test_composed_convolutions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has measured them on a GPU, so none are taken there; if that changes, this must be told, not guessed."""
    case = case_of("unet/d3/w64/concat", mode="inference", height=256, width=256)
    assert not low_calls(case)
    assert envelope(case).peak(2) == peak_bytes(case)[1]

    monkeypatch.setattr(tap_choice, "COMPOSED", {("cuda", "fp32"): 0.1})
    monkeypatch.setattr(liveness, "COMPOSED", {("cuda", "fp32"): 0.1})

    with pytest.raises(ValueError, match=r"to compose transposed convolutions was not counted.*use backend=eager"):
        predict(case, CARD)
    with pytest.raises(ValueError, match="the batch decides which transposed convolutions"):
        envelope(case)


def test_other_backends_are_refused_with_those_that_are_not() -> None:
    """What their kernels take was not measured."""
    assert not any(gpu_memory.why_not(case_of(backend=each)) for each in liveness.BACKENDS)
    with pytest.raises(ValueError, match=r"backend=fused is not predicted.*use backend=eager or rewritten"):
        predict(case_of(backend="fused"), CARD)


def test_the_metrics_are_rows_of_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep on a GPU predicts where the backend is rewritten, too, with what tap-first makes among the open parts."""
    monkeypatch.setattr(here, "describe_gpus", lambda: [{"name": CARD.driver_names[0]}])
    case = Case(ModelSpec("unet3+", 2, 64), 2, 128, 128, "training", "bf16", device="cuda", backend="rewritten")
    names = [
        name for name in METRICS if name.startswith("peak_memory_predicted_") and METRICS[name].devices == ("cuda",)
    ]

    (first, *_) = METRICS[names[0]].measure(case, Budget())

    assert all(METRICS[name].backends == liveness.BACKENDS for name in names)
    assert first.outcome == "ok"
    low, high = first.detail["parts"]["tap-first's workspace"]
    assert 0 < low <= high


FIXED = {"device": "cuda", "mode": "training", "size": "128", "precision": "bf16"}
CHOSEN = {"skip": ["concat"], "depth": ["2"], "width": ["16..32"], "backend": ["eager", "rewritten"]}


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_fit_has_figures_for_rewritten_networks_on_a_gpu(mode: str) -> None:
    """Every line of the lattice, transposed convolutions too: what a process takes, above the floor of the search."""
    source = predicted_source(target_named("h100"), case_of())

    lines = lattice(read_axes(CHOSEN), FIXED | {"mode": mode}, 2).lines

    assert {line.first.backend for line in lines} == {"eager", "rewritten"}
    for line in lines:
        case: Any = line.at(32)
        floor, found = source.floor(case).peak(case.batch), process_bytes(case, CARD)
        assert floor <= found.low <= found.likely <= found.high == source.measures["memory"](case)


def test_a_call_says_what_stands_beside_it() -> None:
    """The fields of a call, for one that is alone and one that is not."""
    specs = [ModelSpec(variant, 1, 64, upsample="bilinear") for variant in ("unet3+", "unet++")]
    cases = [Case(spec, height=256, width=256, device="cuda", backend="rewritten") for spec in specs]

    (alone,), (joined,) = (low_calls(case).values() for case in cases)

    axis = Axis(128, 2, "bilinear", False, 0, 256, 3, 1)
    assert alone == LowCall(axis, axis, (128, 64), joined=False, sliced=False)
    assert joined == LowCall(axis, axis, (128, 64), joined=True, sliced=False)
