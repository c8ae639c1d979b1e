"""A sweep turns every case into rows, whatever happens to the processes, and goes on where it was stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import sources_of
from skipcost.bench.cases.opened import digests
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.metrics import METRICS, default_metrics
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.store.tables import wide_table
from skipcost.bench.sweeps import driver
from skipcost.bench.sweeps.driver import Request, Server, pending, sweep
from skipcost.bench.sweeps.plan import Plan, load_plan
from skipcost.unet_models import ModelSpec

pytestmark = pytest.mark.slow
SHORT = {"seconds": 0.02, "noise": 0.1, "least": 3, "warmup_seconds": 0.02}
LARGE = Case(spec=ModelSpec(width=64), height=1024, width=1024, threads=1)
KILLS = int(os.environ.get("SKIPCOST_KILLS", "2"))  # SIGKILLs in the resume test; 20 were used to accept it


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One fork server for all tests of this file."""
    with Server() as running:
        yield running


def ask(
    server: Server, case: Case, metrics: tuple[str, ...], limit_s: float = 60.0, memory: int | None = None
) -> list[Result]:
    """Run one case with a short budget."""
    return list(server.run(Request(case, metrics, SHORT, limit_s, memory)))


def small_plan(tmp_path: Path) -> Plan:
    """Plan six cases that take a moment each; their layers, since a latency would wait for a probe of the CPU."""
    path = tmp_path / "small.toml"
    path.write_text(
        "[timing]\nseconds=0.02\nnoise=0.1\nleast=3\nwarmup_seconds=0.02\n"
        '[[grid]]\ndepth=[1, 2]\nwidth=[4, 6, 8]\nsize=16\nmetrics=["params", "conv_macs", "layers_s"]\n'
    )
    return load_plan(str(path), {}, "cpu", 1)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_metric_of_a_case_becomes_a_row(server: Server, mode: str) -> None:
    """All metrics that apply on a CPU are measured, in order, each with samples."""
    case = Case(spec=ModelSpec(depth=2, width=4), height=16, width=16, mode=mode)
    metrics = default_metrics(case)

    results = ask(server, case, metrics)

    assert [(result.metric, result.outcome) for result in results] == [(name, "ok") for name in metrics]
    assert len(results[-1].samples) >= 3


@pytest.mark.parametrize(
    ("changes", "metric", "reason"),
    [
        ({"backend": "fused"}, "latency_s", "need a CUDA GPU"),
        ({"precision": "tf32"}, "latency_s", "exists on NVIDIA GPUs only"),
        ({"device": "cuda"}, "latency_s", "torch sees no CUDA device"),
        ({}, "peak_memory_allocated_bytes", "measured on a GPU only"),
        ({}, "compile_s", "compiles nothing"),
        ({"height": 8}, "params", "leaves no pixel at"),
        ({"mode": "training", "height": 16, "width": 16}, "params", "would normalise over a single value"),
    ],
)
def test_what_cannot_run_here_is_an_unsupported_row(
    server: Server, changes: dict[str, Any], metric: str, reason: str
) -> None:
    """A case or metric that this machine, or arithmetic, rules out is a row that says why."""
    case = replace(Case(spec=ModelSpec(depth=4, width=2), height=32, width=32), **changes)

    (result,) = ask(server, case, (metric,))

    assert result.outcome == "unsupported"
    assert reason in result.note


def test_a_case_over_its_time_is_a_timeout_row(server: Server) -> None:
    """A metric that takes longer than the limit is a row with the limit; the metrics before it keep theirs."""
    results = ask(server, LARGE, ("params", "latency_s"), limit_s=0.5)

    assert [result.outcome for result in results] == ["ok", "timeout"]
    assert "not done after 0.5 s" in results[1].note


def test_a_case_over_its_memory_is_an_out_of_memory_row(server: Server) -> None:
    """An allocation beyond the limit fails in the worker, not in the machine."""
    results = ask(server, replace(LARGE, batch=8), ("params", "latency_s"), memory=2**30)

    assert [result.outcome for result in results] == ["ok", "out_of_memory"]


@pytest.mark.parametrize(
    ("number", "outcome", "note"),
    [(signal.SIGSEGV, "crash", "signal 11 (SIGSEGV)"), (signal.SIGKILL, "out_of_memory", "killed")],
)
def test_a_worker_that_dies_is_a_row_and_the_rest_is_measured(
    server: Server, number: signal.Signals, outcome: str, note: str
) -> None:
    """Only the metric during which a worker died fails; the ones after it run in a new process."""
    threading.Timer(1.0, lambda: os.kill(children(server._process.popen.pid)[0], number)).start()

    results = ask(server, replace(LARGE, mode="training"), ("latency_s", "compile_s"))

    assert [result.outcome for result in results] == [outcome, "unsupported"]
    assert note in results[0].note


def children(pid: int) -> list[int]:
    """Processes forked by `pid`."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(text) for text in listed.stdout.split()]


ARITHMETIC = [
    Case(spec=ModelSpec(depth=1, width=2, skip="gated"), height=16, width=16, mode=mode, backend=backend)
    for mode in ("inference", "training")
    for backend in ("eager", "rewritten")
]


def requests_for_arithmetic() -> list[Request]:
    """Ask for all that is arithmetic of each of these cases."""
    asked = []
    for case in ARITHMETIC:
        names = tuple(name for name in default_metrics(case) if METRICS[name].is_arithmetic(case))
        asked.append(Request(case, names, SHORT, 60.0, None))
    return asked


def test_arithmetic_gives_without_a_fork_what_it_gives_in_one(server: Server) -> None:
    """Every row is the same; a size that leaves no pixel is the same refusal."""
    asked = [*requests_for_arithmetic(), Request(Case(height=8), ("params", "conv_macs"), SHORT, 60.0, None)]

    found = server.work_out(asked)

    assert found == [list(server.run(each)) for each in asked]
    assert [result.outcome for result in found[-1]] == ["unsupported"] * 2
    assert all(result.outcome == "ok" for results in found[:-1] for result in results)


def test_what_a_killed_server_did_not_work_out_is_worked_out_in_forks(server: Server) -> None:
    """Nothing of a batch is lost with the server, and nothing comes twice."""
    asked = [each for each in requests_for_arithmetic() if each.case.mode == "inference"]
    server._process.popen.kill()

    found = server.work_out(asked)

    assert [[result.metric for result in results] for results in found] == [list(each.metrics) for each in asked]
    assert all(result.outcome == "ok" for results in found for result in results)


def test_arithmetic_is_waited_for_as_long_as_a_case_may_take(server: Server) -> None:
    """A server that does not answer by then is ended, and another one asks a fork, which has its own time limit."""
    asked = Request(ARITHMETIC[0], ("params",), SHORT, 4.0, None)
    os.kill(server._process.popen.pid, signal.SIGSTOP)

    ((result,),) = server.work_out([asked])

    assert (result.metric, result.outcome) == ("params", "ok")


def test_arithmetic_of_all_cases_is_stored_before_anything_runs(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that is stopped at its first measurement has every count; the batch is whole or not there."""

    def stopped(_server: Server, _request: Request) -> Iterator[Result]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "run", stopped)
    monkeypatch.setattr(driver, "BATCH", 4)
    with create_store(tmp_path / "x.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            sweep(small_plan(tmp_path), store, server, 1, lambda *_: None)

        assert sorted(row.result.metric for row in store.rows()) == ["conv_macs"] * 6 + ["params"] * 6


def test_what_arithmetic_gave_is_told_with_the_rest(tmp_path: Path, server: Server) -> None:
    """Each case is heard of once, with all of its results in the order of its metrics."""
    told: list[list[str]] = []
    with create_store(tmp_path / "x.sqlite") as store:
        sweep(small_plan(tmp_path), store, server, 1, lambda _, results: told.append([each.metric for each in results]))

    assert told == [["params", "conv_macs", "layers_s"]] * 6


def test_each_case_has_its_threads(server: Server) -> None:
    """The number of threads is the case's and is recorded with the samples."""
    case = Case(spec=ModelSpec(depth=1, width=2), height=16, width=16, threads=1)

    (result,) = ask(server, case, ("latency_s",))

    assert result.detail["threads"] == 1


def test_the_server_is_restarted_when_it_dies(server: Server) -> None:
    """If the server itself is killed under a case, that metric is a row and the next one is measured."""
    threading.Timer(1.0, server._process.popen.kill).start()

    results = ask(server, replace(LARGE, mode="training"), ("latency_s", "params"))

    assert [result.outcome for result in results] == ["out_of_memory", "ok"]


def test_a_second_sweep_runs_only_what_is_missing(tmp_path: Path, server: Server) -> None:
    """What has a row is not measured again, and the order is the seed's; each sweep is a run with its whole plan."""
    plan = small_plan(tmp_path)
    told: list[str] = []
    with create_store(tmp_path / "x.sqlite") as store:
        for _ in range(2):
            sweep(plan, store, server, 1, lambda planned, _: told.append(planned.case.spec.label))
        assert pending(plan, store, server.environment["fingerprint"]) == []
        runs, asked = store.runs(), store.asked()

    assert sorted(told) == sorted(each.case.spec.label for each in plan.cases)
    assert told != [each.case.spec.label for each in plan.cases]
    assert [run.seed for run in runs] == [1, 1]
    ids = {each.case.case_id for each in plan.cases}
    assert set(asked) == {(run.run_id, case_id) for run in runs for case_id in ids}
    assert runs[0].environment["versions"]["torch"]


def test_what_is_asked_for_again_is_measured_again(tmp_path: Path, server: Server) -> None:
    """Rows of the outcomes that are named are measured anew, and the newer ones are read."""
    plan = small_plan(tmp_path)
    with create_store(tmp_path / "x.sqlite") as store:
        sweep(plan, store, server, 1, lambda *_: None)
        assert pending(plan, store, server.environment["fingerprint"], ["crash"]) == []

        sweep(plan, store, server, 1, lambda *_: None, ["ok"])

        assert {row.run_id for row in store.rows()} == {2}
        assert len(list(store.rows())) == 6 * 3


def own_plan(metrics: str = "params") -> Plan:
    """Plan the model of `ownread.py` in the current folder."""
    return load_plan(None, {"size": ["8"], "metrics": metrics.split()}, "cpu", 1, ["ownread:net"])


class Told:
    """A server that gives one number for each metric, with what its factory reads now."""

    environment: dict[str, Any] = {"fingerprint": "here", "memory_bytes": 2**33}  # noqa: RUF012 - a stand-in

    def run(self, request: Request) -> Iterator[Result]:
        """Give a failure that tells nothing first, as a worker that was killed does, then numbers."""
        read = digests(["a.json"], sources_of("ownread:net"))
        for name in request.metrics:
            if name == "conv_macs":
                yield Result(name, "timeout")
            else:
                yield Result(name, samples=(float(Path("a.json").read_text()),), detail={"read": read})


def test_a_model_that_reads_another_file_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads is found in the store when a sweep is planned; each state keeps its rows, the last one is read."""
    monkeypatch.chdir(tmp_path)
    Path("ownread.py").touch()
    added = []
    with create_store(tmp_path / "x.sqlite") as store:
        for width in ("8", "16", "8"):
            Path("a.json").write_text(width)
            added.append(len(pending(own_plan(), store, "here")))
            sweep(own_plan(), store, Told(), 0, lambda *_: None)  # type: ignore[arg-type]  # a stand-in
        rows = [row.result for row in store.rows()]
        table = wide_table(store, "here")

    assert added == [1, 1, 0]
    assert [row.samples for row in rows] == [(8,), (16,)]
    assert [row.detail for row in rows] == [{}, {}]
    assert table["params"].tolist() == [8]


def test_a_failure_that_tells_nothing_belongs_to_the_state_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was killed could not say what the factory reads; the next one's word stands for it."""
    monkeypatch.chdir(tmp_path)
    Path("ownread.py").touch()
    Path("a.json").write_text("8")
    plan = own_plan("conv_macs latency_s")
    with create_store(tmp_path / "x.sqlite") as store:
        sweep(plan, store, Told(), 0, lambda *_: None)  # type: ignore[arg-type]  # a stand-in

        assert len({row.case_id for row in store.rows()}) == 1
        assert pending(plan, store, "here") == []
        assert [case.factory.read != "" for case, _ in store.cases().values() if case.factory] == [True]


def start_sweep(tmp_path: Path) -> subprocess.Popen[str]:
    """Start `skipcost sweep` on the small plan as a user would."""
    small_plan(tmp_path)
    command = [
        sys.executable,
        "-m",
        "skipcost.bench",
        "sweep",
        str(tmp_path / "small.toml"),
        "-o",
        str(tmp_path / "x.sqlite"),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def committed(path: Path) -> set[tuple[str, str]]:
    """(case, metric) of every committed row; empty before there is a store."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
    ):
        return set(db.execute("SELECT case_id, metric FROM results"))
    return set()


def test_killed_sweeps_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL with rows there, and at the start; then the same command: every row once, none that was there is lost."""
    chance = random.Random(0)  # noqa: S311 - moments, not secrets
    seen: set[tuple[str, str]] = set()
    for number in range(KILLS):
        process, starting = start_sweep(tmp_path), number % 2
        while not starting and len(committed(tmp_path / "x.sqlite")) <= len(seen) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 4.0 if starting else 0.3))
        seen |= committed(tmp_path / "x.sqlite")
        process.kill()
        _, said = process.communicate()  # until the server, an orphan, has ended too
        assert "Traceback" not in said
        assert seen <= committed(tmp_path / "x.sqlite")

    process = start_sweep(tmp_path)
    process.communicate(timeout=120)

    assert process.returncode == 0
    assert seen
    with open_store(tmp_path / "x.sqlite") as store:
        rows = [(row.case_id, row.result.metric) for row in store.rows()]
    assert len(rows) == len(set(rows)) == 6 * 3
    assert seen <= set(rows)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C and SIGTERM, also when they come twice, leave a readable store, no process, and one sentence."""
    process = start_sweep(tmp_path)
    while not committed(tmp_path / "x.sqlite") and process.poll() is None:
        time.sleep(0.05)
    workers = children(process.pid)
    for _ in range(2):
        process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert process.returncode in (0, code)  # 0 where the last case was just done
    assert "Traceback" not in said
    if process.returncode == code:
        assert "run the same command again" in said
    time.sleep(0.2)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    with open_store(tmp_path / "x.sqlite") as store:
        assert next(iter(store.rows())).result.outcome == "ok"
