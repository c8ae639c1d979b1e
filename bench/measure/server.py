"""The fork server: torch is imported once, and every case runs in a fresh fork of that process.

Protocol, one JSON value a line. In: requests of `worker` with "time_limit_s" and "memory_limit_bytes" added. Out:
first the environment; then for every request its results, as the fork makes them, and {"done": ...} with how the
fork ended. {"arithmetic": [requests]} is done here, without a fork: {"results": [...]} for each of them. A fork answers
on a pipe of its own, whatever a model does to its streams, and each of its lines begins with its number, because a
model may fork as well, and return twice. No parallel operator runs here, because forks of a process with a thread pool
hang in their first one, and CUDA is never initialised here, because it does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from functools import cache
from typing import IO, Any

from skipcost.bench.cases.case import Case
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.environment import describe
from skipcost.bench.measure.metrics import MEASURED, METRICS
from skipcost.bench.measure.probe import probed_cpu
from skipcost.bench.measure.process import answers, last_words, say
from skipcost.bench.measure.worker import limit_memory, run_case, work_out

GRACE_S, POLL_S = 1.0, 0.01
# What needs the CPU's limits; a latency is judged by them: how far it is from its line, whether its precision has
# instructions.
LIMITED = frozenset(("roofline_s", "latency_s"))
# How a fork's answers came to an end: it said so; its pipe was closed; another process answered too; its time was over;
# the driver was gone.
ENDED, CLOSED, SECOND, LATE, GONE = "ended", "closed", "second", "late", "gone"


def prepare(request: dict[str, Any]) -> None:
    """Do once, ahead of the forks that need it, what each of them would do again."""
    case, asked = Case.from_json(json.dumps(request["case"])), frozenset(request["metrics"])
    for name in asked:
        METRICS[name].load()
    if "fvcore_flops" in asked:
        from skipcost.bench.measure.counting import preload_fvcore  # noqa: PLC0415 - with torch, for all forks

        preload_fvcore()
    traced = any(METRICS[name].origin != MEASURED and not METRICS[name].is_arithmetic(case) for name in asked)
    if case.factory or traced or case.mode == "training":
        rehearse()
    _probe_for(case, asked)
    gc.collect()
    gc.freeze()  # each fork collects garbage before it measures: what they all share would take it a quarter second


def _probe_for(case: Case, asked: Collection[str]) -> None:
    """Probe the CPU, once, where something needs its limits; where that fails, who needs them tries and says why."""
    if case.device == "cpu" and not LIMITED.isdisjoint(asked):
        with contextlib.suppress(BenchError):
            probed_cpu(case.threads)


@cache
def rehearse() -> None:
    """Run one training step on the meta device: the first costs three seconds, most of them PyTorch's imports.

    With a CUDA build it would start autograd's device threads, after which a fork cannot run a backward pass, so there
    the forward pass has to do.
    """
    import torch  # noqa: PLC0415 - by then it is imported

    from skipcost.bench.measure.counting import predicted_peaks  # noqa: PLC0415
    from skipcost.unet_models import ModelSpec  # noqa: PLC0415

    mode = "training" if torch.version.cuda is None else "inference"
    for label in ("unet/d1/w2/gated", "unet3+/d1/w2/sum"):
        case = Case(spec=ModelSpec.parse(label), height=8, width=8, mode=mode)
        predicted_peaks(case)


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the driver closes its end; its death ends the case that is running, too."""
    say(replies, {"environment": describe()})
    while line := requests.readline():
        request = json.loads(line)
        if "arithmetic" in request:
            _work_out(request["arithmetic"], replies)
            continue
        prepare(request)
        say(replies, {"done": _run(request, requests, replies)})


def _work_out(asked: list[dict[str, Any]], replies: IO[str]) -> None:
    """Do arithmetic, and keep what it leaves out of the forks' collections of garbage."""
    for request in asked:
        _probe_for(Case.from_json(json.dumps(request["case"])), request["metrics"])
        say(replies, {"results": [result.values() for result in work_out(request)]})
    gc.freeze()


def _run(request: dict[str, Any], requests: IO[str], replies: IO[str]) -> dict[str, Any]:
    """Fork, pass the results on under the time limit, and tell how it ended: exit status, signal, or time-out."""
    start = time.perf_counter()
    deadline = time.monotonic() + request["time_limit_s"]
    with tempfile.TemporaryFile() as log:
        results, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _become_worker(request, writer, log.fileno(), replies.fileno())
        os.close(writer)
        with contextlib.suppress(OSError):  # both sides set it: whoever comes first, the group is there to be killed
            os.setpgid(child, child)
        ended, exits = GONE, _exit_of(child)
        try:
            ended = _relay(child, results, requests, replies, deadline, exits)
        finally:
            for number in (results, *exits):
                os.close(number)
            code, late = _finish(child, {ENDED: time.monotonic() + GRACE_S, CLOSED: deadline}.get(ended, 0.0))
        said = last_words(log)
    timed_out = ended in (LATE, GONE) or (ended == CLOSED and late)
    done = {"timed_out": timed_out, "code": code, "said": said, "wall_s": time.perf_counter() - start}
    return done | {"two_answered": ended == SECOND}


def _exit_of(child: int) -> tuple[int, ...]:
    """What can be read once a process has ended, where the system has such a thing."""
    try:
        return (os.pidfd_open(child),)
    except (AttributeError, OSError):
        return ()


def _relay(
    child: int, results: int, requests: IO[str], replies: IO[str], deadline: float, exits: Sequence[int] = ()
) -> str:
    """Pass the fork's whole lines on until it says that it has ended; return that, or what came in between.

    exits: of `_exit_of`: what the fork has left behind may hold its end of the pipe for ever.
    """
    own, buffer = str(child).encode(), b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([results, requests.fileno(), *exits], [], [], left)
        if results in ready:
            block = os.read(results, 1 << 16)
            if not block:
                return CLOSED  # what is left in the buffer is half a line of a fork that was killed
            *lines, buffer = (buffer + block).split(b"\n")
            for number, _, said in (line.partition(b" ") for line in lines):
                if number != own and number.isdigit():
                    return SECOND
                if number == own and not said:
                    return ENDED
                if number == own and _is_json(said):
                    replies.write(said.decode() + "\n")
                    replies.flush()
        elif requests.fileno() in ready:  # the driver writes nothing while a case runs: it is gone
            return GONE
        elif ready:
            return CLOSED
    return LATE


def _is_json(text: bytes) -> bool:
    """Whether a line is whole: two processes that write at once may mix theirs."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _finish(child: int, until: float) -> tuple[int, bool]:
    """Wait for a fork, end it where it has not ended by then, and all that it started; its status, and whether late."""
    late = False
    while not late and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        late = time.monotonic() >= until
        time.sleep(0.0 if late else POLL_S)
    for end in (os.killpg, os.kill):  # it may have left its group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), late


def _become_worker(request: dict[str, Any], writer: int, log: int, replies: int) -> None:
    """Run the request in this fork and leave, without a way back into the server's code."""
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        # Whatever a model starts and leaves behind, nobody waits for it and nobody hears it.
        os.close(replies)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(log, stream)
        if request["memory_limit_bytes"]:
            limit_memory(request["memory_limit_bytes"])
        with os.fdopen(writer, "w") as results:
            _answer(request, results)
        code = 0
    except BaseException as error:  # noqa: BLE001 - a fork must never return into the server's loop
        said = f"{type(error).__name__}: {error}\n"
        os.write(log, said.encode(errors="replace"))
    finally:
        os._exit(code)


def _answer(request: dict[str, Any], results: IO[str]) -> None:
    """Write each result behind this process's number, and the number alone at the end.

    Where the model forked a process that answers as well, both tell their number, and neither can be believed.
    """
    own, forks = os.getpid(), list[int]()
    os.register_at_fork(after_in_parent=lambda: forks.append(1))
    for result in run_case(request):
        if forks and os.getpid() == own:
            forks.clear()
            time.sleep(GRACE_S)  # the other one is told of before this one's number counts
        results.write(f"{os.getpid()} {result.to_json()}\n")
        results.flush()
        if os.getpid() != own:
            return
    results.write(f"{os.getpid()}\n")


def _die_with_parent() -> None:
    """Have the kernel end this fork when the server dies, however it dies; elsewhere it ends at its next result."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    with answers() as replies:
        serve(sys.stdin, replies)
