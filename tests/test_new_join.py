"""A variant with a way to join of its own, added here alone: every fold, both rewrites and the executor take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_store import ENVIRONMENT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.places import explain
from skipcost.bench.measure.counting import predicted_peaks
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory import operators
from skipcost.bench.memory.liveness import peak_bytes
from skipcost.bench.memory.schedule import Call
from skipcost.bench.memory.tape import BOOL, MAP, Forward, Given, Size, Tape, Value
from skipcost.bench.store.store import create_store
from skipcost.bench.time.passes import passes
from skipcost.kernels.backends import BACKENDS
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.kernels.dispatch.network_calls import network_calls
from skipcost.reports.data import load
from skipcost.reports.drawings import charts
from skipcost.reports.drawings.svg import PALETTE
from skipcost.reports.page import render
from skipcost.reports.sections.kernels import kernels_context
from skipcost.unet_models import VARIANTS, ModelSpec, SkipGraph, SkipNet, build, graph, ops, spec
from skipcost.unet_models.costs import costs
from skipcost.unet_models.variants import Variant

UPS = ("transpose", "bilinear")


def _wire(asked: ModelSpec) -> SkipGraph:
    """U-Net, but that decoder nodes take the larger of both values, brought to one width by projections."""
    summed = ModelSpec.graph(replace(asked, variant="unet", skip="sum"))
    nodes = tuple(replace(node, merge="maximum") if node.deeper else node for node in summed.nodes)
    return replace(summed, nodes=nodes)


def _maximum(maps: list[Tensor]) -> Tensor:
    result = torch.maximum(maps[0], maps[1])
    for other in maps[2:]:
        result = torch.maximum(result, other)
    return result


def _maximum_on_tape(run: Forward, row: int, call: Call, first: Value, second: Value) -> Value:
    """What it makes and keeps: both maps are compared anew for each of two gradients (PyTorch's derivatives.yaml)."""
    size = Size(row, MAP, first.item, per_image=True)
    result = run.tape.result(size, (first, second), call.where, "map")

    def share(tape: Tape, gradient: Value) -> Value:
        half = tape.result(size, (gradient,))
        equal = tape.result(size.typed(BOOL), (first, second))
        given = tape.result(size, (equal, half, gradient), call.where, "map gradient")
        smaller = tape.result(size.typed(BOOL), (first, second))
        tape.hold(given, smaller, equal, half)
        return given

    def backward(tape: Tape, gradient: Value) -> Given:
        return share(tape, gradient), share(tape, gradient)

    return run.tape.differentiate(result, (first, second), backward, (first, second))


@pytest.fixture(autouse=True)
def _another_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of each table that a way to join is in."""
    monkeypatch.setitem(VARIANTS, "largest", Variant(_wire, "Largest", "nobody's", UPS))
    monkeypatch.setitem(spec.CHOICES, "variant", tuple(VARIANTS))
    monkeypatch.setitem(ops.JOINS, "maximum", _maximum)
    monkeypatch.setitem(operators.OPERATORS, "maximum", _maximum_on_tape)


def _network(upsample: str = "transpose", backend: str = "eager") -> SkipNet:
    torch.manual_seed(0)
    return build(ModelSpec("largest", 2, 4, upsample=upsample), BACKENDS[backend].ops()).eval()


def test_the_executor_runs_it() -> None:
    """Depth 1, step by step with the network's own layers."""
    net, image = build(ModelSpec("largest", 1, 2, norm="none")).eval(), torch.randn(1, 1, 6, 8)

    output = net(image)

    def node(name: str, x: Tensor) -> Tensor:
        for layer in net.nodes[name].children():
            x = layer.conv(x).relu()
        return x

    whole = node("x0_0", image)
    below = node("x1_0", torch.max_pool2d(whole, 2))
    joined = torch.maximum(whole, net.edges["x1_0->x0_1"].up(below))
    assert torch.equal(output, net.heads["x0_1"].conv(node("x0_1", joined)))


@pytest.mark.parametrize("upsample", UPS)
@pytest.mark.parametrize("backend", ["fused", "rewritten"])
def test_both_rewrites_run_it(upsample: str, backend: str) -> None:
    """The same numbers, but for rounding, at an odd size."""
    net, reference = _network(upsample, backend), _network(upsample)
    image = torch.randn(1, 1, 21, 18)

    with torch.no_grad():
        result, expected = net(image), reference(image)

    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("upsample", UPS)
def test_every_count_agrees_with_pytorchs(upsample: str) -> None:
    """Multiply-adds of the network, by place, by kernel call, and by pass over memory."""
    asked = ModelSpec("largest", 2, 4, upsample=upsample)
    network, case = graph(asked), Case(spec=asked, height=20, width=28)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _network(upsample)(torch.randn(1, 1, 20, 28))

    counted = counter.get_total_flops() // 2
    assert network.conv_macs(20, 28) == counted
    assert costs(network, 20, 28).total_macs == counted
    assert sum(call.macs for _, call in network_calls(asked, 1, 20, 28, "inference", "fp32")) == counted
    assert sum(each.macs for each in passes(case)) == counted
    assert executed_macs(network, 20, 28) == counted


@pytest.mark.parametrize("backend", ["eager", "rewritten"])
@pytest.mark.parametrize("upsample", UPS)
def test_its_live_bytes_are_those_of_a_trace(upsample: str, backend: str) -> None:
    """To the byte, at inference."""
    case = Case(spec=ModelSpec("largest", 2, 4, upsample=upsample), height=20, width=28, backend=backend)

    assert peak_bytes(case)[1] == predicted_peaks(case)[1]


@pytest.mark.parametrize("backend", ["eager", "rewritten"])
@pytest.mark.parametrize("upsample", UPS)
def test_its_live_bytes_in_training_are_those_of_a_trace(upsample: str, backend: str) -> None:
    """To the byte, in the first step and in a later one, with what the backward pass keeps for it."""
    asked = ModelSpec("largest", 2, 4, upsample=upsample)
    case = Case(spec=asked, height=20, width=28, mode="training", batch=2, backend=backend)

    assert peak_bytes(case, traced=True) == predicted_peaks(case)[:2]


def test_it_is_told_in_words() -> None:
    """What `explain` shows has each of its edges, and its joins are named among the passes."""
    asked = ModelSpec("largest", 2, 4)

    told = explain(asked, (20, 28), 1, "fp32", "inference")

    assert [edge["source"] for edge in told["edges"] if edge["skip"]] == ["x1_0", "x0_0"]
    names = [each.name for each in passes(Case(spec=asked, height=20, width=28)) if each.kind == "merge"]
    assert names == ["x1_1: maximum 1", "x0_2: maximum 1"]


def test_the_report_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the rows, and drawn where its cost is, beside another variant."""
    monkeypatch.setitem(
        charts.VARIANT_COLOURS, "largest", PALETTE[3]
    )  # which has a row of each variant when it is made
    path = tmp_path / "two.sqlite"
    cases = [Case(spec=ModelSpec(variant, 2, width)) for variant in ("unet", "largest") for width in (8, 12, 16)]
    with create_store(path) as store:
        run = store.add_run("2026-01-02T03:04:05+00:00", "two", 7, ENVIRONMENT)
        for case in cases:
            store.add_case(case, [])
            for name in ("params", "conv_macs", "peak_memory_predicted_bytes"):
                for result in METRICS[name].measure(case, Budget()):
                    store.add_result(run, case.case_id, result)

    text = render(load(path))

    assert all(case.spec.label in text for case in cases)
    assert "nobody&#39;s" in text  # the drawing's caption: whose variant it is


def test_once_it_is_gone_no_report_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the section on kernels keeps between reports goes by the variants that there are."""
    there = kernels_context(None)["choices"]
    monkeypatch.delitem(VARIANTS, "largest")

    gone = kernels_context(None)["choices"]

    titles = [[row[0].text for row in grid.rows] for grid in (there, gone)]
    assert titles[0] == [*titles[1], "Largest", "Largest"]
