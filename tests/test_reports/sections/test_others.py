"""Models that are not of the suite in the report: beside the networks of their setting, and out of every comparison."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from small_store import ENVIRONMENT, make_store

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
from skipcost.reports.data import Data, load
from skipcost.reports.page import render_section, write_report
from skipcost.reports.sections import SECTIONS, failures_context
from skipcost.reports.sections.curves import tradeoff_context
from skipcost.reports.sections.others import others_context
from skipcost.reports.sections.provenance import header_context
from skipcost.reports.sections.rows import rows_context

EVIL = "<b>Mine</b>"
FACTORIES = {
    "Mine": Factory("models:mine", '{"width": 8}', "Mine", code="0123456789ab"),
    EVIL: Factory("models:evil", name=EVIL),
    "models:gone": Factory("models:gone"),
}
GONE = "cannot import models (No module named 'models')"


def results_of(label: str, macs: int) -> list[Result]:
    """A model that costs a little more than a network of so many MACs; one that is not there; one with a doubt."""
    names = ("params", "conv_macs", "peak_memory_predicted_bytes", "latency_s")
    if label == "models:gone":
        return [Result(name, "unsupported", note=GONE) for name in names]
    note = "noisy: the median is known to 30% only" if label == EVIL else ""
    return [
        Result("params", samples=(2 * macs,), detail={"printed": "hello <i>you</i>"}),
        Result("conv_macs", samples=(macs + 1,)),
        Result("receptive_field", "unsupported", note="Mine is no network of the suite"),
        Result("peak_memory_predicted_bytes", samples=(macs // 50,)),
        Result("latency_s", samples=(macs * 2e-9,), note=note),
    ]


def add_models(path: Path, like: Case) -> None:
    """Add the models to a store, under the setting of a case that it has."""
    with create_store(path) as store:
        run = store.add_run("2026-01-03T00:00:00+00:00", "mine", 0, ENVIRONMENT)
        macs = like.batch * Case().graph().conv_macs(like.height, like.width) if like.factory else 0
        macs = macs or like.batch * like.graph().conv_macs(like.height, like.width)
        for label, factory in FACTORIES.items():
            case = Case.from_json(like.to_json()).with_spec(factory)
            store.add_case(case, ["Also mine"] if label == "Mine" else [])
            for result in results_of(label, macs):
                store.add_result(run, case.case_id, result)


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A network of the small store under its main setting."""
    data = load(make_store(tmp_path_factory.mktemp("plain") / "tiny.sqlite"))
    row = data.networks(None).iloc[len(data.networks(None)) // 2]
    return data.cases[str(row["case_id"])][0]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, like: Case) -> tuple[Data, Data]:
    """The small store without and with the models."""
    folder = tmp_path_factory.mktemp("both")
    plain, mixed = (make_store(folder / f"{name}.sqlite") for name in ("plain", "mixed"))
    add_models(mixed, like)
    return load(plain), load(mixed)


def test_models_are_apart_from_the_networks(both: tuple[Data, Data]) -> None:
    """The frame of networks is as it was, and the models' own has every label once, its axes missing."""
    plain, mixed = both

    pd.testing.assert_frame_equal(mixed.frame.drop(columns="factory"), plain.frame.drop(columns="factory"))
    assert mixed.frame["factory"].isna().all()
    assert sorted(mixed.own["label"]) == sorted(["Mine", EVIL, "models:gone", "Also mine"])
    assert mixed.own[["variant", "depth", "width", "skip"]].isna().all(axis=None)
    assert set(mixed.own["setting"]) == {mixed.settings["inference"]}


def test_no_comparison_along_the_axes_sees_a_model(both: tuple[Data, Data]) -> None:
    """Findings, ratios, curves and drawings are the same with and without them."""
    plain, mixed = both

    for section in SECTIONS:
        if section.name in ("scaling", "networks", "overview"):
            assert section.context(mixed) == section.context(plain), section.name


def test_rows_failures_and_the_header_count_them(both: tuple[Data, Data]) -> None:
    """What lists everything lists models too."""
    plain, mixed = both

    before, after = ({row[0].text for row in rows_context(data)["table"].rows} for data in both)
    assert after - before == {"Mine", EVIL, "models:gone"}
    assert header_context(mixed)["networks"] == header_context(plain)["networks"] + 3
    assert header_context(mixed)["labels"] == header_context(plain)["labels"] + 4
    reasons = {row[1].text for row in failures_context(mixed)["summary"].rows}
    assert GONE in reasons


def test_a_scatter_plot_has_stars_for_models(both: tuple[Data, Data]) -> None:
    """They stand among the networks, named, and the caption says that the correlation leaves them out."""
    plain, mixed = (next(plot for plot in tradeoff_context(data)["plots"] if plot.name == "cost-cost") for data in both)

    assert "Stars are models that are not of the suite" in mixed.caption
    assert mixed.caption.startswith(
        plain.caption.removesuffix(" Hollow points carry a doubt and are left out of the correlation.")
    )
    assert {row[0].text for row in mixed.table.rows} - {row[0].text for row in plain.table.rows} == {"Mine", EVIL}
    assert "Mine" in mixed.svg
    assert "<b>Mine" not in mixed.svg


def test_a_model_stands_among_its_nearest_in_macs(both: tuple[Data, Data], like: Case) -> None:
    """The section's table is by MACs, and says what the model takes of the nearest network's."""
    context = others_context(both[1])

    (setting,) = context["settings"]
    labels = [row[0].text for row in setting["table"].rows]
    macs = [row[2].order or 0.0 for row in setting["table"].rows if row[2].order != float("inf")]
    assert macs == sorted(macs)
    assert labels.index("Mine") - labels.index(like.spec.label) in (1, 2)
    nearest = f"beside {like.spec.label}, of the suite's networks here the nearest in MACs"
    mine = next(sentence for sentence in setting["beside"] if sentence.startswith("Mine "))
    assert nearest in mine
    assert "1.00\u00d7 its convolution MACs (counted)" in mine
    assert {row[0].text: row[-1].text for row in setting["table"].rows}["models:gone"] == f"unsupported: {GONE}"
    facts = {row[0].text: [cell.text for cell in row[1:]] for row in context["models"].rows}
    assert facts["Mine"] == ["models:mine(width=8)", "0123456789ab", "hello <i>you</i>"]
    assert facts["models:gone"] == ["models:gone", "not found", ""]


def test_doubts_of_models_are_marked(both: tuple[Data, Data]) -> None:
    """A number with a note has its tilde; the note itself is told once, among the failures and doubts."""
    (setting,) = others_context(both[1])["settings"]

    row = next(row for row in setting["table"].rows if row[0].text == EVIL)
    assert sum(cell.text.startswith("~ ") for cell in row) == 1
    assert row[-1].text == ""
    assert "noisy: the median is known to 30% only" in {
        row[-1].text for row in failures_context(both[1])["doubts"].rows
    }


def test_a_store_without_models_says_how_to_add_one(both: tuple[Data, Data]) -> None:
    """The section is short where there is nothing to show."""
    section = next(section for section in SECTIONS if section.name == "others")

    shown = render_section(section, both[0])

    assert others_context(both[0])["settings"] == []
    assert "skipcost sweep quick --model package.module:factory" in shown


def test_a_store_of_models_alone_has_a_report(tmp_path: Path, like: Case) -> None:
    """No section needs a network of the suite; labels and what a factory printed are text, never tags."""
    add_models(tmp_path / "own.sqlite", like)

    write_report(tmp_path / "own.sqlite", tmp_path / "report.html")

    text = (tmp_path / "report.html").read_text()
    assert "Mine" in text
    assert EVIL not in text
    assert "<i>you</i>" not in text
    assert "No network of the suite was measured under this setting" in text
