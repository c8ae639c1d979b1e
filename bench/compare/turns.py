"""One side of a paired comparison: a process that prepares a case of its revision and runs calls when it is its turn.

Run as a script, by path: the script is this version's, what it imports is the revision's. One JSON value a line.
In: {"case": ...}, {"calls": n}, {"profile": n}; out: what was asked for, or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

WARM_S = 0.5  # at least this long, and until flat: the first calls allocate, and choose algorithms
FLAT = 0.05
WINDOW = 3
MOST_WARM_S = 4.0
HOOKED = ("eager", "rewritten")  # backends
LAYER = "layer "  # in front of the names of layers among a profile's rows
NONE = (None, None, None)


class Ready(NamedTuple):
    """A case that can be timed; modules: the layers that a profile may hook, none where hooks change what runs."""

    step: Callable[[], object]
    device: str
    modules: dict[str, Any]


def import_early() -> None:
    """Import what every case needs before the first one comes: both sides can at once. What fails fails again then."""
    with contextlib.suppress(Exception):
        import skipcost.bench.measure.subject  # noqa: PLC0415, F401 - the revision's


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer until the other end closes; an error is an answer, and the next case may work."""
    ready: Ready | None = None
    reply: dict[str, Any]
    own = os.getpid()
    for line in requests:
        request = json.loads(line)
        try:
            if "case" in request:
                ready = None  # the network of the case before is freed first
                ready, call_s = _prepare(request)
                reply = {"call_s": call_s}
            elif ready is None:
                reply = {"error": "no case is prepared"}
            elif "profile" in request:
                reply = {"profile": _profile(ready, request["profile"])}
            else:
                reply = {"seconds": _clock(ready.device)(ready.step, request["calls"])}
        except Exception as error:  # noqa: BLE001 - whatever a network raises is this side's answer
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        if os.getpid() != own:  # a model forked, and both went on: only one of them is asked
            os._exit(0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _clock(device: str) -> Callable[[Callable[[], object], int], list[float]]:
    if device == "cuda":
        from skipcost.bench.measure.machine import cuda_clock  # noqa: PLC0415 - initialises CUDA

        return cuda_clock
    from skipcost.bench.measure.timing import cpu_clock  # noqa: PLC0415 - the revision's

    return cpu_clock


def _prepare(request: dict[str, Any]) -> tuple[Ready, float]:
    """Build the case's step, warm it up, and slow it by the share that a self-test asks for; with seconds a call."""
    import torch  # noqa: PLC0415 - imported with the first case

    from skipcost.bench.cases.case import Case  # noqa: PLC0415 - the revision's
    from skipcost.bench.measure.subject import make_subject  # noqa: PLC0415

    case = Case.from_json(json.dumps(request["case"]))
    torch.set_num_threads(case.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _allowed[: case.threads])
    subject = make_subject(case, case.device)
    step = subject.step
    seconds = _warm_up(step, case.device)
    if request.get("slowdown"):
        step = slowed(step, seconds * request["slowdown"], case.device)
    gc.collect()
    gc.freeze()
    gc.disable()
    layers = {name: each for name, each in subject.network.named_modules() if name and not list(each.children())}
    return Ready(step, case.device, layers if case.backend in HOOKED else {}), seconds


def _warm_up(step: Callable[[], object], device: str) -> float:
    """Call until two medians of three agree; return the last one."""
    clock = _clock(device)
    start, warm = time.perf_counter(), clock(step, 2 * WINDOW)
    while time.perf_counter() - start < MOST_WARM_S:
        before, after = statistics.median(warm[-2 * WINDOW : -WINDOW]), statistics.median(warm[-WINDOW:])
        if time.perf_counter() - start >= WARM_S and abs(after - before) <= FLAT * before:
            break
        warm += clock(step, 1)
    return statistics.median(warm[-WINDOW:])


def slowed(step: Callable[[], object], seconds: float, device: str) -> Callable[[], object]:
    """Return the step with a real busy-wait at its end: on the host, or on a GPU in the device's own stream."""
    if device == "cuda":
        import torch  # noqa: PLC0415 - see above

        from skipcost.bench.measure.machine import cuda_clock  # noqa: PLC0415

        cycles = 1_000_000
        each = statistics.median(cuda_clock(lambda: torch.cuda._sleep(cycles), 5)) / cycles  # noqa: SLF001 - there is no public spin

        def wait() -> None:
            torch.cuda._sleep(int(seconds / each))  # noqa: SLF001 - see above
    else:

        def wait() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

    def call() -> None:
        step()
        wait()

    return call


def _profile(ready: Ready, calls: int) -> dict[str, dict[str, float]]:
    """Seconds a call of each operator by itself, without those that it calls, and of each layer's forward pass."""
    from torch.profiler import ProfilerActivity, profile, record_function  # noqa: PLC0415 - see above

    cuda = ready.device == "cuda"
    marks: dict[str, Any] = {}

    def enter(name: str) -> None:
        marks[name] = record_function(LAYER + name)
        marks[name].__enter__()

    hooks = []
    for name, module in ready.modules.items():
        hooks.append(module.register_forward_pre_hook(lambda _module, _args, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda _module, _args, _out, name=name: marks[name].__exit__(*NONE)))
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    try:
        with profile(activities=kinds) as found:
            for _ in range(calls):
                ready.step()
    finally:
        for hook in hooks:
            hook.remove()
    own, whole = ("self_device_time_total", "device_time_total") if cuda else ("self_cpu_time_total", "cpu_time_total")
    operators, layers = {}, {}
    for row in found.key_averages():
        if row.key.startswith(LAYER):
            layers[row.key.removeprefix(LAYER)] = getattr(row, whole) / 1e6 / calls
        else:
            operators[row.key] = getattr(row, own) / 1e6 / calls
    return {"operators": operators, "layers": layers}


if __name__ == "__main__":
    _allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a network prints must not end up among the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what it reads is none of the requests
    import_early()
    serve(requests, replies)
