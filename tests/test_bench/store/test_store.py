"""The store keeps what was committed, takes nothing twice, and leaves alone what is not its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import OUTCOMES, Result, outcomes_of
from skipcost.bench.errors import StoreError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import SCHEMA_VERSION, create_store, open_store
from skipcost.bench.store.tables import COLUMNS, wide_table

HERE = {"fingerprint": "here", "host": "a"}
CASE = Case()


def fill(path: Path, *results: Result, environment: dict[str, str] = HERE) -> list[bool]:
    """Write results of one case as one run; say for each whether it was new."""
    with create_store(path) as store:
        store.add_case(CASE, ["unet/d4/w64/same"])
        run = store.add_run("2026-01-01T00:00:00+00:00", "test", 0, environment)
        return [store.add_result(run, CASE.case_id, result) for result in results]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_results_come_back_as_they_went_in(tmp_path: Path, outcome: str) -> None:
    """Samples, note and detail of every outcome survive the store."""
    result = Result("latency_s", outcome, (0.1, 0.25), "noisy", {"warmup_calls": 3})

    fill(tmp_path / "x.sqlite", result)

    with open_store(tmp_path / "x.sqlite") as store:
        assert [row.result for row in store.rows()] == [result]
        assert store.cases() == {CASE.case_id: (CASE, ["unet/d4/w64/same"])}


def test_no_result_is_taken_twice_in_one_environment(tmp_path: Path) -> None:
    """A second row for the same environment, case and metric is turned away, also from another run."""
    path = tmp_path / "x.sqlite"
    fill(path, Result("params", samples=(1,)))

    again = fill(path, Result("params", samples=(2,)), Result("conv_macs", samples=(3,)))
    elsewhere = fill(path, Result("params", samples=(4,)), environment={"fingerprint": "there"})

    assert again == [False, True]
    assert elsewhere == [True]


def test_what_is_written_together_is_committed_together(tmp_path: Path) -> None:
    """Nothing of a block that fails stays, and nobody sees half of one."""
    path = tmp_path / "x.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "test", 0, HERE)
        with contextlib.suppress(ZeroDivisionError), store.writing():
            store.add_case(CASE, [])
            store.add_result(run, CASE.case_id, Result("params", samples=(1,)))
            assert len(store.rows()) == 1
            raise ZeroDivisionError
        assert (store.cases(), store.rows()) == ({}, ())

        with store.writing():
            store.add_case(CASE, [])
            store.add_result(run, CASE.case_id, Result("params", samples=(2,)))
            with open_store(path) as other:
                assert other.rows() == ()

        assert [row.result.samples for row in store.rows()] == [(2,)]


def test_of_several_rows_the_newest_run_s_is_read(tmp_path: Path) -> None:
    """What was measured again stands for what was there before, everywhere; other environments keep theirs."""
    with create_store(tmp_path / "x.sqlite") as store:
        store.add_case(CASE, [])
        for name, outcome, value in (("here", "crash", 1), ("there", "ok", 2), ("here", "ok", 3)):
            run = store.add_run("now", "test", 0, {"fingerprint": name})
            store.add_result(run, CASE.case_id, Result("params", outcome, (value,)), again=True)
        store.add_result(1, CASE.case_id, Result("conv_macs", samples=(4,)))

    with open_store(tmp_path / "x.sqlite") as store:
        rows = [(row.run_id, row.fingerprint, row.result.samples[0]) for row in store.rows()]
        assert rows == [(1, "here", 4), (2, "there", 2), (3, "here", 3)]
        assert store.measured("here") == {(CASE.case_id, "params"): "ok", (CASE.case_id, "conv_macs"): "ok"}


def test_a_run_knows_what_it_asked_for(tmp_path: Path) -> None:
    """Cases that an earlier run had measured belong to a run's plan, too."""
    fill(tmp_path / "x.sqlite", Result("params", samples=(1,)))
    with create_store(tmp_path / "x.sqlite") as store:
        store.add_asked(store.add_run("later", "test", 0, HERE), [CASE.case_id])

    with open_store(tmp_path / "x.sqlite") as store:
        assert store.asked() == [(1, CASE.case_id), (2, CASE.case_id)]


def test_a_store_from_before_plans_were_kept_is_read_and_added_to(tmp_path: Path) -> None:
    """Without the table a run asked for what it measured; the next writer adds the table."""
    path = tmp_path / "x.sqlite"
    fill(path, Result("params", samples=(1,)), Result("conv_macs", samples=(1,)))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE asked")

    with open_store(path) as store:
        assert store.asked() == [(1, CASE.case_id)]
    with create_store(path) as store:
        store.add_asked(store.add_run("later", "test", 0, HERE), [CASE.case_id])
        assert store.asked() == [(1, CASE.case_id), (2, CASE.case_id)]


def test_the_newest_environment_is_shown(tmp_path: Path) -> None:
    """Rows of different environments are never mixed into one table."""
    path = tmp_path / "x.sqlite"
    fill(path, Result("params", samples=(1,)), environment={"fingerprint": "old"})
    fill(path, Result("params", samples=(2,)), environment={"fingerprint": "new"})

    with open_store(path) as store:
        frame = wide_table(store, store.newest().fingerprint)

    assert frame["params"].tolist() == [2]


def test_the_wide_table_has_the_documented_columns(tmp_path: Path) -> None:
    """One row per case: spec fields, case fields, a column per metric by its name, outcome."""
    fill(tmp_path / "x.sqlite", Result("latency_s", samples=(3.0, 1.0, 2.0)))

    with open_store(tmp_path / "x.sqlite") as store:
        frame = wide_table(store, "here")

    assert tuple(frame.columns) == COLUMNS
    assert set(METRICS) < set(COLUMNS)
    assert COLUMNS[-1] == "outcome"
    assert frame["latency_s"].tolist() == [2.0]


def test_a_failure_names_its_outcome_and_metric() -> None:
    """The outcome of a case is ok, or says which metric went wrong and how."""
    results = {"params": Result("params", samples=(1,)), "latency_s": Result("latency_s", "timeout", note="late")}

    assert outcomes_of(results) == "timeout: latency_s"
    assert outcomes_of({"params": results["params"]}) == "ok"


def test_an_unknown_outcome_cannot_be_made() -> None:
    """A misspelt outcome would read as an absent failure."""
    with pytest.raises(ValueError, match="outcome 'okay' is unknown; accepted: ok, out_of_memory"):
        Result("params", "okay")


def test_after_a_clean_exit_the_file_alone_is_the_store(tmp_path: Path) -> None:
    """No log file is left beside the store, so a plain copy has every row, even where nothing can be written."""
    fill(tmp_path / "x.sqlite", Result("params", samples=(7,)))

    shutil.copy(tmp_path / "x.sqlite", tmp_path / "copy.sqlite")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.sqlite", "x.sqlite"]
    with open_store(tmp_path / "copy.sqlite") as store:
        assert [row.result.samples for row in store.rows()] == [(7,)]


def test_a_killed_writer_loses_no_committed_row(tmp_path: Path) -> None:
    """SIGKILL right after a commit: the row is there, the store opens, and writing goes on."""
    path = tmp_path / "x.sqlite"
    script = f"""
import os, signal
from pathlib import Path
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
store = create_store(Path({str(path)!r}))
store.add_case(Case(), [])
run = store.add_run("2026-01-01T00:00:00+00:00", "test", 0, {HERE!r})
store.add_result(run, Case().case_id, Result("params", samples=(5,)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)

    assert done.returncode == -signal.SIGKILL
    assert fill(path, Result("params", samples=(6,)), Result("conv_macs", samples=(1,))) == [False, True]


def foreign(path: Path) -> None:
    """Write somebody else's database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")


def text(path: Path) -> None:
    """Write no database at all."""
    path.write_text("not a database, but long enough to be looked at " * 100)


def truncated(path: Path) -> None:
    """Write half of a store."""
    fill(path, *[Result(name, samples=tuple(range(2000))) for name in METRICS])
    os.truncate(path, path.stat().st_size // 2)


def newer(path: Path) -> None:
    """Write a store of a later schema."""
    fill(path, Result("params", samples=(1,)))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "is a SQLite file, but not a store of skipcost; it was left untouched"),
        (text, "is not a readable store .*it was left untouched"),
        (truncated, "(is damaged|is not a readable store).*it was left untouched"),
        (newer, f"has schema version {SCHEMA_VERSION + 1}, this skipcost reads version {SCHEMA_VERSION}"),
    ],
)
@pytest.mark.parametrize("use", [open_store, create_store])
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, make, message: str, use) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - functions of the two tables above
    """Foreign, damaged and newer files get one sentence, for readers and for writers, and keep every byte."""
    path = tmp_path / "x.sqlite"
    make(path)
    before = path.read_bytes()

    with pytest.raises(StoreError, match=message):
        use(path)

    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """A writer killed before its first commit leaves an empty file, with which the next one goes on."""
    path = tmp_path / "x.sqlite"
    path.touch()

    assert fill(path, Result("params", samples=(1,))) == [True]


def test_a_store_in_use_can_be_read(tmp_path: Path) -> None:
    """While a sweep writes, others read what was committed so far."""
    with create_store(tmp_path / "x.sqlite") as writer:
        writer.add_case(CASE, [])
        run = writer.add_run("2026-01-01T00:00:00+00:00", "test", 0, HERE)
        writer.add_result(run, CASE.case_id, Result("params", samples=(1,)))

        with open_store(tmp_path / "x.sqlite") as reader:
            assert [row.result.metric for row in reader.rows()] == ["params"]


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Reading a missing store says so and how to make one; nothing is created."""
    with pytest.raises(StoreError, match=r"there is no store at .*skipcost sweep"):
        open_store(tmp_path / "x.sqlite")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    """Writing to a folder, or into a place that cannot be made, is refused in a sentence."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="is a folder"):
        create_store(tmp_path)
    with pytest.raises(StoreError, match="cannot make the folder of"):
        create_store(tmp_path / "file" / "x.sqlite")
