"""Processes that are started: nothing of the current folder runs in them, and none outlives who started it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from skipcost.bench.measure.process import PYTHON, finished, started


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
