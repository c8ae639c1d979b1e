"""pytest-benchmark is a front end: its JSON is gated, its benchmarks run in turns, its stored samples never judged."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke_cli

from skipcost.bench.compare.benchmarks import read_benchmarks
from skipcost.bench.compare.pairs import SideError, benchmark_pairs, benchmarks_of
from skipcost.bench.compare.revisions import WORKING_TREE, Revision, checked_out, dirty, merge_base, resolve
from skipcost.bench.errors import BenchError, MachineError

SOURCE = """
import time
def test_wait(benchmark):
    benchmark.pedantic(lambda: time.sleep({seconds}), rounds=3)
"""


def row(name: str = "test_a.py::test_a", **changes: Any) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it, as far as it is read."""
    return {"fullname": name, "extra_info": {"params": 7, "mood": "good"}, "stats": {"median": 0.0123}} | changes


def written(path: Path, *rows: dict[str, Any]) -> Path:
    """The JSON of a run."""
    path.write_text(json.dumps({"benchmarks": rows, "version": "5.2.3"}))
    return path


def invoke(*words: str) -> tuple[int, str]:
    """Run a command; its exit code and everything that it said."""
    result = invoke_cli(words)
    if isinstance(result.exception, BenchError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_metrics_by_name_are_exact_and_the_rest_is_the_benchmarks_own(tmp_path: Path) -> None:
    """extra_info gives exact numbers by METRICS's names; the median is for the reader."""
    found = read_benchmarks(written(tmp_path / "a.json", row()))

    (entry,) = found.entries.values()
    assert entry.exact == {"benchmark": 1, "params": 7}
    assert entry.noisy == {"latency_s": 0.012}


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        pytest.param([row(), row("b")], 0, id="unchanged"),
        pytest.param([row(), row("b", stats={"median": 99.0})], 0, id="slower: not for stored samples to say"),
        pytest.param([row(extra_info={"params": 8}), row("b")], 1, id="changed"),
        pytest.param([row()], 1, id="missing"),
        pytest.param([row("renamed"), row("b")], 1, id="renamed"),
        pytest.param([row(), row("b"), row("c")], 1, id="new"),
        pytest.param([row(extra_info={}), row("b")], 1, id="no longer counted"),
        pytest.param([], 2, id="none ran"),
        pytest.param([row(), row()], 2, id="twice"),
        pytest.param([row(extra_info={"params": -1}), row("b")], 2, id="negative"),
        pytest.param([row(extra_info={"params": "7"}), row("b")], 2, id="text"),
        pytest.param([{"fullname": "a"}], 2, id="foreign JSON"),
    ],
)
def test_the_gate_fails_closed_for_benchmarks_too(tmp_path: Path, rows: list[dict[str, Any]], code: int) -> None:
    """A baseline of two benchmarks against every way in which the next run may differ."""
    base, file = written(tmp_path / "base.json", row(), row("b")), tmp_path / "perf.jsonl"
    assert invoke("baseline", str(base), "-o", str(file))[0] == 0

    found = invoke("gate", str(written(tmp_path / "now.json", *rows)), "--baseline", str(file))

    assert found[0] == code, found[1]


def test_stored_samples_give_no_paired_verdict(tmp_path: Path) -> None:
    """`ab` and `gate --against` refuse a JSON file, and say what to do instead."""
    file = written(tmp_path / "a.json", row())

    stored = invoke("ab", str(file))
    against = invoke("gate", str(file), "--against", "HEAD")

    assert stored[0] == against[0] == 2
    assert "they cannot give a paired verdict" in stored[1]
    assert "`skipcost ab --benchmarks` runs both" in against[1]


def git(folder: Path, *words: str) -> None:
    """Run git as somebody."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of somebody else's, whose second commit waits twice as long as its first."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    git(folder, "init", "-q")
    for seconds in (0.02, 0.04):
        (folder / "test_speed.py").write_text(SOURCE.format(seconds=seconds))
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", str(seconds))
    return folder


@pytest.mark.slow
def test_benchmarks_of_two_revisions_run_in_turns(repository: Path) -> None:
    """Anybody's benchmarks, from anybody's repository: the later commit takes twice the time of the one before."""
    with checked_out(resolve("HEAD~1", repository), repository) as base, checked_out(WORKING_TREE, repository) as now:
        names = benchmarks_of(["test_speed.py"], base, now)
        with benchmark_pairs(["test_speed.py"], base, now).open() as measure:
            found = measure(names[0], False)
            with pytest.raises(SideError) as told:
                measure("test_speed.py::test_other", False)

    assert names == ["test_speed.py::test_wait"]
    assert 1.5 < math.exp(found.ratios[0]) < 2.5
    assert found.now_s > found.base_s
    assert set(told.value.args[0]) == {base.commit, now.commit}
    assert subprocess.check_output(["git", "worktree", "list"], cwd=repository, text=True).count("\n") == 1


def test_benchmarks_that_cannot_run_say_why(repository: Path) -> None:
    """A name that pytest does not know fails with its words, not with an empty comparison."""
    with checked_out(WORKING_TREE, repository) as now, pytest.raises(MachineError, match=r"no_such\.py"):
        benchmarks_of(["no_such.py"], now)


@pytest.mark.sources
def test_a_revision_that_is_none_is_refused(repository: Path) -> None:
    """The sentence names what was received and what is accepted."""
    with pytest.raises(BenchError, match="'no-such' is no revision of this repository: name a branch"):
        resolve("no-such")
    with pytest.raises(BenchError, match="'HEAD~9' is no revision"):
        resolve("HEAD~9", repository)
    with pytest.raises(BenchError, match="'no-such' is no revision"):
        merge_base("no-such")


@pytest.mark.sources
def test_another_revisions_code_is_what_runs_there(tmp_path: Path) -> None:
    """A process of a revision imports that revision's folders, wherever it is started; the worktree goes when done."""
    with checked_out(resolve("HEAD")) as revision:
        done = subprocess.run(
            revision.command("skipcost.bench", "explain", "unet/d1/w4/concat", "--json"),
            env=revision.environment(), cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        where = subprocess.run(
            [*revision.command("this")[:1], "-c", "import skipcost.bench.cases.case as c; print(c.__file__)"],
            env=revision.environment(), cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

        assert json.loads(done.stdout)["label"] == "unet/d1/w4/concat"
        assert Path(where).is_relative_to(revision.path)
        assert (revision.tree / "noxfile.py").is_file()
    assert not revision.tree.exists()


def test_changes_that_are_not_committed_are_seen(repository: Path) -> None:
    """A new file makes a tree dirty."""
    assert not dirty(repository)

    (repository / "new.txt").write_text("x")

    assert dirty(repository)


def test_a_revision_without_the_suites_folders_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit from before the suite was what it is cannot be run by this version."""
    monkeypatch.setattr("skipcost.bench.compare.revisions.repository", lambda: repository)

    with pytest.raises(BenchError, match="has no folder unet_models"), checked_out(resolve("HEAD", repository)):
        pass


def test_a_revision_holds_what_a_process_needs() -> None:
    """PYTHONPATH comes first, and the script's own folder is not on the path."""
    environment = Revision("c", "/somewhere", Path()).environment()

    assert environment["PYTHONPATH"] == "/somewhere"
    assert environment["PYTHONSAFEPATH"] == "1"
