"""The fork server: torch is imported once, and every case runs in a fresh fork of that process.

Protocol, one JSON value a line. In: requests of `worker` with "time_limit_s" and "memory_limit_bytes" added. Out:
first the environment; then for every request its results, as the fork makes them, and {"done": ...} with how the
fork ended. No parallel operator runs here, because forks of a process with a thread pool hang in their first one, and
CUDA is never initialised here, because it does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import time
from typing import IO, Any

from skipcost.bench.cases import Case
from skipcost.bench.environment import describe
from skipcost.bench.errors import BenchError
from skipcost.bench.probe import probed_cpu
from skipcost.bench.worker import answer, limit_memory


def warm_up() -> None:
    """Do once what every fork would do again: import what measuring needs, and one training step on the meta device.

    The first backward pass on the meta device alone costs two seconds. With a CUDA build it would start autograd's
    device threads, after which a fork cannot run a backward pass, so there the forward pass has to do.
    """
    import torch  # noqa: PLC0415 - this is the function that imports it for all forks

    from skipcost.bench import running  # noqa: F401, PLC0415 - imported for the forks
    from skipcost.bench.counting import predicted_peaks, preload_fvcore  # noqa: PLC0415
    from skipcost.unet_models import ModelSpec  # noqa: PLC0415

    preload_fvcore()
    mode = "training" if torch.version.cuda is None else "inference"
    for label in ("unet/d1/w2/gated", "unet3+/d1/w2/sum"):
        case = Case(spec=ModelSpec.parse(label), height=8, width=8, mode=mode)
        predicted_peaks(case)


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the driver closes its end; its death ends the case that is running, too."""
    warm_up()
    _say(replies, {"environment": describe()})
    while line := requests.readline():
        request = json.loads(line)
        _probe_for(request)
        _say(replies, {"done": _run(request, requests, replies)})


def _probe_for(request: dict[str, Any]) -> None:
    """Probe the CPU ahead of the forks that need its limits, once; where that fails, the fork tries and says why."""
    case = Case.from_json(json.dumps(request["case"]))
    if case.device == "cpu" and "roofline_s" in request["metrics"]:
        with contextlib.suppress(BenchError):
            probed_cpu(case.threads)


def _say(replies: IO[str], value: dict[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def _run(request: dict[str, Any], requests: IO[str], replies: IO[str]) -> dict[str, Any]:
    """Fork, pass the results on under the time limit, and tell how it ended: exit status, signal, or time-out."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a model prints whatever bytes it likes
        results, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _become_worker(request, writer, log)
        os.close(writer)
        with contextlib.suppress(OSError):  # both sides set it: whoever comes first, the group is there to be killed
            os.setpgid(child, child)
        timed_out = _relay(results, requests, replies, request["time_limit_s"])
        os.close(results)
        if timed_out:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        said = log.read().strip().splitlines()[-3:]
    code = os.waitstatus_to_exitcode(status)
    return {"timed_out": timed_out, "code": code, "said": " ".join(said)[-400:], "wall_s": time.perf_counter() - start}


def _relay(results: int, requests: IO[str], replies: IO[str], limit_s: float) -> bool:
    """Pass whole lines on until the fork closes its end of the pipe; True where the limit passed first."""
    deadline = time.monotonic() + limit_s
    buffer = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([results, requests.fileno()], [], [], left)
        if results in ready:
            block = os.read(results, 1 << 16)
            if not block:
                return False  # what is left in the buffer is half a line of a fork that was killed
            *lines, buffer = (buffer + block).split(b"\n")
            for line in lines:
                replies.write(line.decode("utf-8", "replace") + "\n")
            replies.flush()
        elif ready:  # the driver writes nothing while a case runs: it is gone
            return True
    return True


def _become_worker(request: dict[str, Any], writer: int, log: IO[str]) -> None:
    """Run the request in this fork and leave, without a way back into the server's code."""
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        if request["memory_limit_bytes"]:
            limit_memory(request["memory_limit_bytes"])
        with os.fdopen(writer, "w") as results:
            answer(request, results)
        code = 0
    except BaseException as error:  # noqa: BLE001 - a fork must never return into the server's loop
        log.write(f"{type(error).__name__}: {error}\n")
        log.flush()
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    """Have the kernel end this fork when the server dies, however it dies; elsewhere it ends at its next result."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything here prints must not end up among the replies
    serve(sys.stdin, replies)
