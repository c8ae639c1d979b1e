"""Work in processes of its own: a kernel that hangs, or breaks its process, costs its own row and nothing else.

A job is JSON: what its parts share, and the parts. A function at the top of a module takes both and yields one row for
each part, in order, so that what is shared (inputs, an oracle) is made once. After an illegal access a CUDA process is
of no use any more: the function raises `LostDeviceError`, and another process goes on with the next part. What the time
does not suffice for is handed back as well, so that nothing is left out silently.
"""

from __future__ import annotations

import importlib
import json
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from skipcost.bench.errors import LostDeviceError
from skipcost.bench.measure.process import PYTHON, Process, answers, say

Row = dict[str, Any]
Work = Callable[[dict[str, Any], Sequence[dict[str, Any]]], Iterator[Row]]
GRACE_SECONDS = 45.0  # beyond the end of the time, for what is under way then


@dataclass(frozen=True, slots=True)
class Job:
    """what: JSON values that all parts share. parts: JSON values, one row each. memory: bytes that the job may take."""

    what: dict[str, Any]
    parts: tuple[dict[str, Any], ...]
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """One part and its row; None where there was no time for it."""

    what: dict[str, Any]
    part: dict[str, Any]
    row: Row | None


@dataclass(frozen=True, slots=True)
class Limits:
    """until: time.time() from which on nothing is begun. patience: seconds that one part may take.

    workers: processes at a time; without any the jobs run in this process, unprotected, as on a CPU, where nothing can
    be lost. memory: bytes that the jobs of all processes may take together; one that takes more runs by itself.
    """

    until: float
    patience: float = 90.0
    workers: int = 1
    memory: int = 2**63


def run(jobs: Sequence[Job], work: Work, limits: Limits) -> Iterator[Done]:
    """Yield each part of each job once, as it is done: parts of a job in order, jobs begun in order."""
    if not limits.workers:
        yield from _here(jobs, work, limits)
        return
    board = _Board(jobs, limits)
    workers = [_Worker(work, board) for _ in range(min(limits.workers, len(jobs)))]
    for worker in workers:
        worker.thread.start()
    try:
        ended = 0
        while ended < len(workers):
            item = board.done.get()
            if item is None:
                ended += 1
            else:
                yield item
        for job in board.waiting:
            yield from _left(job, job.parts)
    finally:
        board.over.set()
        for worker in workers:
            worker.give_up()


def failed(outcome: str, note: str) -> Row:
    """Return the row of a part that gave no result."""
    return {"outcome": outcome, "note": " ".join(note.split())[:400]}


def _left(job: Job, parts: Sequence[dict[str, Any]]) -> Iterator[Done]:
    for part in parts:
        yield Done(job.what, part, None)


def _here(jobs: Sequence[Job], work: Work, limits: Limits) -> Iterator[Done]:
    for job in jobs:
        rows = work(job.what, job.parts)
        for part in job.parts:
            yield Done(job.what, part, next(rows) if time.time() < limits.until else None)


class _Board:
    """What the workers of one run share: the jobs that wait, the memory that is left, and what is done."""

    def __init__(self, jobs: Sequence[Job], limits: Limits) -> None:
        self.limits, self.waiting = limits, deque(jobs)
        self.done: queue.SimpleQueue[Done | None] = queue.SimpleQueue()
        self.over = threading.Event()
        self.changed = threading.Condition()
        self.taken: list[int] = []

    def take(self) -> Job | None:
        """Return the next job as soon as there is memory for it; None when there is nothing more to do, or no time."""
        with self.changed:
            while self.waiting and not self.over.is_set() and time.time() < self.limits.until:
                if not self.taken or sum(self.taken) + self.waiting[0].memory <= self.limits.memory:
                    self.taken.append(self.waiting[0].memory)
                    return self.waiting.popleft()
                self.changed.wait(1.0)
        return None

    def release(self, memory: int) -> None:
        """Give back what a job took."""
        with self.changed:
            self.taken.remove(memory)
            self.changed.notify_all()


class _Worker:
    """A thread that feeds one process after the other: a new one where the last is gone."""

    def __init__(self, work: Work, board: _Board) -> None:
        self.limits, self.board = board.limits, board
        self.command = [*PYTHON, "-m", "skipcost.bench.kernels.jobs", work.__module__, work.__name__]
        self.done, self.over = board.done, board.over
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.process: Process | None = None

    def _work(self) -> None:
        try:
            while (job := self.board.take()) is not None:
                try:
                    self._do(job)
                finally:
                    self.board.release(job.memory)
        finally:
            self.stop()
            self.done.put(None)

    def _do(self, job: Job) -> None:
        while job.parts and not self.over.is_set():
            if self.process is None:
                self.process = Process(self.command)
            if self.over.is_set():  # asked again once `give_up` can see the process
                return
            answered, ending = self._answers(job)
            rest = job.parts[answered:]
            if ending is None:
                return
            self.stop()
            if not rest:  # it ended after its last row
                return
            if ending == "time":
                for item in _left(job, rest):
                    self.done.put(item)
                return
            if ending != "lost" or not answered:  # whoever was being worked on has ended the process
                outcome, _, note = ending.partition(": ") if ending != "lost" else ("crash", "", "the device was lost")
                self.done.put(Done(job.what, rest[0], failed(outcome, note)))
                rest = rest[1:]
            job = replace(job, parts=rest)

    def _answers(self, job: Job) -> tuple[int, str | None]:
        """Put the rows of a job out as they come; return how many did, and what ended them: None if all is well."""
        process, answered = self.process, 0
        assert process is not None
        process.tell({"what": job.what, "parts": job.parts, "until": self.limits.until})
        while True:
            wait = min(self.limits.patience, self.limits.until + GRACE_SECONDS - time.time())
            message = process.read(wait)
            if message is None:
                if process.alive():
                    late = time.time() >= self.limits.until + GRACE_SECONDS
                    slow = f"timeout: no result within {self.limits.patience:.0f} seconds"
                    return answered, "time" if late else slow
                return answered, f"crash: the process {process.ended()}"
            if "row" in message:
                self.done.put(Done(job.what, job.parts[answered], message["row"]))
                answered += 1
            elif "ending" in message:
                ending: str | None = message["ending"]
                return answered, ending

    def give_up(self) -> None:
        """End the process under the thread's hands, which then ends too."""
        if (process := self.process) is not None:
            process.end()
        self.thread.join()

    def stop(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


def serve(work: Work, lines: IO[str], out: IO[str]) -> None:
    """Do jobs, a line each, until there are no more: the other end of a worker. What is not begun `until` is left."""
    for line in lines:
        asked = json.loads(line)
        try:
            rows = work(asked["what"], asked["parts"])
            for _ in asked["parts"]:
                if time.time() >= asked["until"]:
                    say(out, {"ending": "time"})
                    break
                say(out, {"row": next(rows)})
            else:
                say(out, {"ending": None})
        except LostDeviceError:
            say(out, {"ending": "lost"})
            return


if __name__ == "__main__":
    with answers() as rows:
        serve(getattr(importlib.import_module(sys.argv[1]), sys.argv[2]), sys.stdin, rows)
