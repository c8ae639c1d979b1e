"""Work in processes of its own: every part gets its row, whatever happens to the process that works on it."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

import pytest
from kernel_work import work
from places import HELPERS

from skipcost.bench.kernels import jobs
from skipcost.bench.kernels.jobs import Done, Job, Limits


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes import this folder's functions."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))


def job(name: str, *does: str, memory: int = 0) -> Job:
    """A job whose parts do this, one after the other."""
    return Job({"name": name}, tuple({"do": each} for each in does), memory)


def run(*todo: Job, seconds: float = 60, **limits: Any) -> list[Done]:
    """Run jobs for at most so many seconds."""
    return list(jobs.run(todo, work, Limits(time.time() + seconds, **limits)))


def outcomes(found: list[Done]) -> list[str]:
    """The outcome of each part in order, "left out" where there is none."""
    return [done.row["outcome"] if done.row else "left out" for done in found]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_part_of_each_job_has_one_row(workers: int) -> None:
    """Parts of a job come in order and from one process, this one without workers; jobs share processes."""
    found = run(*(job(str(at), "go", "go") for at in range(4)), workers=workers)

    by_job = {name: [done for done in found if done.what["name"] == name] for name in "0123"}
    assert outcomes(found) == ["ok"] * 8
    assert all(len({done.row["process"] for done in each if done.row}) == 1 for each in by_job.values())
    assert len({done.row["process"] for done in found if done.row}) <= max(workers, 1)
    assert (os.getpid() in {done.row["process"] for done in found if done.row}) == (workers == 0)


def test_what_is_printed_does_not_get_between_the_rows() -> None:
    """Compilers and libraries write to stdout as they like."""
    assert outcomes(run(job("x", "print", "go"))) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("die", "the process ended with signal 6 (SIGABRT)"),
        ("exit", "the process ended with exit code 3: first words last words"),
        ("raise", "RuntimeError: no such thing"),
    ],
)
def test_a_process_that_ends_costs_the_part_it_was_at(do: str, said: str) -> None:
    """The parts before and after have their rows, the latter from a new process; the reason is in the row."""
    found = run(job("x", "go", do, "go"))

    assert outcomes(found) == ["ok", "crash", "ok"]
    assert said in found[1].row["note"]  # type: ignore[index]  # it has a row
    assert found[0].row["process"] != found[2].row["process"]  # type: ignore[index]


def test_a_part_that_hangs_is_ended() -> None:
    """A kernel that never returns is a row that says for how long it was waited for."""
    found = run(job("x", "go", "hang", "go"), patience=1.0)

    assert outcomes(found) == ["ok", "timeout", "ok"]
    assert "no result within 1 seconds" in found[1].row["note"]  # type: ignore[index]


def test_a_lost_device_is_left_to_another_process() -> None:
    """The row that was made before counts, and what follows is not blamed."""
    found = run(job("x", "lose", "go"))

    assert outcomes(found) == ["ok", "ok"]
    assert found[0].row["process"] != found[1].row["process"]  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_there_is_no_time_for_is_handed_back(workers: int) -> None:
    """Nothing is begun after the limit, within a job neither, and nothing is left out without being named."""
    found = run(*(job(str(at), *["sleep"] * 4) for at in range(6)), seconds=1.5, workers=workers)

    assert len(found) == 24
    assert 1 <= outcomes(found).count("ok") < 24
    assert outcomes(found).count("left out") + outcomes(found).count("ok") == 24


def test_what_is_under_way_at_the_end_is_given_some_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that it is ended, and handed back as left out rather than as a failure."""
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.5)
    began = time.monotonic()

    found = run(job("x", "go", "hang", "go"), seconds=1.0)

    assert outcomes(found) == ["ok", "left out", "left out"]
    assert time.monotonic() - began < 20


def test_jobs_run_side_by_side_only_if_their_memory_fits() -> None:
    """Two that fit overlap, two that do not follow each other, and one that never fits runs by itself."""

    def seconds(memory: int) -> float:
        began = time.monotonic()
        assert (
            outcomes(run(*(job(str(at), *["sleep"] * 6, memory=memory) for at in range(2)), workers=2, memory=10))
            == ["ok"] * 12
        )
        return time.monotonic() - began

    together, apart, too_large = seconds(5), seconds(6), seconds(11)

    assert together < apart
    assert min(apart, too_large) > 12 * 0.3


def test_a_process_that_ends_after_its_last_row_costs_nothing() -> None:
    """There is no part left to blame, and the next job gets another process."""
    assert outcomes(run(job("x", "go", "lose"), job("y", "go"))) == ["ok"] * 3


def test_giving_up_ends_the_processes() -> None:
    """Whoever stops listening, as after Ctrl-C, leaves nothing running."""
    rows = jobs.run([job("x", "go", *["sleep"] * 100)], work, Limits(time.time() + 60))
    assert isinstance(rows, Generator)
    process = next(rows).row["process"]  # type: ignore[index]

    rows.close()

    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
