"""The section on the reference line: measured over the line by network and by layer, and what it says of gaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_store import DOUBTFUL, FAILED, make_store

from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
from skipcost.bench.time.passes import passes
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import FIGURES, Device
from skipcost.reports.compare import times
from skipcost.reports.data import Data, load
from skipcost.reports.page import render_section
from skipcost.reports.sections import SECTIONS
from skipcost.reports.sections.limits import roofline_context
from skipcost.unet_models import VARIANTS

CPU = Device("A CPU", "cpu", 1 << 33, 1e10, {"fp32": 1e11}, dict.fromkeys(FIGURES, "measured by a probe"))
LIMITS = next(section for section in SECTIONS if section.name == "roofline")
SLOWER = 3.0  # each layer takes so many times its line


def line_of(case: Any, device: Device = CPU) -> Result:
    """A stored reference line."""
    detail = {
        "device": device.name,
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "flop_per_s": device.rate("fp32"),
        "sources": device.sources,
        "fused_s": 0.0,
    }
    return Result("roofline_s", samples=(bound(case, device).seconds,), detail=detail)


def layers_of(case: Any) -> Result:
    """Layers that take SLOWER times their line."""
    layers = {layer.name: SLOWER * layer.seconds for layer in bound(case, CPU).layers}
    return Result("layers_s", samples=(sum(layers.values()),), detail={"layers": layers})


def with_lines(path: Path, *, layers: bool = True, device: Device = CPU) -> Data:
    """The small store, each inference with a line, and with times of layers."""
    make_store(path)
    with create_store(path) as store:
        run = store.runs()[-1].run_id
        for case_id, (case, _) in store.cases().items():
            if case.mode == "inference":
                store.add_result(run, case_id, line_of(case, device))
                if layers:
                    store.add_result(run, case_id, layers_of(case))
    return load(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A store with everything."""
    return with_lines(tmp_path_factory.mktemp("roofline") / "tiny.sqlite")


def test_every_network_with_a_latency_stands_beside_its_lines(data: Data) -> None:
    """Measured over the line; a doubt is marked; one without a number is not there."""
    table = roofline_context(data)["networks"]

    rows = {row[0].text: [cell.order for cell in row[6:]] for row in table.rows}
    latencies = {each[0].spec.label: data.results[key].get("latency_s") for key, each in data.cases.items()
                 if each[0].mode == "inference"}  # fmt: skip
    assert set(rows) == {label for label, result in latencies.items() if result and result.samples}
    assert FAILED not in rows
    for case, _ in data.cases.values():
        if case.mode == "inference" and case.spec.label in rows:
            line, (measured, reference, ratio, alone, lower) = bound(case, CPU), rows[case.spec.label]
            assert (reference, alone) == (line.seconds, line.fused_s)
            assert ratio == pytest.approx(measured / line.seconds)
            assert lower == pytest.approx(measured / line.fused_s)
    assert next(row[6].text for row in table.rows if row[0].text == DOUBTFUL).startswith("~")


def test_the_sentence_on_top_is_that_of_the_table(data: Data) -> None:
    """Lowest, median and highest multiple of the line, over latencies without a doubt."""
    context = roofline_context(data)

    ratios = sorted(row[8].order for row in context["networks"].rows if not row[6].text.startswith("~"))
    assert len(ratios) == context["sound"] == len(context["networks"].rows) - 1
    low, middle, high = context["spread"]
    assert (low, high) == (ratios[0], ratios[-1])
    assert ratios[0] <= middle <= ratios[-1]
    assert context["below"] == sum(ratio < 1 for ratio in ratios)


def test_the_largest_network_of_each_variant_is_shown_layer_by_layer(data: Data) -> None:
    """Its passes in order, each with its own ratio; kinds add up to the whole."""
    shown = roofline_context(data)["layers"]

    assert [each["name"].split("/")[0] for each in shown] == list(VARIANTS)
    for each in shown:
        assert each["name"].startswith(f"{each['name'].split('/')[0]}/d3/w16/concat")
        case = next(case for case, _ in data.cases.values() if case.name == each["name"])
        assert [row[0].text for row in each["each"].rows] == [one.name for one in passes(case)]
        assert {row[5].text for row in each["each"].rows} == {times(SLOWER)}
        assert sum(row[1].order for row in each["kinds"].rows) == len(passes(case))
        assert sum(row[-1].order for row in each["kinds"].rows) == pytest.approx(1)
        assert sum(row[4].order for row in each["kinds"].rows) == pytest.approx(bound(case, CPU).seconds)


def test_the_papers_skips_are_shown_before_a_larger_network_with_others(data: Data) -> None:
    """Where the deep concatenating networks have no times of layers, a shallower one is shown."""
    results = {
        key: {name: each for name, each in found.items() if name != "layers_s"}
        if data.cases[key][0].spec.depth == 3 and data.cases[key][0].spec.skip == "concat"
        else found
        for key, found in data.results.items()
    }

    shown = roofline_context(replace(data, results=results))["layers"]

    assert [each["name"].split()[0] for each in shown] == [f"{variant}/d2/w16/concat" for variant in VARIANTS]


def test_the_limits_say_where_they_come_from(data: Data) -> None:
    """One row per device and precision, with the sources of both figures."""
    rows = roofline_context(data)["limits"].rows

    assert [[cell.text for cell in row] for row in rows] == [
        ["A CPU", "fp32", "100 GFLOP/s", "9.31 GiB/s", "measured by a probe", "measured by a probe"]
    ]


def test_a_machine_that_was_probed_twice_shows_the_range(data: Data) -> None:
    """A later sweep into the same store has its own probe."""
    case_id = next(key for key, results in data.results.items() if "roofline_s" in results)
    other = line_of(data.cases[case_id][0], replace(CPU, flop_per_s={"fp32": 2e11}))
    results = data.results | {case_id: data.results[case_id] | {"roofline_s": other}}

    rows = roofline_context(replace(data, results=results))["limits"].rows

    assert rows[0][2].text == "100 GFLOP/s to 200 GFLOP/s"


def test_a_latency_below_the_line_is_counted_and_explained(tmp_path: Path) -> None:
    """A slow device's line under a quick one's times: no failure, but the page says how it can be."""
    slow = replace(CPU, flop_per_s={"fp32": 1e8}, bandwidth_bytes_per_s=1e8)
    found = with_lines(tmp_path / "x.sqlite", device=slow, layers=False)

    context, page = roofline_context(found), render_section(LIMITS, found)

    assert context["below"] > 0
    assert f"over {context['sound']} without a doubt. {context['below']} of them are below the line" in page
    assert "maps that stayed in a cache between passes" in page
    assert "Layer by layer: not measured yet" in page


def test_a_store_without_lines_says_how_to_get_them(tmp_path: Path) -> None:
    """No figure is made up."""
    page = render_section(LIMITS, load(make_store(tmp_path / "x.sqlite")))

    assert "No reference line in this store yet: sweep again with the metric <code>roofline_s</code>" in page


def test_lines_without_latencies_are_shown_as_not_measured(data: Data) -> None:
    """The line alone is prediction: nothing stands beside it."""
    results = {
        key: {name: each for name, each in found.items() if name not in ("latency_s", "layers_s")}
        for key, found in data.results.items()
    }

    context = roofline_context(replace(data, results=results))

    assert context["lines"] > 0
    assert context["spread"] is None
    assert context["layers"] == []
