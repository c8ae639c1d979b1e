"""What the report reads from a small store made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import DOUBTFUL, ENVIRONMENT, make_store

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
from skipcost.reports.data import Data, load
from skipcost.reports.sections.provenance import header_context
from skipcost.unet_models import ModelSpec


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The small store as the report reads it."""
    return load(make_store(tmp_path_factory.mktemp("store") / "tiny.sqlite"))


def test_every_alias_has_a_row_that_names_what_was_measured(data: Data) -> None:
    """A variant's curve is complete although the store measures each network once."""
    cells = data.cells("inference").set_index("label")

    assert len(cells) == 3 * 2 * 3 * 3
    assert cells.loc["unet++/d2/w8/none", "same_as"] == "unet/d2/w8/none"
    assert cells.loc["unet++/d2/w8/none", "conv_macs"] == cells.loc["unet/d2/w8/none", "conv_macs"]


def test_rows_of_other_environments_are_counted_and_left_out(data: Data) -> None:
    """Numbers of two machines never meet."""
    params = data.frame.loc[data.frame["label"] == "unet/d2/w8/concat", "params"]

    assert data.other_rows == 1
    assert 1 not in set(params)


def test_an_edited_model_is_one_row(tmp_path: Path) -> None:
    """As it was when it was asked for last; its former rows are counted, and told in the header."""
    case = Case(spec=Factory("nets:own"))
    with create_store(tmp_path / "own.sqlite") as store:
        for code, params in (("f00", 450), ("0ba", 226)):
            run = store.add_run("2026-01-02T03:04:05+00:00", "own", 0, ENVIRONMENT)
            state = case.of_factory(code=code)
            store.add_case(state, [])
            store.add_result(run, state.case_id, Result("params", samples=(params,)))
        first = case.of_factory(code="f00").case_id
        store.add_asked(store.add_run("2026-01-03T03:04:05+00:00", "own", 0, ENVIRONMENT), [first])

    data = load(tmp_path / "own.sqlite")

    assert data.own["params"].tolist() == [450]
    assert (data.former_rows, data.other_rows) == (1, 0)
    assert "Left out: 1 row of models as they were before an edit." in header_context(data)["doubts"]


def test_numbers_with_a_doubt_stay_in_the_frame_and_leave_the_sound_one(data: Data) -> None:
    """What a sentence rests on has no doubt, what a table shows has everything."""
    at = data.cells("inference").set_index("label").index.get_loc(DOUBTFUL)

    assert data.cells("inference").iloc[at]["latency_s"] == 1e3
    assert data.cells("inference", sound=True)["latency_s"].isna().iloc[at]


def test_the_setting_with_the_most_rows_is_the_main_one(data: Data) -> None:
    """Inference and training are never mixed in one figure."""
    assert data.settings == {
        "inference": "64x64 pixels, batch 1, inference, fp32",
        "training": "64x64 pixels, batch 8, training, fp32",
    }


def test_a_cap_on_channels_does_not_split_the_networks_that_it_leaves_alone(tmp_path: Path) -> None:
    """A spec drops a cap that caps nothing, but a sweep over depth with a cap is one sweep."""
    with create_store(tmp_path / "capped.sqlite") as store:
        run = store.add_run("2026-01-02T03:04:05+00:00", "capped", 0, ENVIRONMENT)
        for depth in (1, 2, 3):
            case = Case(spec=ModelSpec(depth=depth, width=8, max_width=32))
            store.add_case(case, [])
            store.add_result(run, case.case_id, Result("params", samples=(depth,)))

    data = load(tmp_path / "capped.sqlite")

    assert set(data.frame["setting"]) == {"512x512 pixels, batch 1, inference, fp32, max_width=32"}
