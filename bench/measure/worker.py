"""One case, one process: read a request, measure each metric, write a line for each. Also `python -m` by itself.

A request is JSON: {"case": ..., "metrics": [...], "budget": {...}}. Each result is one line of JSON on the given
stream as soon as it exists, so that a crash loses only what was still being measured. A scheduler on other machines
needs nothing but this.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Transcript, importing_from_here, make, shorten, sources_of
from skipcost.bench.cases.opened import digests, listening
from skipcost.bench.cases.record import Result, outcome_of
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.measure.metrics import MEASURED, METRICS
from skipcost.bench.measure.process import answers
from skipcost.bench.measure.timing import Budget
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import norm_note

OUT_OF_MEMORY = {"OutOfMemoryError": "out_of_memory"}  # torch's, of a GPU
# How torch words a failed allocation on a CPU, and oneDNN inside it.
NO_MEMORY = ("can't allocate memory", "could not create a memory object", "not enough memory", "Cannot allocate memory")


def run_case(request: dict[str, Any]) -> Iterator[Result]:
    """Yield one result for each metric asked for; a failure is a result with its reason."""
    case = Case.from_json(json.dumps(request["case"]))
    take_threads(case.threads)
    with importing_from_here() if case.factory else contextlib.nullcontext():  # a model may import when it runs
        yield from _results(case, list(request["metrics"]), Budget(**request["budget"]))


def work_out(request: dict[str, Any]) -> list[Result]:
    """Return the results of a request for metrics that are arithmetic; nothing of this process changes for it."""
    case = Case.from_json(json.dumps(request["case"]))
    return list(_results(case, list(request["metrics"]), Budget(**request["budget"])))


def _results(case: Case, left: list[str], budget: Budget) -> Iterator[Result]:
    own = os.getpid()
    failure, known = _examined(case)
    if os.getpid() != own:
        yield Result(left[0], "crash", note="the factory forked, and this is the other process")
        return
    while left:
        function = METRICS[left[0]].function
        together = [name for name in left if METRICS[name].function == function]
        left = [name for name in left if name not in together]
        results = _failed(together, *failure) if failure else _measured(together, case, budget, known)
        yield from (replace(each, detail={**each.detail, **known}) for each in results)


def _examined(case: Case) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Outcome and note for all metrics of a case that cannot work at all; what its factory prints and reads, as detail.

    What a network of the suite cannot do is known by arithmetic; a user's own model is made once to see, and run once
    to hear what it opens. `read` becomes part of the case's key (`driver`).
    """
    if case.factory is None:
        refusal = refusal_of(case)
        return (("unsupported", refusal) if refusal else None), {}
    failure, said, sources = None, "", None
    with listening() as heard:
        try:
            sources = sources_of(case.factory.path)
            network, said = make(case.factory, "meta")
            _run_once(network, case)
        except Exception as error:  # noqa: BLE001 - whatever a factory raises is its rows
            failure = _outcome(error)
    read = {"read": digests(heard.names(sources), sources)}
    return failure, read | ({"printed": shorten(said)} if said.strip() else {})


def _run_once(network: Any, case: Case) -> None:
    """Run a model without data, so that what it opens when it runs is heard; what it raises is told where it counts."""
    import torch  # noqa: PLC0415 - the counted metrics of the suite's networks do without

    with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stdout(Transcript()), torch.no_grad():
        image = torch.empty(case.batch, case.spec.in_channels, case.height, case.width, device="meta")
        network.train(case.mode == "training")(image)


def refusal_of(case: Case) -> str:
    """Say why a case cannot work at all, by arithmetic alone: its size, or a norm over a single value.

    Nothing is known so of a user's own model: it is not refused.
    """
    if case.factory:
        return ""
    graph = case.graph()
    try:
        return norm_note(lower(graph), case.batch, (case.height, case.width), training=case.mode == "training")
    except ValueError as error:
        return str(error)


def _failed(names: list[str], outcome: str, note: str) -> list[Result]:
    return [Result(name, outcome, note=note) for name in names]


def _measured(names: list[str], case: Case, budget: Budget, known: dict[str, Any]) -> list[Result]:
    """Measure metrics that come from one call; say where a user's own model opens what its key does not name.

    That is what it opens with data alone. Compilers keep files of their own, so there nobody listens.
    """
    if case.factory is None or case.backend != "eager":
        return _measure(names, case, budget)
    with listening() as heard:
        results = _measure(names, case, budget)
    if late := sorted(heard.names(sources_of(case.factory.path)) - known["read"].keys()):
        note = f"the model opens {shorten(', '.join(late))} with data alone: a change of it makes no new case"
        return [replace(result, note="; ".join(filter(None, (result.note, note)))) for result in results]
    return results


def _measure(names: list[str], case: Case, budget: Budget) -> list[Result]:
    """Measure metrics that come from one call; what it raises is the outcome of all of them."""
    metric = METRICS[names[0]]
    if metric.origin == MEASURED and (reason := _why_not(case)):
        return _failed(names, "unsupported", reason)
    said = Transcript()
    try:
        with contextlib.redirect_stdout(said) if case.factory else contextlib.nullcontext():
            found = [result for result in metric.measure(case, budget) if result.metric in names]
    except Exception as error:  # noqa: BLE001 - whatever a network raises is that case's row
        return _failed(names, *_outcome(error))
    if metric.origin == MEASURED and said.getvalue():
        note = f"the model prints while it runs, which takes time: {shorten(said.getvalue())}"
        return [replace(result, note="; ".join(filter(None, (result.note, note)))) for result in found]
    return found


def _outcome(error: Exception) -> tuple[str, str]:
    if isinstance(error, MemoryError):
        return "out_of_memory", "the process ran out of memory"
    return outcome_of(error, UnsupportedError, OUT_OF_MEMORY, NO_MEMORY)


def _why_not(case: Case) -> str:
    """Say why this machine cannot run the case as asked; empty where it can."""
    import torch  # noqa: PLC0415 - the counted metrics do without

    from skipcost.kernels import BACKENDS  # noqa: PLC0415 - imports torch

    if case.device == "cuda" and not torch.cuda.is_available():
        return "device=cuda, but torch sees no CUDA device here; use --device cpu"
    if case.device == "cpu" and case.precision == "tf32":
        return "precision=tf32 exists on NVIDIA GPUs only; use fp32 on a CPU"
    if case.factory and case.backend == "fused":
        return "backend=fused builds networks of the suite; have the factory return skipcost.kernels.fuse(model)[0]"
    if case.factory and case.backend == "rewritten":
        return "backend=rewritten builds networks of the suite: use backend=eager for a model of your own"
    reason: str = BACKENDS[case.backend].why_not(case.device)
    return reason


def take_threads(threads: int) -> None:
    """Use `threads` CPU threads and pin the process to as many of the CPUs that it may use."""
    import torch  # noqa: PLC0415 - see above

    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


def limit_memory(limit_bytes: int) -> None:
    """Let allocations beyond the limit fail in this process instead of starving the machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def answer(request: dict[str, Any], stream: IO[str]) -> None:
    """Measure a request and write each result as a line, flushed."""
    for result in run_case(request):
        stream.write(result.to_json() + "\n")
        stream.flush()


if __name__ == "__main__":
    with answers() as results:
        answer(json.loads(sys.stdin.readline()), results)
