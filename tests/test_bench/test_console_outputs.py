"""Every output of every command goes through one door: over the options themselves, so that a new one is asked for."""

from __future__ import annotations

import argparse
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import pytest
from command_line import invoke_cli
from typer.models import ArgumentInfo

from skipcost.bench import cli
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.compare.ab import Journal
from skipcost.bench.compare.baseline import baseline_of
from skipcost.bench.compare.verdicts import Verdict, pass_on
from skipcost.bench.console import ERR
from skipcost.bench.errors import BenchError, StoreError
from skipcost.bench.kernels import bench as kernels_bench
from skipcost.bench.kernels import tune
from skipcost.bench.measure.environment import version_of
from skipcost.bench.store.store import create_store, open_store
from skipcost.reports import __main__ as report_command
from skipcost.unet_models import ModelSpec

GATE = ("gate", "s.sqlite", "--baseline", "b.jsonl")
AB = ("ab", "HEAD", "--sweep", "t.toml")
OUTPUTS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {  # the words before the place, the inputs
    ("baseline", "-o"): (("baseline", "s.sqlite", "-o"), ("s.sqlite",)),
    ("gate", "--junit"): ((*GATE, "--junit"), ("s.sqlite", "b.jsonl")),
    ("gate", "--verdicts"): ((*GATE, "--verdicts"), ("s.sqlite", "b.jsonl")),
    ("ab", "--junit"): ((*AB, "--junit"), ("t.toml",)),
    ("ab", "--verdicts"): ((*AB, "--verdicts"), ("t.toml",)),
    ("accuracy", "--write"): (("accuracy", "s.sqlite", "--write"), ("s.sqlite",)),
    ("calibrate", "-o"): (("calibrate", "s.sqlite", "-o"), ("s.sqlite",)),
    ("report", "-o"): (
        ("report", "s.sqlite", "--quality", "q.csv", "--verdicts", "v.json", "-o"),
        ("s.sqlite", "q.csv", "v.json"),
    ),
}
INPUTS = {  # paths that are read, and the store, which has its own door; a new option stands here or above
    ("sweep", "-o"),
    ("plan", "-o"),
    ("show", "store"),
    ("baseline", "store"),
    ("gate", "store"),
    ("gate", "--baseline"),
    ("accuracy", "store"),
    ("calibrate", "store"),
    ("report", "store"),
    ("report", "--quality"),
    ("report", "--verdicts"),
    ("fit", "--quality"),
    ("fit", "--nnunet"),
}
KINDS = ("a folder", "a FIFO", "a store", "a hard link to a store", "a link to a store", "below a file")


def paths() -> Iterator[tuple[str, str]]:
    """Command and name of every parameter that takes a path."""
    for command in (*cli.app.registered_commands, *report_command.app.registered_commands):
        assert command.callback
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and "Path" in str(hint.__origin__):
                (info,) = hint.__metadata__
                plain = name if isinstance(info, ArgumentInfo) else f"--{name}"
                named = [info.default] if isinstance(info.default, str) else []  # where Annotated leaves the first
                yield command.name or command.callback.__name__, [*named, *(info.param_decls or ()), plain][0]


def test_every_path_is_known_as_an_input_or_an_output() -> None:
    """A command's new path has to be put into one of the tables, and so under these tests."""
    assert set(paths()) == {*OUTPUTS, *INPUTS}


def test_the_kernels_write_two_kinds_of_files() -> None:
    """Journals and tiles, each behind its own refusal; a new path has to be looked at."""
    parsers: tuple[argparse.ArgumentParser, ...] = (kernels_bench.parser(), tune.parser())

    found = {action.dest for each in parsers for action in each._actions if action.type is Path}

    assert found == {"output", "journal"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a store, a baseline of it, a sweep, scores and verdicts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("skipcost.bench.commands.gate.code_hash", lambda: "code")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    with create_store(Path("s.sqlite")) as store:
        versions = {name: version_of(name) for name in ("torch", "fvcore")}
        facts = {"fingerprint": "here", "code": "code", "versions": versions}
        run = store.add_run("2026-01-01T00:00:00+00:00", "ci", 0, facts)
        store.add_case(case := Case(spec=ModelSpec(depth=1, width=8), height=32, width=32), [])
        store.add_result(run, case.case_id, Result("params", samples=(100,)))
    with open_store(Path("s.sqlite")) as opened:
        Path("b.jsonl").write_text(baseline_of(opened).text)
    Path("t.toml").write_text('[[grid]]\nvariant="unet"\ndepth=1\nwidth=8\n')
    Path("q.csv").write_text("label,score\nunet/d1/w8/concat,0.5\n")
    Path("v.json").write_text('[{"case": "x", "metric": "params", "verdict": "unchanged", "interval": null}]')
    return tmp_path


def refused(words: tuple[str, ...]) -> str:
    """Run a command that must be refused, and return its sentence."""
    app, given = (report_command.app, words[1:]) if words[0] == "report" else (cli.app, words)
    done = invoke_cli(given, app)
    assert isinstance(done.exception, BenchError), (words, done.exception, done.output)
    assert done.exception.exit_code == 2
    return str(done.exception)


def contents(folder: Path) -> dict[str, object]:
    """Everything in a folder: what each name is, and what is in it."""
    return {
        each.name: (each.lstat().st_mode, each.lstat().st_ino, each.read_bytes() if each.is_file() else None)
        for each in folder.iterdir()
    }


@pytest.mark.parametrize("output", OUTPUTS, ids=" ".join)
def test_no_output_replaces_an_input(here: Path, output: tuple[str, str]) -> None:
    """By its name, its place, a link to it or another name of it: nothing is touched, and the option is named."""
    words, inputs = OUTPUTS[output]
    for at, name in enumerate(inputs):
        Path(f"hard{at}").hardlink_to(name)
        Path(f"link{at}").symlink_to(name)
    before = contents(here)

    for at, name in enumerate(inputs):
        for place in (name, f"./{name}", str(here / name), f"hard{at}", f"link{at}"):
            assert "name another file" in refused((*words, place)), place

    assert contents(here) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", OUTPUTS, ids=" ".join)
def test_no_output_replaces_what_is_no_file_of_its_own(here: Path, output: tuple[str, str], kind: str) -> None:
    """A store, by any of its names, a FIFO, a folder; one sentence each, before anything is measured."""
    other = sqlite3.connect("other.sqlite")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    place = {"a FIFO": "fifo", "a folder": "folder", "below a file": "b.jsonl/x", "a store": "other.sqlite"}.get(
        kind, "new"
    )
    made: dict[str, Callable[[], object]] = {
        "a FIFO": lambda: os.mkfifo("fifo"),
        "a folder": lambda: Path("folder").mkdir(),
        "a hard link to a store": lambda: Path("new").hardlink_to("other.sqlite"),
        "a link to a store": lambda: Path("new").symlink_to("other.sqlite"),
    }
    made.get(kind, lambda: None)()
    before = contents(here)

    told = refused((*OUTPUTS[output][0], place))

    assert "name a" in told, told
    assert place.partition("/")[0] in told
    assert contents(here) == before


def test_two_outputs_of_a_command_are_two_files(here: Path) -> None:
    """The second would replace the first."""
    before = contents(here)

    assert "--verdicts" in refused((*GATE, "--junit", "out", "--verdicts", "./out"))
    assert contents(here) == before


@pytest.mark.parametrize("place", ["t.toml", "b.jsonl", "link", "fifo", "folder", "b.jsonl/x"])
def test_a_sweep_begins_in_no_other_file(here: Path, place: str) -> None:
    """What is no store is left as it is, by any of its names."""
    os.mkfifo("fifo")
    Path("folder").mkdir()
    Path("link").symlink_to("t.toml")
    before = contents(here)

    with pytest.raises(StoreError, match=r"name a|is not a readable store"):
        create_store(Path(place))

    assert contents(here) == before


@pytest.mark.parametrize("ending", ["-wal", "-shm"])
def test_a_sweep_does_not_begin_in_a_part_of_a_store(here: Path, ending: str) -> None:
    """Not where SQLite keeps what another sweep is writing."""
    before = contents(here)

    with pytest.raises(StoreError, match="is a part of the store beside it"):
        create_store(Path(f"s.sqlite{ending}"))

    assert contents(here) == before


@pytest.mark.usefixtures("here")
def test_outputs_are_written_with_their_folders_and_through_links() -> None:
    """What is no input is written: a new folder is made, and a link stays one."""
    Path("real.jsonl").write_text("old")
    Path("link.jsonl").symlink_to("real.jsonl")

    made = invoke_cli(["baseline", "s.sqlite", "-o", "link.jsonl"])
    gated = invoke_cli([*GATE, "--junit", "new/folder/j.xml", "--verdicts", "v2.json"])

    assert (made.exit_code, gated.exit_code) == (0, 0)
    assert Path("link.jsonl").is_symlink()
    assert Path("real.jsonl").read_text() == Path("b.jsonl").read_text()
    assert Path("new/folder/j.xml").is_file()
    assert Path("v2.json").is_file()


def test_a_summary_that_cannot_be_written_costs_no_verdict(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CI's file is no one's input: it is said that there is no summary, and the files that were asked for are there."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "s.sqlite"))
    before = Path("s.sqlite").read_bytes()

    pass_on([Verdict("x", "params", "regressed", 1, 2)], "skipcost gate", ERR, Path("j.xml"), None)

    assert "the job has no summary: " in capsys.readouterr().err
    assert Path("s.sqlite").read_bytes() == before
    assert Path("j.xml").is_file()


def test_a_summary_grows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps before wrote theirs."""
    (summary := here / "sum.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))

    pass_on([Verdict("x", "params", "regressed", 1, 2)], "skipcost gate", ERR, None, None)

    assert summary.read_text().startswith("before\n### skipcost gate")


@pytest.mark.usefixtures("here")
def test_a_journal_that_cannot_be_written_is_one_sentence() -> None:
    """The folder of results may be somebody's file."""
    Path("results").write_text("mine")

    with pytest.raises(BenchError, match=r"cannot write results/x\.jsonl: Not a directory"):
        Journal(Path("results/x.jsonl"), {})

    assert Path("results").read_text() == "mine"


def test_a_full_disk_ends_a_sweep_with_what_is_kept(tmp_path: Path) -> None:
    """SQLite's own limit in place of the disk's: rows that were committed stay, and the sentence counts them."""
    path = tmp_path / "s.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "ci", 0, {"fingerprint": "here"})
        store.add_case(case := Case(spec=ModelSpec(depth=1, width=8), height=32, width=32), [])
        store.add_result(run, case.case_id, Result("params", samples=(100,)))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(StoreError, match=r"cannot write to .*s\.sqlite: .*full; 1 cases are kept in it: make room"):
            store.add_result(run, case.case_id, Result("conv_macs", samples=(1,), note="x" * 100_000))

    with open_store(path) as opened:
        assert [row.result.metric for row in opened.rows()] == ["params"]
