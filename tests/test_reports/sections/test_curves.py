"""Figures of cost against gain: a doubt is one number's, and takes nothing else away."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from small_store import DOUBTFUL, ENVIRONMENT, FAILED, make_store

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
from skipcost.reports.data import Data, load
from skipcost.reports.drawings.charts import Axis, doubtful, on_front
from skipcost.reports.grid import Cell, Plot
from skipcost.reports.sections.curves import tradeoff_context
from skipcost.reports.sections.provenance import header_context
from skipcost.unet_models import ModelSpec

LATENCY, MEMORY = Axis("latency_s", "latency", "seconds"), Axis("memory", "memory", "bytes")
REACH = Axis("reach", "receptive field", "pixels", log=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The small store: one latency doubtful, one failed, everything else exact."""
    return load(make_store(tmp_path_factory.mktemp("curves") / "tiny.sqlite"))


def plot_of(data: Data, name: str) -> Plot:
    """A figure of the section by its name."""
    found: Plot = next(plot for plot in tradeoff_context(data)["plots"] if plot.name == name)
    return found


def row_of(plot: Plot, label: str) -> dict[str, Cell]:
    """A network's row of a figure's table, by column."""
    return next(dict(zip(plot.table.columns, row, strict=True)) for row in plot.table.rows if row[0].text == label)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Six networks that were timed on a busy machine: every latency carries a doubt."""
    path = tmp_path_factory.mktemp("busy") / "x.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-02T03:04:05+00:00", "busy", 0, ENVIRONMENT)
        for depth, width in itertools.product((1, 2, 3), (4, 8)):
            case = Case(spec=ModelSpec(depth=depth, width=width), height=32, width=32)
            store.add_case(case, [])
            for name in ("params", "conv_macs", "receptive_field", "peak_memory_predicted_bytes"):
                store.add_result(run, case.case_id, Result(name, samples=(100 * depth + width,)))
            late = Result("latency_s", samples=(depth * width * 1e-3,), note="held up: it waited")
            store.add_result(run, case.case_id, late)
    return load(path)


def test_where_every_latency_is_doubtful_the_exact_fronts_stay(busy: Data) -> None:
    """All points are there, latencies marked; no front rests on them, and no correlation."""
    plot = plot_of(busy, "reach")

    fronts = [row[-2].text for row in plot.table.rows]
    assert len(fronts) == 6
    assert all(row[1].text.startswith("~ ") for row in plot.table.rows)
    assert all("latency" not in text for text in fronts)
    assert any("MACs" in text for text in fronts)
    assert "over 0 points: too few" in plot_of(busy, "cost-cost").caption
    assert any(text.startswith("6 of 6 latencies carry") for text in header_context(busy)["doubts"])


def test_a_receptive_field_is_shown_of_every_network(data: Data) -> None:
    """A latency that is doubtful or failed takes its network from no panel but its own."""
    plot = plot_of(data, "reach")

    assert len(plot.table.rows) == len(data.networks(None))
    odd, failed = row_of(plot, DOUBTFUL), row_of(plot, FAILED)
    assert odd["latency (measured)"].text.startswith("~ ")
    assert odd["doubt"].text == "latency"
    assert not odd["MACs (counted)"].text.startswith("~")
    assert failed["latency (measured)"].text == "\u2013"
    assert failed["MACs (counted)"].order == data.networks(None).set_index("label").loc[FAILED, "conv_macs"]
    assert "carry a doubt in their latency and are on no front by it" in plot.caption


def test_a_doubtful_number_is_on_no_front_and_the_others_of_its_network_may_be(data: Data) -> None:
    """The doubtful latency is of the network with the fewest MACs of its kind."""
    plot = plot_of(data, "reach")

    fronts = {row[0].text: row[-2].text for row in plot.table.rows}
    assert "latency" not in fronts[DOUBTFUL]
    assert any("latency" in text for text in fronts.values())


def test_a_front_is_of_points_without_a_doubt_in_its_two_numbers() -> None:
    """The cheapest by a doubtful latency leaves that front, and stays on the one of memory."""
    rows = pd.DataFrame({
        "latency_s": [1.0, 2.0, 3.0, None], "memory": [1.0, 2.0, 3.0, 0.5], "reach": [5.0, 5.0, 9.0, 1.0],
        LATENCY.doubt: [True, False, False, False],
    })  # fmt: skip

    assert list(on_front(rows, LATENCY, REACH).index) == [1, 2]
    assert list(on_front(rows, MEMORY, REACH).index) == [3, 0, 2]
    assert list(doubtful(rows, LATENCY, REACH)) == [True, False, False, False]
    assert not doubtful(rows, MEMORY, REACH).any()
    assert list(on_front(rows.assign(**{LATENCY.doubt: True}), LATENCY, REACH).index) == []


def test_the_header_counts_doubts_by_metric(data: Data) -> None:
    """One of the latencies, not one of all numbers."""
    told = header_context(data)["doubts"]

    assert any(text.startswith("1 of 47 latencies carry a doubt (1 noisy: the median is known to") for text in told)
