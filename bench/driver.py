"""Run a plan: hand the fork server one case after the other and write each result to the store when it arrives."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any, Self

from skipcost.bench.cases import Case
from skipcost.bench.errors import MachineError
from skipcost.bench.plan import Plan, PlannedCase
from skipcost.bench.records import Result
from skipcost.bench.store import Store

GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked to do; `json` is the server's protocol."""

    case: Case
    metrics: tuple[str, ...]
    budget: dict[str, Any]
    time_limit_s: float
    memory_limit_bytes: int | None

    def json(self) -> str:
        """One line for the server."""
        return json.dumps({**asdict(self), "case": json.loads(self.case.to_json())})


class Server:
    """The driver's end of the fork server; use in a `with` block. It is restarted if it dies under a case."""

    def __init__(self) -> None:
        self._process = self._start()
        self.environment = self._hello()

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C at the terminal reaches the driver alone, which then ends the server in order.
        return subprocess.Popen(
            [sys.executable, "-m", "skipcost.bench.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _hello(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            message = "the measuring process did not start: run `python -m skipcost.bench.server` to see why"
            raise MachineError(message)
        environment: dict[str, Any] = json.loads(line)["environment"]
        return environment

    @property
    def _replies(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """Close the server's input, at which it ends its case and leaves; kill it where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()

    def run(self, request: Request) -> Iterator[Result]:
        """Yield a result for every metric of the request; what a fork did not live to measure is asked for again."""
        left = list(request.metrics)
        while left:
            asked = Request(request.case, tuple(left), request.budget, request.time_limit_s, request.memory_limit_bytes)
            ending = {"timed_out": False, "code": 0, "said": "the worker left without a result"}
            for reply in self._ask(asked):
                if isinstance(reply, Result):
                    left.remove(reply.metric)
                    yield reply
                else:
                    ending = reply
            if left:
                yield _failure(left.pop(0), ending, request)

    def _ask(self, request: Request) -> Iterator[Result | dict[str, Any]]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request.json() + "\n")
            self._process.stdin.flush()
        for line in self._replies:
            reply = json.loads(line)
            if "done" in reply:
                yield reply["done"]
                return
            yield Result.from_json(line)
        self._stop()
        self._process = self._start()
        self._hello()
        yield {"timed_out": False, "code": -9, "said": "the measuring process itself was killed"}


def _failure(metric: str, ending: dict[str, Any], request: Request) -> Result:
    """The row of the metric during which a worker ended."""
    if ending["timed_out"]:
        note = f"{metric} was not done after {request.time_limit_s:g} s; raise [limits] case_seconds to give it longer"
        return Result(metric, "timeout", note=note)
    said = f": {ending['said']}" if ending["said"] else ""
    if ending["code"] == -9:  # noqa: PLR2004 - SIGKILL
        return Result(
            metric,
            "out_of_memory",
            note=f"the process was killed from outside, as the system does when memory is short{said}",
        )
    return Result(metric, "crash", note=f"the process ended with status {ending['code']}{said}")


def pending(plan: Plan, store: Store, fingerprint: str, again: Collection[str] = ()) -> list[PlannedCase]:
    """The cases of a plan with the metrics that this environment has no row for yet; what has one is final.

    again: outcomes of rows that are measured once more all the same.
    """
    done = {row for row, outcome in store.measured(fingerprint).items() if outcome not in again}
    left = []
    for planned in plan.cases:
        case_id = planned.case.case_id
        metrics = tuple(name for name in planned.metrics if (case_id, name) not in done)
        if metrics:
            left.append(PlannedCase(planned.case, metrics, planned.aliases))
    return left


def sweep(
    plan: Plan,
    store: Store,
    server: Server,
    seed: int,
    tell: Callable[[PlannedCase, list[Result]], None],
    again: Collection[str] = (),
) -> None:
    """Measure what is missing, in an order shuffled by `seed`; `tell` hears of each case when it is done.

    A sweep of which nothing was missing is a run, too: what it asked for is what is read from then on.
    """
    environment = server.environment
    todo = pending(plan, store, environment["fingerprint"], again)
    for planned in plan.cases:
        store.add_case(planned.case, list(planned.aliases))
    run_id = store.add_run(datetime.now(UTC).isoformat(timespec="seconds"), plan.name, seed, environment)
    store.add_asked(run_id, (planned.case.case_id for planned in plan.cases))
    random.Random(seed).shuffle(todo)  # noqa: S311 - an order, not a secret
    for planned in todo:
        results = []
        for result in server.run(request_for(plan, planned, environment)):
            store.add_result(run_id, planned.case.case_id, result, again=bool(again))
            results.append(result)
        tell(planned, results)


def request_for(plan: Plan, planned: PlannedCase, environment: dict[str, Any]) -> Request:
    """Put a planned case under the plan's limits. On a GPU the host's memory is not limited: CUDA maps far more."""
    memory = plan.limits.memory_bytes(environment["memory_bytes"]) if planned.case.device == "cpu" else None
    return Request(planned.case, planned.metrics, asdict(plan.budget), plan.limits.case_seconds, memory)
