"""What a GPU adds to a timeline, term by term, and that the claims are ordered, bounded and named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from gpu_cells import assert_ordered

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.cases.record import Result
from skipcost.bench.measure import here
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory import workspaces
from skipcost.bench.memory.allocator import WORKSPACE, first_event, two_steps
from skipcost.bench.memory.liveness import Timeline, peak_bytes, timeline
from skipcost.bench.memory.on_gpu import (
    SCENARIOS,
    GpuMemory,
    convolution_calls,
    gathered_gradients,
    named_convolutions,
    on_device,
    predict,
)
from skipcost.bench.memory.workspaces import Interval, Part
from skipcost.kernels.devices import Device, devices
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec
from skipcost.unet_models.sizes import PlacedConv

MIB = 1 << 20
CARD = devices()["h100"]
FIGURES = ("requested", "allocated", "reserved", "process")
LABELS = [f"{variant}/d2/w8/{skip}" for variant in VARIANTS for skip in SKIPS] + [
    "unet3+/d2/w8/concat/head=guided/classes=1",
    "unet++/d3/w8/concat/head=deep",
    "unet/d2/w8/concat/norm=none/padding=valid",
    "unet/d2/w8/sum/upsample=bilinear/norm=group",
]


def case_of(label: str = "unet/d2/w8/concat", **changes: object) -> Case:
    """A small case for a GPU, in training unless said."""
    usual = {"height": 92, "width": 92, "batch": 2, "mode": "training", "device": "cuda", "outputs": "all"}
    return Case(spec=ModelSpec.parse(label), **usual | changes)


def convolutions_of(case: Case) -> dict[str, PlacedConv]:
    """The case's convolutions by name."""
    return named_convolutions(case.graph(), case.height, case.width)


def parts_of(case: Case, device: Device = CARD) -> dict[str, Part]:
    """What the case needs beyond live bytes."""
    return workspaces.parts(list(convolutions_of(case).values()), case, device)


def added(case: Case, scenario: str) -> tuple[Timeline, Timeline, frozenset[int]]:
    """The steps of a case without and with what a GPU adds, and where the cache is emptied."""
    steps = two_steps(timeline(case))
    return steps, *on_device(case, steps, parts_of(case), scenario)


@pytest.mark.parametrize("label", LABELS)
def test_every_weight_of_the_timeline_belongs_to_a_convolution_of_that_name(label: str) -> None:
    """The names that tie workspaces to moments are those of the timeline, none missing and none too many."""
    case = case_of(label)

    names = {
        each.name for each in timeline(case).storages if each.kind == "parameter" and each.name.endswith(": weight")
    }

    assert names == {f"{name}: weight" for name in convolutions_of(case)}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
def test_every_convolution_has_a_workspace_forward_and_backward_in_both_steps(label: str, precision: str) -> None:
    """A workspace lives while the output, or the weight's gradient, has just been made."""
    case = case_of(label, precision=precision)
    steps = two_steps(timeline(case))
    convolutions, value = convolutions_of(case), workspaces.value_bytes(case)

    calls = convolution_calls(steps, convolutions, case)

    assert sorted(calls.values()) == sorted(2 * [*convolutions, *(f"backward of {name}" for name in convolutions)])
    for at, moment in calls.items():
        made, placed = steps.storages[steps.events[at] - 1], convolutions[moment.removeprefix("backward of ")]
        forward = value * case.batch * placed.outputs
        assert made.bytes == (value * placed.conv.weights if moment.startswith("backward") else forward)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_what_is_added_leaves_the_timeline_itself_as_it_was(scenario: str, mode: str, layout: str) -> None:
    """Without the added storages the events are the old ones, in order, and every moment starts at its own event."""
    steps, whole, _ = added(case_of(mode=mode, layout=layout, precision="bf16"), scenario)
    own = [at for at, event in enumerate(whole.events) if abs(event) <= len(steps.storages)]

    assert [whole.events[at] for at in own] == list(steps.events)
    assert [name for _, name in whole.moments] == [name for _, name in steps.moments]
    for (old, _), (new, _) in zip(steps.moments[1:], whole.moments[1:], strict=True):
        gathers = whole.storages[abs(whole.events[new]) - 1].name == "gradient, gathered"
        assert new == own[old] - gathers
    assert whole.steady_from == own[steps.steady_from]


def test_weights_are_made_in_32_bits_and_copied_one_by_one() -> None:
    """Before the first step every weight was there twice in size, and only the copies are left."""
    case = case_of(precision="bf16")
    steps, whole, _ = added(case, "low")
    start = first_event(whole)
    made = {event for event in whole.events[:start] if event > 0} - {event + 1 for event in range(len(steps.storages))}
    ended = {-event for event in whole.events[:start] if event < 0}
    copies = {event for event in made if whole.storages[event - 1].name.endswith(", as made")}

    assert copies == ended
    assert sum(whole.storages[event - 1].bytes for event in copies) == 4 * case.graph().params()


@pytest.mark.parametrize(("layout", "precision", "share"), [
    ("contiguous", "fp32", 0), ("contiguous", "amp-bf16", 0), ("channels_last", "fp32", 1), ("contiguous", "fp16", 2),
])  # fmt: skip
def test_only_what_changes_type_or_layout_is_copied(layout: str, precision: str, share: int) -> None:
    """Weights that are made as the case wants them are not made twice."""
    case = case_of(layout=layout, precision=precision)
    weight = next(each for each in timeline(case).storages if each.kind == "parameter")

    assert workspaces.as_made(weight, case) == share * weight.bytes
    assert workspaces.as_made(replace(weight, kind="buffer"), case) == 0


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_cudnn_tries_each_shape_once_and_the_cache_is_emptied_after_it(mode: str) -> None:
    """In the first step, before the first call of a shape gets its workspace; never without cudnn.benchmark."""
    case = case_of("unet/d2/w8/none/padding=same", mode=mode, height=64, width=64)
    _, whole, emptied = added(case, "likely")
    shapes = {(placed.conv, placed.height, placed.width) for placed in convolutions_of(case).values()}
    trials = [
        at
        for at, event in enumerate(whole.events)
        if event > 0 and whole.storages[event - 1].name == "workspaces tried"
    ]

    assert len(shapes) < len(convolutions_of(case))  # two convolutions of a level are alike
    assert len(trials) == len(emptied) == len(shapes) * (2 if mode == "training" else 1)
    assert emptied == {at + 2 for at in trials}
    assert max(emptied) < whole.steady_from
    assert all(whole.storages[whole.events[at] - 1].kind == WORKSPACE for at in emptied)
    assert added(replace(case, cudnn_benchmark=False), "likely")[2] == frozenset()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_part_is_as_large_as_its_scenario_has_it(scenario: str) -> None:
    """Each call has the workspace of its own convolution, and what is kept is there from the first step to the end."""
    case = case_of(layout="channels_last", precision="amp-fp16", cudnn_benchmark=False)
    steps, whole, _ = added(case, scenario)
    convolutions, parts = convolutions_of(case), parts_of(case)
    calls = convolution_calls(steps, convolutions, case)
    expected = [
        getattr(workspaces.chosen_workspace(convolutions[moment.removeprefix("backward of ")], case), scenario)
        for _, moment in sorted(calls.items())
    ]

    sizes = [each.bytes for each in whole.storages if each.kind == WORKSPACE]
    kept = {part.name: getattr(part.steady, scenario) for part in parts.values() if part.kept}
    found = {each.name: (number, each.bytes) for number, each in enumerate(whole.storages, 1) if each.name in kept}

    assert sizes == expected
    assert {name: size for name, (_, size) in found.items()} == kept
    for number, _ in found.values():
        assert whole.events.index(number) < first_event(whole)
        assert -number not in whole.events


@pytest.mark.parametrize(("label", "changes", "gathered"), [
    ("unet/d2/w8/concat", {}, 2),
    ("unet++/d2/w8/concat", {}, 3),
    ("unet/d2/w8/concat", {"batch": 1}, 0),  # a slice of one image is a block of memory
    ("unet/d2/w8/concat", {"batch": 1, "layout": "channels_last"}, 2),
    ("unet/d2/w8/concat", {"mode": "inference"}, 0),
    ("unet/d2/w8/concat/upsample=bilinear", {}, 0),  # no convolution reads that gradient
    ("unet/d2/w8/sum", {}, 0),
    ("unet/d2/w8/none", {}, 0),
    ("unet/d2/w8/gated", {}, 0),  # the gate's own gradients are added to it
    ("unet/d2/w8/concat", {"height": 94}, 2),  # it is the skip that is cropped
])  # fmt: skip
def test_gradients_that_are_slices_are_gathered(label: str, changes: dict[str, object], gathered: int) -> None:
    """Each step copies the gradient of a transposed convolution that goes straight into a concatenation."""
    case = case_of(label, **changes)
    steps, whole, _ = added(case, "low")

    found = gathered_gradients(steps, case)
    copies = [number for number, each in enumerate(whole.storages, start=1) if each.name == "gradient, gathered"]

    assert len(found) == len(copies) == 2 * gathered
    for moment, size in found.values():
        placed = convolutions_of(case)[moment.removeprefix("backward of ")]
        assert size == 4 * case.batch * placed.outputs
    for number in copies:
        spell = whole.events[whole.events.index(number) : whole.events.index(-number)]
        assert any(
            whole.storages[event - 1].name.endswith("transposed convolution: weight") for event in spell if event > 0
        )


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_the_least_that_is_requested_is_what_is_live(label: str, mode: str, layout: str) -> None:
    """Without any workspace the allocator is asked for the live bytes, to the byte; every other figure is above."""
    case = case_of(label, mode=mode, layout=layout, precision="bf16")

    found = predict(case, CARD)

    for step, live in zip((found.first, found.steady), peak_bytes(case), strict=True):
        assert step.live == Interval(live, live, live)
        assert step.requested.low == live
        assert_ordered(step, live)


@pytest.mark.parametrize("precision", CHOICES["precision"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_more_may_be_needed_where_more_is_open(precision: str, layout: str) -> None:
    """Trying algorithms widens the first step's interval and no other's; the process has the context on top."""
    case = case_of("unet/d3/w32/concat", precision=precision, layout=layout, height=128, width=128)
    settled, tried = predict(replace(case, cudnn_benchmark=False), CARD), predict(case, CARD)
    context = parts_of(case)["context"].steady

    assert tried.first.requested.high >= settled.first.requested.high
    assert tried.steady.requested == settled.steady.requested
    assert settled.steady.process == settled.steady.reserved + context
    assert tried.first.process.low < tried.first.reserved.low + context.low  # the cache was emptied on the way
    for part in tried.parts:
        assert part.source
        assert part.steady.low <= part.first.low
        assert part.steady.high <= part.first.high
    assert tried.parts[0].first.high > tried.parts[0].steady.high
    assert settled.parts[0].first == settled.parts[0].steady == tried.parts[0].steady


def test_a_device_bounds_what_cudnn_tries_but_not_what_is_live() -> None:
    """On a card with little to spare the highest claim is its memory; on one that is too small the moment is named."""
    case = case_of(precision="bf16", height=512, width=512, batch=4)
    roomy = predict(case, CARD)
    context = parts_of(case)["context"].first
    live = roomy.first.reserved.likely

    snug = predict(case, replace(CARD, memory_bytes=live + context.likely))
    small = predict(case, replace(CARD, memory_bytes=context.likely + 64 * MIB))

    assert (roomy.shortage, snug.shortage) == ("", "")
    assert snug.first.reserved.high < roomy.first.reserved.high
    assert snug.first.reserved.high <= live + context.likely - context.low
    assert ": no room for " in small.shortage
    assert small.steady.live == roomy.steady.live
    assert small.steady.requested.likely == roomy.steady.requested.likely


@pytest.mark.parametrize("name", devices())
def test_cublas_has_32_mib_from_hopper_on_and_less_before(name: str) -> None:
    """PyTorch's default: 32 MiB on compute capability 9 and later, two blocks of 4 MiB and eight of 16 KiB before."""
    device = devices()[name]
    hopper = device.architecture in ("sm90", "sm100", "sm120")

    assert workspaces.cublas_workspace(device) == Interval(0, 32 * MIB if hopper else 8_519_680, 0)


@pytest.mark.parametrize(("label", "name", "largest"), [
    ("unet/d1/w8/concat", "x0_0: convolution 2", "patches"),
    ("unet/d1/w8/concat", "x1_0: convolution 1", "winograd"),  # twice as many channels leave as arrive
    ("unet/d1/w128/concat", "x0_0: convolution 2", "fft"),  # many channels: the weights' own spectra
])  # fmt: skip
def test_workspaces_are_those_of_the_documented_algorithms(label: str, name: str, largest: str) -> None:
    """By hand, batch 2: copies, the matrix of patches, Winograd's F(2x2, 3x3), tiles of 32 for 30 x 30 outputs."""
    case = case_of(label, precision="fp32")
    placed = convolutions_of(case)[name]
    read, write, pixels = placed.conv.in_channels, placed.conv.out_channels, 2 * placed.height * placed.width
    tiles = 2 * math.ceil(placed.height / 30) * math.ceil(placed.width / 30)
    copies = 4 * (read * pixels + write * pixels + 9 * read * write)
    bytes_of = {
        "patches": 4 * 9 * read * pixels,
        "winograd": 4 * 16 * (read * pixels + write * pixels) // 4,
        "fft": 8 * 32 * 17 * (tiles * (read + write) + read * write),
    }
    last = replace(case, layout="channels_last")

    assert max(bytes_of, key=lambda each: bytes_of[each]) == largest
    assert workspaces.tried_workspace(placed, case) == Interval(0, bytes_of[largest], copies)
    assert workspaces.chosen_workspace(placed, case) == Interval(0, max(bytes_of["patches"], bytes_of["winograd"]), 0)
    assert workspaces.chosen_workspace(placed, replace(case, precision="tf32")).likely == copies
    assert workspaces.chosen_workspace(placed, last) == Interval(0, copies, 0)
    assert workspaces.tried_workspace(placed, last) == Interval(0, max(copies, bytes_of["patches"]), copies)


@pytest.mark.parametrize(("label", "name", "read", "patches"), [
    ("unet/d1/w8/concat/padding=valid", "x0_0: convolution 1", 92 * 92, 9 * 1 * 90 * 90),
    ("unet/d1/w8/concat", "head of x0_1", 92 * 92, 8 * 92 * 92),
    ("unet/d1/w8/concat", "x1_0->x0_1: transposed convolution", 46 * 46, 8 * 92 * 92),
])  # fmt: skip
def test_workspaces_know_what_a_convolution_reads(label: str, name: str, read: int, patches: int) -> None:
    """Valid padding reads more than it writes, a transposed convolution a quarter; Winograd is for 3x3 only."""
    case = case_of(label, precision="fp32", batch=1, layout="channels_last")
    placed = convolutions_of(case)[name]
    conv = placed.conv

    copies = workspaces.chosen_workspace(placed, case).high
    tried = workspaces.tried_workspace(placed, case).high

    assert copies == 4 * (conv.in_channels * read + placed.outputs + conv.weights)
    assert tried == max(copies, 4 * patches)


@pytest.mark.parametrize(("changes", "kept"), [
    ({"precision": "fp32"}, True), ({"precision": "amp-fp16"}, True), ({"precision": "fp16"}, False),
    ({"precision": "bf16"}, False),
    ({"precision": "amp-bf16"}, False), ({"mode": "inference"}, False), ({"layout": "contiguous"}, False),
])  # fmt: skip
def test_batch_norm_keeps_a_reserve_in_cudnns_persistent_mode_only(changes: dict[str, str], kept: bool) -> None:  # noqa: FBT001 - a row of the table above
    """Training, channels-last, weights of 32 bits and no bf16: the rest is left to PyTorch's own kernels."""
    case = case_of(**{"layout": "channels_last"} | changes)
    outputs = sum(case.batch * each.outputs for each in convolutions_of(case).values() if each.conv.norm == "batch")

    assert parts_of(case)["norm"].steady == Interval(0, math.ceil(outputs / 8) if kept else 0, 0)


@pytest.mark.parametrize("values", [(-1, 2, 1), (2, 1, 1), (1, 3, 0), (1, 2, 3)])
def test_an_interval_holds_its_value(values: tuple[int, int, int]) -> None:
    """Bounds out of order are refused with what was received."""
    with pytest.raises(ValueError, match=f"has 0 <= low <= likely <= high, not {values[0]}, {values[2]}, {values[1]}"):
        Interval(*values)


def test_what_cannot_be_followed_is_refused_as_the_timeline_refuses_it() -> None:
    """Compiled networks have another schedule."""
    with pytest.raises(ValueError, match="backend=compile"):
        predict(case_of(backend="compile"), CARD)


def measured(case: Case) -> dict[str, Result]:
    """The metrics of predicted GPU memory as a sweep asks for them."""
    names = [
        name for name in METRICS if name.startswith("peak_memory_predicted_") and METRICS[name].devices == ("cuda",)
    ]
    results = {result.metric: result for result in METRICS[names[0]].measure(case, Budget())}
    assert list(results) == names
    return results


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_the_metrics_are_the_claims_for_the_card_that_the_driver_names(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The sample is the likely value, the detail the interval and the device."""
    monkeypatch.setattr(here, "describe_gpus", lambda: [{"name": CARD.driver_names[0]}])
    case = case_of(mode=mode)
    found: GpuMemory = predict(case, CARD)

    results = measured(case)

    for figure in FIGURES:
        for first, step in (("", found.steady), ("_first", found.first)):
            result, claim = results[f"peak_memory_predicted_{figure}{first}_bytes"], getattr(step, figure)
            assert (result.outcome, result.samples, result.note) == ("ok", (claim.likely,), "")
            assert (result.detail["low"], result.detail["high"]) == (claim.low, claim.high)
            assert result.detail["device"] == CARD.name
            assert ("CUDA context" in result.detail["parts"]) == (figure == "process")
            assert (
                result.detail["parts"]["convolution workspace"][1]
                == getattr(found.parts[0], first[1:] or "steady").high
            )
            assert "batch norm's reserve" not in result.detail["parts"]  # it needs nothing here


def test_a_case_that_will_not_fit_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures stand, with the doubt beside them."""
    monkeypatch.setattr(here, "describe_gpus", lambda: [{"name": CARD.driver_names[0]}])

    results = measured(case_of("unet3+/d4/w64/concat", height=2048, width=2048, batch=16))

    assert all(each.note.startswith(f"will not fit on {CARD.name}: ") for each in results.values())
    assert results["peak_memory_predicted_requested_bytes"].samples[0] > CARD.memory_bytes


@pytest.mark.parametrize(
    ("gpus", "changes", "note"),
    [
        ([], {}, "no NVIDIA driver answers"),
        ([{"name": "Voodoo 2"}], {}, "unknown GPU 'Voodoo 2'; accepted: "),
        ([{"name": CARD.driver_names[0]}], {"device": "cpu"}, "predicted for a GPU only"),
        ([{"name": CARD.driver_names[0]}], {"backend": "compile"}, "backend=compile"),
    ],
)
def test_where_nothing_can_be_predicted_the_rows_say_why(
    monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, str]], changes: dict[str, str], note: str
) -> None:
    """No driver, an unknown card, a CPU or another backend: unsupported, with a sentence."""
    monkeypatch.setattr(here, "describe_gpus", lambda: gpus)

    results = measured(case_of(**changes))

    assert {each.outcome for each in results.values()} == {"unsupported"}
    assert all(note in each.note for each in results.values())
