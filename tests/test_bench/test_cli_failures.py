"""What a command tells of rows without a number, and of how far it is; what it does when nobody reads it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipcost.bench import cli, console
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result, notes_of, reasons_of
from skipcost.bench.store.store import create_store
from skipcost.bench.sweeps.driver import Server
from skipcost.unet_models import ModelSpec

GONE = Result("params", "crash", note="gone")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process as its script does; return its exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["skipcost", *words])
    with pytest.raises(SystemExit) as ended:
        cli.guarded(cli.app)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("results", "lines"),
    [
        ([("a", Result("params", samples=(1,)))], []),
        ([("a", GONE)], ["1 crash (a): gone"]),
        ([("a", GONE), ("a", GONE), ("b", GONE)], ["3 crash (a, b): gone"]),
        ([(name, GONE) for name in "abcde"], ["5 crash (a, b, c and 2 more): gone"]),
        (
            [("a", Result("params", "timeout", note="late")), ("a", GONE), ("b", GONE)],
            ["2 crash (a, b): gone", "1 timeout (a): late"],
        ),
        ([("a", Result("latency_s", "throttled", (1.0,), "hot"))], ["1 throttled (a): hot"]),
        ([("a", Result("params", "crash"))], ["1 crash (a): no reason is known"]),
    ],
)
def test_each_reason_is_told_once(results: list[tuple[str, Result]], lines: list[str]) -> None:
    """With how many rows have it and the first networks, the most frequent first."""
    assert reasons_of(results) == lines


def test_what_is_to_be_known_of_a_number_is_told_by_its_metric() -> None:
    """With its networks, each text once; a number without a note and a failure are not among them."""
    doubt, plain = Result("latency_s", samples=(1.0,), note="busy"), Result("params", samples=(1,))
    idle = Result("params", samples=(9,), note="4 of 9 parameters are in layers that never ran: aux")

    lines = notes_of([("a", doubt), ("b", doubt), ("b", idle), ("c", plain), ("c", GONE)])

    assert lines == ["2 latency_s (a, b): busy", f"1 params (b): {idle.note}"]


def test_show_tells_why_there_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, under the table, and of the rows that are shown alone; programs get the table alone."""
    store = tmp_path / "x.sqlite"
    with create_store(store) as opened:
        number = opened.add_run("2026-01-01T00:00:00+00:00", "test", 0, {"fingerprint": "here"})
        for width, note in ((8, "[boom] of 8"), (16, "boom of 16")):
            case = Case(spec=ModelSpec(width=width))
            opened.add_case(case, [])
            opened.add_result(number, case.case_id, Result("params", "crash", note=note))

    _, _, both = run(monkeypatch, capsys, "show", str(store))
    _, _, one = run(monkeypatch, capsys, "show", str(store), "--where", "width == 16")
    _, _, none = run(monkeypatch, capsys, "show", str(store), "--format", "csv")

    assert "failed: 1 crash (unet/d4/w8/concat): [boom] of 8" in both
    assert "of 8" not in one
    assert "failed: 1 crash (unet/d4/w16/concat): boom of 16" in one
    assert "--retry" in one
    assert none == ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A fork server in the folder of the models, beside which packages are installed."""
    here = tmp_path_factory.mktemp("models")
    (here / "late_net.py").write_text("import not_yet_there\ndef N(): return not_yet_there.net()\n")
    (here / "installed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("PYTHONPATH", str(here / "installed"))
        with Server() as running:
            yield running


@pytest.mark.slow
def test_what_failed_is_told_and_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing package is told until it is installed and --retry is said; without any number a sweep ends with 1."""
    monkeypatch.setattr(cli, "Server", lambda: contextlib.nullcontext(server))
    options = ("--device", "cpu", "--set", "size=32", "--set", "metrics=params", "-o", "own.sqlite")
    words = ("sweep", "--model", "late_net:N", *options)

    first = run(monkeypatch, capsys, *words)
    Path("installed/not_yet_there.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(1, 2, 3)\n")
    second = run(monkeypatch, capsys, *words)
    third = run(monkeypatch, capsys, *words, "--retry")
    fourth = run(monkeypatch, capsys, *words)

    reason = "failed: 1 unsupported (late_net:N): cannot import late_net (No module named 'not_yet_there')"
    for code, _, said in (first, second):
        assert code == 1
        assert reason in said
        assert "nothing of what was asked for has a number in own.sqlite" in said
        assert "--retry tries what failed again" in said
    assert "nothing was missing" in second[2]
    for code, _, said in (third, fourth):
        assert code == 0
        assert "failed" not in said
    assert "this run added: 1 ok" in third[2]


@pytest.mark.parametrize("words", [("plan", ""), ("sweep", ""), ("sweep", "--model", ""), ("ab", ""), ("show", "")])
def test_an_empty_name_is_bad_input(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty variable in a script is one sentence; in place of a revision it compares nothing, which is no pass."""
    code, _, said = run(monkeypatch, capsys, *words)

    assert code == 2
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("words", [("plan", "a" * 5000), ("show", "a" * 5000)])
def test_a_name_that_is_too_long_is_bad_input(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file can have it."""
    assert run(monkeypatch, capsys, *words)[0] == 2


def test_a_pipe_shows_lines_in_place_of_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How much is done, what is left, and at what; nothing more once it is over."""
    monkeypatch.setattr(console, "EVERY_S", 0.05)
    with console.progress_bar() as progress:
        bar = progress.add_task("", total=8)
        progress.update(bar, advance=2, description="unet[a]")
        time.sleep(0.2)
    with console.going_on("fitting"):
        time.sleep(0.2)
    said = capsys.readouterr().err
    time.sleep(0.1)

    assert "2 of 8 done, 0:0" in said
    assert " left: unet[a]" in said
    assert "fitting: 0:00 so far" in said
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_as_a_signal_does() -> None:
    """`| head` sees what it wanted, and nothing is said; 128 + SIGPIPE, as the shell knows it."""
    command = [sys.executable, "-m", "skipcost.bench", "explain", "unet/d4/w64/concat"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()

    assert process.wait() == 141
    assert said == ""
