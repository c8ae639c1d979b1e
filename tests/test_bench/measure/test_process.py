"""Processes that are started: nothing of the current folder runs in them, and none outlives who started it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from skipcost.bench.measure.process import MOST_WORDS, PYTHON, Process, finished, last_words, started


def test_the_current_folder_is_not_on_the_path(tmp_path: Path) -> None:
    """A file of a library's name there is not run."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)\n")

    done = finished([*PYTHON, "-c", "import json, sys; print(json.dumps(sys.flags.safe_path))"], cwd=tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (0, "true\n", "")


def test_output_that_is_no_text_is_read() -> None:
    """What another program writes may be anything."""
    done = finished([sys.executable, "-c", r"import os; os.write(1, b'\xff\x00'); os.write(2, b'\xe9'); exit(3)"])

    assert (done.returncode, done.stdout, done.stderr) == (3, "\ufffd\x00", "\ufffd")


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_process_ends_with_those_it_started(tmp_path: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """It is asked to end and may tidy up; one that does not is killed with its children."""
    monkeypatch.setattr("skipcost.bench.measure.process.GRACE_S", 0.5)
    trap = "trap '' TERM" if stubborn else f"trap 'echo tidied > {tmp_path}/tidied; exit' TERM"

    def interrupted() -> None:
        with started(["sh", "-c", f"{trap}; sleep 61 & echo $! > {tmp_path}/child; while :; do sleep 0.01; done"]):
            while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    time.sleep(0.1)
    assert (tmp_path / "tidied").exists() != stubborn
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_process_that_answers_at_length_is_let_go_of_in_the_middle() -> None:
    """Its answers fill the pipe; it hears that nobody reads them, and ends by itself."""
    endless = "with answers() as out:\n    while True:\n        out.write('{}\\n')"
    code = f"from skipcost.bench.measure.process import answers\n{endless}"
    process = Process([*PYTHON, "-c", code])
    heard = process.read(30.0)

    process.close(10.0)

    assert (heard, process.popen.returncode) == ({}, 0)


ECHO = "import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"


def test_a_process_that_is_asked_answers_until_it_is_let_go_of() -> None:
    """Messages are JSON, in order; asked nothing more, it ends by itself where it is given the time."""
    process = Process([*PYTHON, "-c", ECHO])
    process.tell({"first": [1, "\n"]})
    process.tell({"second": None})
    heard = [process.read(30.0), process.read(30.0), process.read(0.01)]
    alive = process.alive()

    process.close(grace_s=30.0)

    assert heard == [{"first": [1, "\n"]}, {"second": None}, None]
    assert (alive, process.popen.returncode) == (True, 0)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('half a line', end='')", "ended with exit code 0"),
        ("sys.stderr.write('first\\nlast\\n'); sys.exit(3)", "ended with exit code 3: first last"),
        ("os.kill(os.getpid(), 11)", "ended with signal 11 (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGRTMAX - 1)", "ended with signal 63 (without a name)"),
        ("os.close(1); time.sleep(60)", "ended with signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_ends_says_nothing_more_and_how(code: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that only closes its end: nobody would wait for it. What is told afterwards is no error."""
    monkeypatch.setattr("skipcost.bench.measure.process.GRACE_S", 0.5)
    process = Process([*PYTHON, "-c", f"import os, signal, sys, time\n{code}"])

    heard = process.read()
    process.tell({"too": "late"})
    how = process.ended()
    process.close()

    assert (heard, how) == (None, told)


def test_the_last_words_are_text_whatever_was_printed(tmp_path: Path) -> None:
    """Three lines at most, and the end of them where they are long."""
    with (tmp_path / "log").open("wb+") as log:
        log.write(b"x" * 10_000 + b"\nfirst\n\xff second\nthird\n")
        few = last_words(log)
        log.write(b"y" * 10_000)
        long = last_words(log)

    assert few == "first \ufffd second third"
    assert long == "y" * MOST_WORDS


@pytest.mark.parametrize("gone", [False, True])
def test_what_others_print_does_not_get_between_the_answers(gone: bool) -> None:  # noqa: FBT001
    """It is among the last words; and where nobody listens any more, nothing fails."""
    code = "print('noise', flush=True); sys.stdin.readline(); say(out, {'x': 1}); say(out, {'y': 2})"
    head = "import sys\nfrom skipcost.bench.measure.process import answers, say\nwith answers() as out:\n"
    process = Process([*PYTHON, "-c", f"{head}    {code}"])
    if gone:
        assert process.popen.stdout is not None
        process.popen.stdout.close()

    process.tell({})
    heard = [] if gone else [process.read(30.0), process.read(30.0)]
    how = process.ended()
    process.close()

    assert heard == ([] if gone else [{"x": 1}, {"y": 2}])
    assert how == "ended with exit code 0: noise"
