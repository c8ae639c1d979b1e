"""Files that are not what they were: each damage is one sentence with exit code 2, in every command that reads it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke_cli

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.compare.ab import Journal
from skipcost.bench.compare.baseline import baseline_of, read_baseline
from skipcost.bench.compare.benchmarks import read_benchmarks
from skipcost.bench.compare.verdicts import read_json
from skipcost.bench.errors import BenchError, StoreError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.predictions.calibration import FEATURES, FORMAT, SCHEMA, read_calibration
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.store.tables import wide_table
from skipcost.bench.sweeps.driver import pending
from skipcost.bench.sweeps.plan import load_plan
from skipcost.kernels.dispatch.winners import read_rows
from skipcost.reports.page import write_report
from skipcost.unet_models import ModelSpec

CASES = tuple(Case(spec=ModelSpec(depth=1, width=width), height=32, width=32) for width in (8, 16))
ENVIRONMENT = {"fingerprint": "here", "code": "x", "cpu": "a CPU", "gpus": [], "versions": {"torch": "2"}}
DAMAGE = {
    "samples that are no JSON": "UPDATE results SET samples = '[1'",
    "samples that are no list": "UPDATE results SET samples = '1'",
    "samples of texts": """UPDATE results SET samples = '["a"]'""",
    "samples of truth values": "UPDATE results SET samples = '[true]'",
    "a sample beyond what tables hold": f"UPDATE results SET samples = '[{10**400}]'",  # noqa: S608 - our own text
    "half a count": "UPDATE results SET samples = '[1.5]' WHERE metric = 'params'",
    "samples nested without end": "UPDATE results SET samples = '" + "[" * 99999 + "'",
    "bytes for a text": "UPDATE results SET note = x'ff00'",
    "bytes that are no UTF-8": "UPDATE results SET note = CAST(x'ff' AS TEXT)",
    "an outcome nobody knows": "UPDATE results SET outcome = 'weird'",
    "a metric nobody knows": "UPDATE results SET metric = metric || 'zz'",
    "a detail that is a list": "UPDATE results SET detail = '[]'",
    "a detail of other kinds": """UPDATE results SET detail = '{"low": "much"}'""",
    "a line without its device": "UPDATE results SET metric = 'roofline_s' WHERE metric = 'latency_s'",
    "a definition without a network": "UPDATE cases SET definition = '{}'",
    "a definition that is a list": "UPDATE cases SET definition = '[]'",
    "a definition of another network": """UPDATE cases SET definition = '{"label":"unet/d1/w24/concat"}'""",
    "a definition with a strange field": """UPDATE cases SET definition = '{"label":"unet/d1/w8/concat","x":1}'""",
    "a label that is a number": """UPDATE cases SET definition = '{"label":3}'""",
    "aliases that are a number": "UPDATE cases SET aliases = '3'",
    "an environment of nothing": "UPDATE runs SET environment = '{}'",
    "an environment of other kinds": """UPDATE runs SET environment = '{"fingerprint": "here", "gpus": "a lot"}'""",
    "a GPU without a name": """UPDATE runs SET environment = '{"fingerprint": "here", "gpus": [{}]}'""",
    "another environment's fingerprint": "UPDATE runs SET fingerprint = 'there'",
    "a time that is a number": "UPDATE runs SET started = x'00'",
    "results of a run that is not there": "DELETE FROM runs",
    "results of a case that is not there": "DELETE FROM cases",
    "a table that is not there": "ALTER TABLE results RENAME TO results2",
    "a column that is not there": "ALTER TABLE cases RENAME COLUMN aliases TO other",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound store with two cases."""
    path = tmp_path_factory.mktemp("store") / "x.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "quick", 0, ENVIRONMENT)
        for case in CASES:
            store.add_case(case, [])
            for name in ("params", "conv_macs", "latency_s"):
                store.add_result(run, case.case_id, Result(name, samples=(100,)))
    return path.read_bytes()


def damaged(path: Path, whole: bytes, statement: str) -> Path:
    """Write the store with a statement run in it."""
    path.write_bytes(whole)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    return path


def commands(store: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """Every command that reads a store before it starts to measure."""
    base = folder / "b.jsonl"
    yield "show", str(store)
    yield "show", str(store), "--format", "json"
    yield "baseline", str(store), "-o", str(folder / "out.jsonl")
    yield "gate", str(store), "--baseline", str(base)
    yield "accuracy", str(store)
    yield "calibrate", str(store), "-o", str(folder / "c.json")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused_by_every_command(tmp_path: Path, whole: bytes, kind: str) -> None:
    """One sentence that says which row or what is wrong; the file is left as it is, and nothing is written."""
    sound = tmp_path / "sound.sqlite"
    sound.write_bytes(whole)
    with open_store(sound) as opened:
        (tmp_path / "b.jsonl").write_text(baseline_of(opened).text)
    store = damaged(tmp_path / "d.sqlite", whole, DAMAGE[kind])
    before = store.read_bytes()

    for words in commands(store, tmp_path):
        done = invoke_cli(words)
        assert isinstance(done.exception, StoreError), (words, done.exception)
        assert str(store) in str(done.exception)
    with pytest.raises(StoreError):
        write_report(store, tmp_path / "r.html")
    assert store.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"sound.sqlite", "d.sqlite", "b.jsonl"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_sweep_does_not_go_on_with_a_damaged_store(tmp_path: Path, whole: bytes, kind: str) -> None:
    """What a sweep or a plan opens to see what is missing is refused, too: nothing was missing is not said."""
    store = damaged(tmp_path / "d.sqlite", whole, DAMAGE[kind])

    with pytest.raises(StoreError), create_store(store) as opened:
        pending(load_plan("quick", {}, "cpu", 1), opened, "here")


def test_the_row_that_is_damaged_is_named(tmp_path: Path, whole: bytes) -> None:
    """By its number, in the order in which rows are read, and its table."""
    store = damaged(tmp_path / "d.sqlite", whole, "UPDATE results SET outcome = 'odd' WHERE metric = 'latency_s'")

    with pytest.raises(StoreError, match=r"row 2 of results is damaged: outcome 'odd' is unknown.*restore a copy"):
        open_store(store)


@pytest.mark.parametrize("sample", ["NaN", "Infinity", "-Infinity", "-1", "1e999"])
def test_what_is_no_cost_is_shown_as_none(tmp_path: Path, whole: bytes, sample: str) -> None:
    """A number that nothing can cost is a number that is not there, in tables as in the gate."""
    store = damaged(tmp_path / "d.sqlite", whole, DAMAGE["samples that are no JSON"].replace("[1", f"[{sample}]"))

    with open_store(store) as opened:
        table = wide_table(opened, opened.newest().fingerprint)

    assert table[["params", "latency_s"]].isna().to_numpy().all()
    assert invoke_cli(["show", str(store)]).exit_code == 0
    assert write_report(store, tmp_path / "r.html")


HEADER = '{"format": "skipcost baseline", "schema": 1, "sweep": "ci", "versions": {}}'
BASELINES = {
    "nested without end": f'{HEADER}\n{{"name": "x", "case": {"[" * 99999}',
    "noisy of texts": f'{HEADER}\n{{"name": "x", "case": {{}}, "exact": {{"params": 1}}, "noisy": {{"x": "y"}}}}',
    "versions of lists": '{"format": "skipcost baseline", "schema": 1, "sweep": "ci", "versions": {"torch": []}}\n',
    "a number beyond all": f'{HEADER}\n{{"name": "x", "case": {{}}, "exact": {{"params": {10**400}}}}}',
    "a case that is a text": f'{HEADER}\n{{"name": "x", "case": "y", "exact": {{"params": 1}}}}',
}


@pytest.mark.parametrize("kind", BASELINES)
def test_a_damaged_baseline_is_refused(tmp_path: Path, kind: str) -> None:
    """Whatever is in it, it is no baseline that can be compared with."""
    (path := tmp_path / "b.jsonl").write_text(BASELINES[kind])

    with pytest.raises(BenchError, match=r"b\.jsonl is no baseline that can be compared with: .*writes one"):
        read_baseline(path)


VERDICT: dict[str, Any] = {
    "case": "x",
    "metric": "params",
    "verdict": "regressed",
    "base": 1,
    "now": 2,
    "interval": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"base": "one"},
        {"now": [2]},
        {"base": 10**400},
        {"case": 3},
        {"metric": None},
        {"verdict": "fine"},
        {"verdict": ["regressed"]},
        {"why": {}},
        {"ratio": "2"},
        {"interval": [1]},
        {"interval": ["a", "b"]},
        {"interval": 3},
        {"more": 1},
    ],
)
def test_damaged_verdicts_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A verdict with a part of another kind is none; as it was, it is one."""
    path = tmp_path / "v.json"
    path.write_text(json.dumps([VERDICT]))
    assert read_json(path)[0].now == 2
    path.write_text(json.dumps([VERDICT | change]))

    with pytest.raises(BenchError, match=r"v\.json holds no verdicts"):
        read_json(path)


@pytest.mark.parametrize("text", ["{}", "3", '["x"]', "[" * 99999, "[null]"])
def test_a_file_of_something_else_holds_no_verdicts(tmp_path: Path, text: str) -> None:
    """Any JSON but a list of objects."""
    (path := tmp_path / "v.json").write_text(text)

    with pytest.raises(BenchError, match=r"v\.json holds no verdict"):
        read_json(path)


BENCHMARK: dict[str, Any] = {"fullname": "x", "extra_info": {"params": 1}, "stats": {"median": 0.1}}


@pytest.mark.parametrize(
    "change",
    [
        {"fullname": 3},
        {"extra_info": None},
        {"extra_info": {"params": "many"}},
        {"extra_info": {"params": 10**400}},
        {"stats": {"median": "slow"}},
        {"stats": {"median": float("nan")}},
        {"stats": 3},
    ],
)
def test_damaged_benchmarks_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A benchmark with a part of another kind is none of pytest-benchmark's; as it was, it is one."""
    path = tmp_path / "now.json"
    path.write_text(json.dumps({"benchmarks": [BENCHMARK]}))
    assert read_benchmarks(path).entries
    path.write_text(json.dumps({"benchmarks": [BENCHMARK | change]}))

    with pytest.raises(BenchError, match=r"now\.json(:| is not pytest-benchmark's JSON)"):
        read_benchmarks(path)


HELD_OUT = {"spearman": 1.0, "mean_error": 0.1, "worst_error": 0.2, "within_tenth": 0.5}
MODEL: dict[str, Any] = {
    "setting": {"device": "cpu"},
    "costs": dict.fromkeys(FEATURES, 1e-9),
    "ratios": [0.9, 1.0, 1.1],
    "coverage": 0.9,
    "macs": [1.0, 2.0],
    "rows": 20,
    "networks": 10,
    "held_out": HELD_OUT,
}
CALIBRATION: dict[str, Any] = {
    "format": FORMAT,
    "schema": SCHEMA,
    "device": "a CPU",
    "fingerprint": "here",
    "store": "x.sqlite",
    "measured": "today",
    "doubtful": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"device": 3},
        {"doubtful": "none"},
        {"models": 3},
        {"models": [3]},
        {"models": [MODEL | {"ratios": ["a", "b", "c"]}]},
        {"models": [MODEL | {"ratios": [1.1, 1.0, 0.9]}]},
        {"models": [MODEL | {"costs": {"passes": "dear"}}]},
        {"models": [MODEL | {"costs": {"wishes": 1.0}}]},
        {"models": [MODEL | {"macs": [1.0]}]},
        {"models": [MODEL | {"held_out": HELD_OUT | {"spearman": None}}]},
        {"models": [MODEL | {"rows": 1.5}]},
        {"models": [MODEL | {"setting": []}]},
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A calibration with a part of another kind would predict nonsense; as it was, it is one."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps(CALIBRATION | {"models": [MODEL]}))
    assert read_calibration(path).models
    path.write_text(json.dumps(CALIBRATION | {"models": [MODEL]} | change))

    with pytest.raises(BenchError, match=r"c\.json is not a calibration that can be read"):
        read_calibration(path)


MEASURED = {"ratios": [0.1], "base_s": 1.0, "now_s": 1.1, "others": 0.0, "changes": [], "took_s": 1.0}
KEPT: dict[str, Any] = {"stage": "first", "pair": 0, "subject": "x", "measured": MEASURED}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        json.dumps(KEPT | {"pair": "0"}),
        json.dumps(KEPT | {"measured": {}}),
        json.dumps(KEPT | {"measured": MEASURED | {"ratios": ["a"]}}),
        json.dumps(KEPT | {"measured": MEASURED | {"base_s": None}}),
        json.dumps(KEPT | {"measured": MEASURED | {"changes": [3]}}),
    ],
)
def test_a_damaged_journal_of_ab_is_refused(tmp_path: Path, line: str) -> None:
    """With the line, and what to do: what it holds can be measured again."""
    path = tmp_path / "j.jsonl"
    path.write_text(f"{{}}\n{json.dumps(KEPT)}\n")
    assert Journal(path, {}).get("first", 0, "x")
    path.write_text(f"{{}}\n{line}\n")

    with pytest.raises(BenchError, match=r"line 2 of .*j\.jsonl is damaged"):
        Journal(path, {})


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[]", "it is no JSON object"),
        ('{"device": 3}', "its device is 3"),
        ('{"seconds": "a"}', "its seconds is 'a'"),
        ('{"outcome": "ok", "implementation": "x", "device": {"name": "y"}}', "it is ok without seconds"),
        ('{"outcome": "ok", "implementation": "x", "device": {}, "seconds": [1]}', "it is ok without device"),
        ('{"outcome": "ok", "implementation": "x", "device": {"a": 1}, "seconds": [1]}', "its device has no name"),
        ('{"outcome": "ok", "implementation": "x", "device": {"name": "y"}, "seconds": ["a"]}', "are no times"),
    ],
)
def test_damaged_rows_of_kernels_are_refused(line: str, why: str) -> None:
    """Rows that somebody measured decide which kernel runs: what is none is named with its line."""
    with pytest.raises(ValueError, match=rf"line 1 of rows\.jsonl is no row of measurements: .*{why}"):
        list(read_rows(f"{line}\n", "rows.jsonl"))


def test_every_metric_can_be_kept(tmp_path: Path) -> None:
    """What measuring may write is never called damaged when it is read again, for any metric."""
    detail = {"device": "d", "flop_per_s": 1.0, "bandwidth_bytes_per_s": 1.0, "sources": {}, "layers": {}}
    with create_store(path := tmp_path / "x.sqlite") as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "quick", 0, ENVIRONMENT)
        store.add_case(CASES[0], ["unet/d1/w8/same"])
        for name in METRICS:
            store.add_result(run, CASES[0].case_id, Result(name, samples=(1,), detail=detail))

    with open_store(path) as opened:
        assert {row.result.metric for row in opened.rows()} == set(METRICS)
