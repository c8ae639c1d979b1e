"""A small store made by hand, and what the report reads from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skipcost.bench.cases import Case
from skipcost.bench.custom import Factory
from skipcost.bench.plan import load_plan
from skipcost.bench.records import Result
from skipcost.bench.store import create_store
from skipcost.reports.data import Data, load
from skipcost.reports.provenance import header_context
from skipcost.unet_models import ModelSpec

SWEEP = """
[[grid]]
variant = ["unet", "unet++", "unet3+"]
depth = [2, 3]
width = [8, 12, 16]
skip = ["concat", "sum", "none"]
size = 64
metrics = ["params"]

[[grid]]
variant = ["unet", "unet++", "unet3+"]
depth = [2, 3]
width = [8, 12, 16]
skip = ["concat", "sum", "none"]
size = 64
mode = "training"
batch = 8
metrics = ["params"]
"""
FAILED = "unet3+/d3/w16/sum"
DOUBTFUL = "unet/d2/w8/concat"
EVIL = "<script>alert('note')</script>"
ENVIRONMENT = {
    "python": "3.11.7",
    "system": "Linux",
    "cpu": "A processor",
    "cpus": 2,
    "memory_bytes": 8 << 30,
    "gpus": [],
    "cuda": False,
    "versions": {"torch": "2.13.0"},
    "flags": {},
    "fingerprint": "here",
    "commit": "0123456789abcdef",
    "dirty": True,
}


def _results(case: Case) -> list[Result]:
    """Counts as they are, latency and memory made up from them: 1 ms and a nanosecond a MAC, 100 MACs a byte."""
    graph = case.graph()
    macs = case.batch * graph.conv_macs(case.height, case.width)
    exact = {"params": graph.params(), "conv_macs": macs, "receptive_field": graph.receptive_field()}
    found = [Result(name, samples=(value,)) for name, value in exact.items()]
    found.append(Result("peak_memory_predicted_bytes", samples=(macs // 100,)))
    if case.mode == "training":
        return found
    missed = {"by_operator": {"conv": macs}, "not_counted": {"aten::max_pool2d": case.spec.depth}}
    found.append(Result("fvcore_flops", samples=(macs * 1.5,), detail=missed))
    second = 1e-3 + macs * 1e-9
    latency = Result("latency_s", samples=(second, second * 1.02, second * 0.98))
    if case.spec.label == FAILED:
        latency = Result("latency_s", "out_of_memory", note=EVIL)
    if case.spec.label == DOUBTFUL:
        latency = replace(latency, samples=(1e3,), note="noisy: the median is known to 40% only")
    return [*found, latency]


def make_store(path: Path) -> Path:
    """Write the store: an older environment with one row, then the one that is reported."""
    sweep = path.with_suffix(".toml")
    sweep.write_text(SWEEP)
    plan = load_plan(str(sweep), {}, "cpu", 1)
    with create_store(path) as store:
        old = store.add_run("2026-01-01T00:00:00+00:00", "tiny", 0, {**ENVIRONMENT, "fingerprint": "elsewhere"})
        run = store.add_run("2026-01-02T03:04:05+00:00", "tiny", 7, ENVIRONMENT)
        for planned in plan.cases:
            store.add_case(planned.case, list(planned.aliases))
            for result in _results(planned.case):
                store.add_result(run, planned.case.case_id, result)
        store.add_result(old, plan.cases[0].case.case_id, Result("params", samples=(1,)))
    return path


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
    assert "1 rows of models as they were before an edit are left out." in header_context(data)["doubts"]


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
