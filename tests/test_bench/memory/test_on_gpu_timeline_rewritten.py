"""What a GPU adds to the timeline of `backend=rewritten`: what tap-first makes inside, term by term, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpu_cells import ALONE, CARD, JOINED, LABELS, case_of, everything

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.memory import workspaces
from skipcost.bench.memory.allocator import first_event, two_steps
from skipcost.bench.memory.liveness import Timeline, low_calls, timeline, tracks
from skipcost.bench.memory.on_gpu import (
    SCENARIOS,
    convolution_calls,
    on_device,
    predict,
    running_convolutions,
    tap_calls,
)
from skipcost.bench.memory.workspaces import Interval
from skipcost.kernels.dispatch.low_resolution import rewritings
from skipcost.kernels.low_resolution import costs as tap_costs
from skipcost.kernels.low_resolution import parts as tap_parts
from skipcost.unet_models import VARIANTS, ModelSpec

MIB = 1 << 20


def added(case: Case, scenario: str = "likely") -> tuple[Timeline, Timeline]:
    """The steps of a case without and with what a GPU adds."""
    steps, low = two_steps(timeline(case)), low_calls(case)
    parts = workspaces.parts(running_convolutions(case, low).values(), case, CARD, low.values())
    return steps, on_device(case, steps, parts, scenario)[0]


def sizes_of(whole: Timeline, name: str) -> list[int]:
    """Bytes of every storage of a name, in the order of their making."""
    return [whole.storages[event - 1].bytes for event in whole.events if event > 0 and _named(whole, event) == name]


def alive_when(whole: Timeline, name: str) -> list[list[str]]:
    """For every storage of a name, the names of what is alive when it is made."""
    alive: set[int] = set()
    there = []
    for event in whole.events:
        if event > 0 and _named(whole, event) == name:
            there.append([_named(whole, each) for each in sorted(alive)])
        (alive.add if event > 0 else alive.discard)(abs(event))
    return there


def _named(whole: Timeline, event: int) -> str:
    return whole.storages[event - 1].name


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("precision", CHOICES["precision"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_calls_are_those_that_the_choice_for_a_gpu_takes(variant: str, precision: str, mode: str) -> None:
    """By counting: one call for each edge that `rewritings` lists as taken on a GPU, with its channels."""
    upsample = "bilinear" if "bilinear" in VARIANTS[variant].upsamples else None
    spec = ModelSpec(variant, 3, 64, upsample=upsample)
    case = Case(spec, 2, 256, 256, mode, precision, device="cuda", backend="rewritten")
    graph = case.graph()
    edges = {edge.name: (node, edge) for node in graph.nodes for edge in node.inputs}

    found = low_calls(case)

    listed = rewritings(graph, 256, 256, batch=2, precision=precision, device="cuda", mode=mode)
    taken = [edges[each.edge] for each in listed if each.choice.taken]
    assert set(found) == {
        f"{edge.name}: convolution" if edge.conv else f"{node.name}: convolution 1" for node, edge in taken
    }
    assert any(each.choice.taken for each in listed)
    for node, edge in taken:
        call = found[f"{edge.name}: convolution" if edge.conv else f"{node.name}: convolution 1"]
        assert call.channels == (edge.in_channels, (edge.conv or node.convs[0]).out_channels)
        assert call.joined == (not edge.conv and len(node.inputs) > 1)


@everything
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
@pytest.mark.parametrize("label", LABELS)
def test_every_call_is_found_once_in_every_pass(label: str, layout: str, mode: str) -> None:
    """Tap-first and the convolutions that still run, both steps, forward and in training backward."""
    for precision in ("fp32", "bf16", "amp-bf16"):
        case = case_of(label, layout=layout, precision=precision, mode=mode)
        steps, low = two_steps(timeline(case)), low_calls(case)
        running = running_convolutions(case, low)

        convolutions, products = convolution_calls(steps, running, case), tap_calls(steps, low, case)

        for found, names in ((convolutions, running), (products, low)):
            backward = [f"backward of {name}" for name in names] if mode == "training" else []
            assert sorted(found.values()) == sorted(2 * [*names, *backward])


@everything
@pytest.mark.parametrize("label", LABELS)
def test_a_convolution_that_is_split_reads_fewer_channels(label: str) -> None:
    """What runs beside tap-first has the weights that are left, and nothing runs where none are."""
    case = case_of(label)
    low = low_calls(case)
    whole, running = running_convolutions(case, {}), running_convolutions(case, low)

    assert set(whole) - set(running) == {name for name, call in low.items() if not call.joined}
    for name, placed in running.items():
        read, write = low[name].channels if name in low else (0, 0)
        assert placed.conv.weights == whole[name].conv.weights - 9 * read * write
        assert (placed.height, placed.width, placed.outputs) == (
            whole[name].height,
            whole[name].width,
            whole[name].outputs,
        )


@everything
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("label", [ALONE, JOINED, "unet++/d2/w8/concat/upsample=nearest"])
def test_what_is_added_leaves_the_timeline_itself_as_it_was(label: str, mode: str, scenario: str) -> None:
    """Without the added storages the events are the old ones; what is added and not kept ends in its own moment."""
    steps, whole = added(case_of(label, mode=mode, precision="bf16", layout="channels_last"), scenario)
    own = [event for event in whole.events if abs(event) <= len(steps.storages)]
    stays = ("table", "matrices", "cuBLAS workspace", "batch norm's reserve")

    assert own == list(steps.events)
    assert [name for _, name in whole.moments] == [name for _, name in steps.moments]
    for each in tracks(whole):
        if each.start > first_event(whole) and each.name in ("weights, packed", "tap maps", "blocks", *stays):
            assert (each.end == len(whole.events)) == (each.name in stays)


@everything
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-fp16"])
@pytest.mark.parametrize(("layout", "norm"), [
    ("contiguous", "batch"), ("channels_last", "batch"), ("channels_last", "group"), ("channels_last", "instance"),
])  # fmt: skip
@pytest.mark.parametrize("label", [ALONE, JOINED])
def test_each_call_makes_inside_what_its_shapes_say(label: str, layout: str, norm: str, precision: str) -> None:
    """Forward the packed weight, copied pixels and tap maps; open is a copy where a norm may change the layout."""
    case = case_of(f"{label}/norm={norm}" if norm != "batch" else label, layout=layout, precision=precision)
    value = 4 if precision == "fp32" else 2
    calls = 2 * list(low_calls(case).values())
    last = dict.fromkeys(SCENARIOS, layout == "channels_last")
    if norm != "batch":
        last |= {"high": False, "likely": False}

    for scenario in SCENARIOS:
        _, whole = added(case, scenario)

        made = [
            tap_parts.inside(each.rows, each.columns, each.channels, 2, value, last=last[scenario]) for each in calls
        ]
        assert sizes_of(whole, "weights, packed") == [each.packed for each in made]
        assert [pair for each in made for pair in each.parts] == list(
            zip(sizes_of(whole, "pixels, gathered"), sizes_of(whole, "tap maps"), strict=True)
        )
        assert any(sizes_of(whole, "pixels, gathered")) == (not last[scenario])


@everything
@pytest.mark.parametrize("label", [ALONE, JOINED])
def test_backward_has_the_blocks_at_their_fullest(label: str) -> None:
    """As `tap_costs` counts them, in both steps, beside the gradients of map and weight; or nothing, at least."""
    case = case_of(label, precision="amp-bf16")
    calls = 2 * list(low_calls(case).values())[::-1]

    low, high = (added(case, scenario)[1] for scenario in ("low", "high"))

    assert sizes_of(high, "blocks") == [
        tap_costs.workspace_bytes(each.rows, each.columns, each.channels, 2, backward=True) for each in calls
    ]
    assert not any(sizes_of(low, "blocks"))
    forward = max(workspaces.inside(each, case)["high"].fullest for each in calls)
    assert workspaces.tap_workspace(calls[0], replace(case, mode="inference")).high <= forward
    assert workspaces.tap_workspace(calls[0], case).high == max(
        workspaces.inside(calls[0], case)["high"].fullest, sizes_of(high, "blocks")[0]
    )


@everything
@pytest.mark.parametrize(("label", "size", "batch"), [
    (JOINED, 92, 2), ("unet++/d2/w8/concat/upsample=bilinear", 92, 2),  # in x0_2 both shares of the weight are alike
    ("unet3+/d1/w16/concat", 24, 1), ("unet/d1/w16/concat/upsample=bilinear", 24, 1),  # map and weight are
])  # fmt: skip
def test_backward_comes_when_both_gradients_are_there(label: str, size: int, batch: int) -> None:
    """First tap-first's, of map and weight, then those of the convolution beside it, whatever is of the same size."""
    case = case_of(label, height=size, width=size, batch=batch)
    low, steps = low_calls(case), two_steps(timeline(case))
    running = running_convolutions(case, low)
    calls = convolution_calls(steps, running, case)

    for at, moment in tap_calls(steps, low, case).items():
        name = moment.removeprefix("backward of ")
        if moment == name:
            continue
        rows, columns, (read, write), joined, _ = low[name]
        born = [each for each in range(at - 1, at + 8) if steps.events[each] > 0][:4]
        made = [steps.storages[steps.events[each] - 1].bytes for each in born]
        assert born[:2] == [at - 1, at]
        assert made[:2] == [4 * batch * read * rows.extent * columns.extent, 4 * 9 * read * write]
        if joined:
            others = running[name].conv
            assert made[2:] == [4 * batch * others.in_channels * rows.length * columns.length, 4 * others.weights]
            assert calls[born[3]] == moment


@everything
def test_tap_maps_are_made_when_the_result_is_there_and_the_concatenation_is_gone() -> None:
    """At inference the term is added to the convolution's own output, behind its workspace; nothing is copied twice."""
    case = case_of("unet++/d2/w8/concat/upsample=bilinear", mode="inference", cudnn_benchmark=False)
    calls = low_calls(case)

    _, whole = added(case)

    alive = alive_when(whole, "tap maps")
    assert len(alive) == 2 * len(calls)
    for name, there in zip(2 * list(calls), alive, strict=True):
        assert there.count(name) == 1
        assert f"{name}: concatenation" not in there
        assert not {"workspace", "weights, gathered"} & set(there)
        assert "weights, packed" in there


@everything
@pytest.mark.parametrize(("label", "results"), [(ALONE, 1), (JOINED, 2)])
def test_in_training_tap_first_has_a_result_of_its_own(label: str, results: int) -> None:
    """Where it is added to another convolution's, that is alive too."""
    case = case_of(label)

    _, whole = added(case)

    for name, there in zip(2 * list(low_calls(case)), alive_when(whole, "tap maps"), strict=True):
        assert there.count(name) == results


@everything
def test_parts_of_tap_maps_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a part are gone before the next copy of pixels is made; the packed weights stay for all parts."""
    inside = tap_parts.inside
    monkeypatch.setattr(tap_parts, "inside", lambda *sizes, last: inside(*sizes, last=last, room=1))
    case = case_of("unet3+/d1/w8/concat", mode="inference")

    _, whole = added(case)

    there = alive_when(whole, "pixels, gathered")
    assert len(there) == len(sizes_of(whole, "tap maps")) > 4
    assert all("tap maps" not in each and each.count("weights, packed") == 1 for each in there)
    call = next(iter(low_calls(case).values()))
    assert workspaces.tap_workspace(call, case).low == inside(*call[:3], 2, 4, last=False, room=1).fullest


@everything
@pytest.mark.parametrize(("size", "copied"), [(92, False), (94, True)])
def test_slices_are_gathered_before_a_convolution_reads_them(size: int, copied: bool) -> None:  # noqa: FBT001 - a row of the table above
    """Its share of the weights forwards, and a skip that is cropped, in both passes, where the worst is claimed."""
    case = case_of(JOINED, height=size, width=size)
    running = running_convolutions(case, low_calls(case))
    joined = [running[name].conv for name in low_calls(case)]

    low, high = (added(case, scenario)[1] for scenario in ("low", "high"))

    for whole in (low, high):
        assert sizes_of(whole, "weights, gathered") == 2 * [4 * each.weights for each in joined]
    maps = [4 * 2 * each.in_channels * side**2 for each, side in zip(joined, (46, 92), strict=True)]
    assert [each.sliced for each in low_calls(case).values()] == [copied, copied]
    assert sizes_of(high, "map, gathered") == 2 * copied * [*maps, *maps[::-1]]
    assert not sizes_of(low, "map, gathered")
    for there in alive_when(high, "workspace"):
        assert there.count("weights, gathered") <= 1


@everything
@pytest.mark.parametrize(("mode", "threads"), [("inference", 1), ("training", 2)])
def test_cublas_has_a_workspace_for_each_thread_from_its_first_product_on(mode: str, threads: int) -> None:
    """Forward and backward run on threads of their own, which multiply; before, and without, there is none."""
    case = case_of(mode=mode)
    _, whole = added(case)

    lives = [each for each in tracks(whole) if each.name == "cuBLAS workspace"]

    products = [each for each in tracks(whole) if each.name in ("pixels, gathered", "blocks")]
    firsts = [next(each for each in products if each.name == name) for name in ("pixels, gathered", "blocks")[:threads]]
    assert [each.bytes for each in lives] == threads * [32 * MIB]
    assert lives[0].start == firsts[0].start + 1
    assert all(first.start < whole.steady_from for first in lives)
    assert all(lives[at].start < firsts[at].end for at in range(threads))
    assert predict(case, CARD).parts[2].steady == Interval(0, threads * 32 * MIB, threads * 32 * MIB)


@everything
def test_tables_and_matrices_are_made_once_for_each_size() -> None:
    """In the first step; edges of one size share them."""
    case = case_of("unet++/d3/w8/concat/upsample=bilinear")
    calls = low_calls(case).values()
    rows, columns = ({(which, getattr(each, which)) for each in calls} for which in ("rows", "columns"))

    _, whole = added(case)

    tables = [each for each in tracks(whole) if each.name in ("table", "matrices")]
    assert len(rows) < len(calls)
    assert len(sizes_of(whole, "table")) == 2 * len(rows | columns)
    assert all(each.start < whole.steady_from and each.end == len(whole.events) for each in tables)
    assert sum(sizes_of(whole, "matrices")) == sum(
        4 * 3 * (band.stop - band.start) * (band.last - band.first)
        for _, axis in rows | columns
        for band in axis.adjoint_bands
    )
