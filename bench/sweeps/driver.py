"""Run a plan: hand the fork server one case after the other and write each result to the store when it arrives.

First what is arithmetic, of all cases, in batches: there nothing can be lost but time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.opened import Present
from skipcost.bench.cases.record import NUMBERED, Result
from skipcost.bench.errors import MachineError
from skipcost.bench.measure.process import GRACE_S, PYTHON, Process, how_ended
from skipcost.bench.store.store import Store
from skipcost.bench.sweeps.plan import Plan, PlannedCase

BATCH = 64  # cases whose arithmetic is asked for, and stored, together


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked to do; `message` is the server's protocol."""

    case: Case
    metrics: tuple[str, ...]
    budget: dict[str, Any]
    time_limit_s: float
    memory_limit_bytes: int | None

    def message(self) -> dict[str, Any]:
        """What the server is told."""
        fields = {name: getattr(self, name) for name in ("metrics", "budget", "time_limit_s", "memory_limit_bytes")}
        return {"case": json.loads(self.case.to_json()), **fields}


class Server:
    """The driver's end of the fork server; use in a `with` block. It is restarted if it dies under a case."""

    def __init__(self) -> None:
        self._process = self._start()
        try:
            self.environment = self._hello()
        except BaseException:
            self._process.close()
            raise

    def _start(self) -> Process:
        return Process([*PYTHON, "-m", "skipcost.bench.measure.server"], stderr=None)  # its warnings reach the user

    def _hello(self) -> dict[str, Any]:
        reply = self._process.read()
        if reply is None:
            command = " ".join(("python", *PYTHON[1:], "-m skipcost.bench.measure.server"))
            message = f"the measuring process did not start: run `{command}` to see why"
            raise MachineError(message)
        environment: dict[str, Any] = reply["environment"]
        return environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the server's input, at which it ends its case and leaves; end it where it does not."""
        self._process.close(GRACE_S)

    def run(self, request: Request) -> Iterator[Result]:
        """Yield a result for every metric of the request; what a fork did not live to measure is asked for again."""
        left = list(request.metrics)
        while left:
            asked = Request(request.case, tuple(left), request.budget, request.time_limit_s, request.memory_limit_bytes)
            ending = {"timed_out": False, "code": 0, "said": "the worker left without a result"}
            for reply in self._ask(asked):
                if not isinstance(reply, Result):
                    ending = reply
                elif reply.metric in left:
                    left.remove(reply.metric)
                    yield reply
            if left:
                yield _failure(left.pop(0), ending, request)

    def work_out(self, requests: Sequence[Request]) -> list[list[Result]]:
        """Return the results of each of some requests for arithmetic, which the server does itself.

        What it did not live to answer, or not within the time that a case has, is asked for again, each in a fork.
        """
        self._process.tell({"arithmetic": [request.message() for request in requests]})
        found: list[list[Result]] = []
        for request in requests:
            if (reply := self._process.read(request.time_limit_s)) is None:
                self._restart()
                break
            found.append([Result.from_json(each) for each in reply["results"]])
        return found + [list(self.run(each)) for each in requests[len(found) :]]

    def _restart(self) -> None:
        self._process.close()
        self._process = self._start()
        self._hello()

    def _ask(self, request: Request) -> Iterator[Result | dict[str, Any]]:
        self._process.tell(request.message())
        while (reply := self._process.read()) is not None:
            if "done" in reply:
                yield reply["done"]
                return
            yield Result.from_json(reply)
        self._restart()
        yield {"timed_out": False, "code": -9, "said": "the measuring process itself was killed"}


def _failure(metric: str, ending: dict[str, Any], request: Request) -> Result:
    """The row of the metric during which a worker ended."""
    if ending["timed_out"]:
        note = f"{metric} was not done after {request.time_limit_s:g} s; raise [limits] case_seconds to give it longer"
        return Result(metric, "timeout", note=note)
    said = f": {ending['said']}" if ending["said"] else ""
    if ending.get("two_answered"):
        note = "two processes answered: the model forks while it is made or run, and both go on as if alone"
        return Result(metric, "crash", note=f"{note}{said}")
    if ending["code"] == -9:  # noqa: PLR2004 - SIGKILL
        return Result(
            metric,
            "out_of_memory",
            note=f"the process was killed from outside, as the system does when memory is short{said}",
        )
    return Result(metric, "crash", note=f"the process {how_ended(ending['code'], ending['said'])}")


def recognised(plan: Plan, store: Store) -> Plan:
    """The plan with what its factories read, where the store knows a state of them that is the one here and now.

    Elsewhere only making a model tells what it reads; until then the case has no rows.
    """
    present, states = Present(), store.states()
    return replace(plan, cases=tuple(_recognised(planned, states, present) for planned in plan.cases))


def _asked(plan: Plan) -> Iterator[tuple[str, tuple[str, str]]]:
    """The label of each row that a plan asks for, and what the store knows it by."""
    for planned in plan.cases:
        for name in planned.metrics:
            yield planned.case.spec.label, (planned.case.case_id, name)


def has_numbers(plan: Plan, store: Store, fingerprint: str) -> bool:
    """Whether an environment has a number, old or new, of anything that a plan asks for."""
    outcomes = store.measured(fingerprint)
    return any(outcomes.get(row) in NUMBERED for _, row in _asked(plan))


def failed(plan: Plan, store: Store, fingerprint: str) -> list[tuple[str, Result]]:
    """Label and result of all that a plan asks for and that failed, old and new."""
    failures = store.failures(fingerprint)
    return [(label, failures[row]) for label, row in _asked(plan) if row in failures]


def _recognised(planned: PlannedCase, states: dict[str, list[Case]], present: Present) -> PlannedCase:
    if planned.case.factory is None or planned.case.factory.read:
        return planned
    seen = (each.factory for each in reversed(states.get(planned.case.work, [])))
    known = next((each for each in seen if each and present.has(each)), None)
    return replace(planned, case=planned.case.of_factory(read=known.read)) if known else planned


def pending(plan: Plan, store: Store, fingerprint: str, again: Collection[str] = ()) -> list[PlannedCase]:
    """The cases of a plan with the metrics that this environment has no row for yet; what has one is final.

    again: outcomes of rows that are measured once more all the same.
    """
    done = {row for row, outcome in store.measured(fingerprint).items() if outcome not in again}
    left = []
    for planned in recognised(plan, store).cases:
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
    environment, plan = server.environment, recognised(plan, store)
    todo = pending(plan, store, environment["fingerprint"], again)
    run_id = store.add_run(datetime.now(UTC).isoformat(timespec="seconds"), plan.name, seed, environment)
    unread = {planned.case.case_id for planned in todo if planned.case.factory}
    known = [planned for planned in plan.cases if planned.case.case_id not in unread]
    with store.writing():
        for planned in known:
            store.add_case(planned.case, list(planned.aliases))
        store.add_asked(run_id, (planned.case.case_id for planned in known))
    random.Random(seed).shuffle(todo)  # noqa: S311 - an order, not a secret
    run = _Run(plan, store, server, run_id, bool(again))
    worked_out: dict[str, list[Result]] = {}
    for planned, results in run.worked_out([each for each in todo if each.arithmetic]):
        if planned.others:
            worked_out[planned.case.case_id] = results
        else:
            tell(planned, results)
    for planned in todo:
        if rest := planned.others:
            results = worked_out.pop(planned.case.case_id, [])
            tell(planned, [*results, *run.measured(replace(planned, metrics=rest))])


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a plan: where its results come from and go to. again: they are stored beside older ones."""

    plan: Plan
    store: Store
    server: Server
    run_id: int
    again: bool

    def worked_out(self, todo: Sequence[PlannedCase]) -> Iterator[tuple[PlannedCase, list[Result]]]:
        """Yield each case with the results of its arithmetic, which are stored: a batch is, or is not."""
        for at in range(0, len(todo), BATCH):
            batch = todo[at : at + BATCH]
            asked = [self._request(planned, planned.arithmetic) for planned in batch]
            answers = self.server.work_out(asked)
            with self.store.writing():
                for planned, results in zip(batch, answers, strict=True):
                    self._keep(planned.case, results)
            yield from zip(batch, answers, strict=True)

    def measured(self, planned: PlannedCase) -> list[Result]:
        """Return the results of a case that runs in a process of its own, each stored as soon as it is there."""
        results = []
        request = self._request(planned, planned.metrics)
        for case, result in _as_read(planned.case, self.server.run(request)):
            if case.factory:
                self.store.add_case(case, list(planned.aliases))
                self.store.add_asked(self.run_id, [case.case_id])
            self._keep(case, [result])
            results.append(result)
        return results

    def _keep(self, case: Case, results: Iterable[Result]) -> None:
        case_id = case.case_id
        for result in results:
            self.store.add_result(self.run_id, case_id, result, again=self.again)

    def _request(self, planned: PlannedCase, metrics: tuple[str, ...]) -> Request:
        return request_for(self.plan, replace(planned, metrics=metrics), self.server.environment)


def _as_read(case: Case, results: Iterable[Result]) -> Iterator[tuple[Case, Result]]:
    """Each result with its case, to which belongs what the factory read (`worker` has it in the detail).

    What failed before a worker came to tell waits for the next one's word.
    """
    waiting: list[Result] = []
    for result in results:
        waiting.append(result)
        if "read" in result.detail:
            read = result.detail["read"]
            case = case.of_factory(read=json.dumps(read, sort_keys=True) if read else "")
        if case.factory is None or "read" in result.detail:
            yield from ((case, _without_read(each)) for each in waiting)
            waiting = []
    yield from ((case, each) for each in waiting)


def _without_read(result: Result) -> Result:
    return replace(result, detail={name: value for name, value in result.detail.items() if name != "read"})


def request_for(plan: Plan, planned: PlannedCase, environment: dict[str, Any]) -> Request:
    """Put a planned case under the plan's limits. On a GPU the host's memory is not limited: CUDA maps far more."""
    memory = plan.limits.memory_bytes(environment["memory_bytes"]) if planned.case.device == "cpu" else None
    return Request(planned.case, planned.metrics, asdict(plan.budget), plan.limits.case_seconds, memory)
