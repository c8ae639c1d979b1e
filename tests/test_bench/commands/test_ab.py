"""`skipcost ab` as a command: a run that was stopped goes on, at benchmarks as at cases, and says so."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from skipcost.bench import cli
from skipcost.bench.compare import pairs
from skipcost.bench.compare.pairs import ORDER
from skipcost.bench.compare.revisions import state
from skipcost.kernels.errors import Stopped

NAMES = ("test_speed.py::test_a", "test_speed.py::test_b")
SIDES = 2  # each is asked once for the full names of its benchmarks
PAIRS = 3  # after which equal code is settled
WHOLE = SIDES + PAIRS * len(ORDER)

Run = Callable[..., tuple[int, str]]


def git(folder: Path, *words: str) -> None:
    """Run git as somebody."""
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's repository of one commit, where the command is run."""
    git(tmp_path, "init", "-q")
    (tmp_path / "test_speed.py").write_text("# two benchmarks\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Pytest:
    """Runs of pytest that take no time: every benchmark takes 10 ms; the run of that number is stopped by Ctrl-C."""

    def __init__(self, stopped_at: int | None = None) -> None:
        self.stopped_at = stopped_at
        self.runs: list[Path] = []

    def __call__(self, _names: Sequence[str], folder: Path, _environment: dict[str, str]) -> dict[str, float]:
        """Pretend to run."""
        if len(self.runs) == self.stopped_at:
            raise Stopped(signal.SIGINT)
        self.runs.append(folder)
        return dict.fromkeys(NAMES, 0.01)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `skipcost ab --benchmarks` with pretended runs of pytest; exit code and everything that it said."""

    def invoke(made: Pytest, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(pairs, "run_benchmarks", made)
        command = ["ab", "HEAD", "--benchmarks", "test_speed.py", "--pairs", str(PAIRS), *words]
        monkeypatch.setattr("sys.argv", ["skipcost", *command])
        with pytest.raises(SystemExit) as ended:
            cli.guarded(cli.app)
        return int(ended.value.code or 0), " ".join("".join(capsys.readouterr()).split())

    return invoke


def test_benchmarks_that_were_stopped_go_on(repository: Path, run: Run) -> None:
    """Ctrl-C in the third pair keeps the first two; the same command runs what is missing, and the next one nothing."""
    first, second, third = Pytest(SIDES + 2 * len(ORDER) + 1), Pytest(), Pytest()

    stopped = run(first)
    went_on = run(second)
    again = run(third)

    assert stopped[0] == 130
    assert "stopped; what was measured is kept in results/, the same command goes on" in stopped[1]
    assert (went_on[0], again[0]) == (0, 0)
    assert "2 numbers of 2 cases: 2 unchanged" in again[1]
    assert len(second.runs) == SIDES + len(ORDER)
    assert len(third.runs) == SIDES
    (journal,) = (repository / "results").glob("ab-benchmarks-*.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + PAIRS * len(NAMES)


@pytest.mark.parametrize("stopped_at", [0, 1, SIDES])
def test_a_stop_before_anything_was_measured_is_no_regression(repository: Path, run: Run, stopped_at: int) -> None:
    """Also while the names are asked for, Ctrl-C ends with its own exit code, and no worktree is left."""
    made = Pytest()

    stopped = run(Pytest(stopped_at))
    went_on = run(made)

    assert stopped[0] == 130
    assert went_on[0] == 0
    assert len(made.runs) == WHOLE
    listed = subprocess.check_output(["git", "worktree", "list"], cwd=repository, text=True)
    assert listed.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "anew"), [("test_speed.py", True), ("new.py", True), ("notes.txt", False), ("results/other.jsonl", False)]
)
def test_other_code_is_measured_anew(repository: Path, run: Run, file: str, anew: bool) -> None:  # noqa: FBT001
    """A tracked file that changed, or a new Python file, is another state; what a run leaves behind is not."""
    run(Pytest())
    (repository / file).write_text("# changed\n")
    made = Pytest()

    run(made)

    assert len(made.runs) == (WHOLE if anew else SIDES)


def test_a_state_is_that_of_files_and_commit(repository: Path) -> None:
    """A change and its way back are one state; a file that is gone and a commit of the same files are others."""
    file = repository / "test_speed.py"
    first, before = state(repository), file.read_text()
    states = [first]
    for text in ("changed\n", "\udcff\n"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        states.append(state(repository))
    file.unlink()
    states.append(state(repository))
    file.write_text(before)
    back = state(repository)
    git(repository, "commit", "-q", "--allow-empty", "-m", "two")
    states.append(state(repository))

    assert back == first
    assert len(set(states)) == len(states)


def test_verdicts_of_all_bases_are_kept(repository: Path, run: Run) -> None:
    """`--verdicts` has those against the release, too."""
    code, _ = run(Pytest(), "--release", "HEAD", "--verdicts", "ab.json")

    found = json.loads((repository / "ab.json").read_text())
    assert code == 0
    assert [each["verdict"] for each in found] == ["unchanged"] * 2 * len(NAMES)
