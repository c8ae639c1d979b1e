"""One case, one process: read a request, measure each metric, write a line for each. Also `python -m` by itself.

A request is JSON: {"case": ..., "metrics": [...], "budget": {...}}. Each result is one line of JSON on the given
stream as soon as it exists, so that a crash loses only what was still being measured. A scheduler on other machines
needs nothing but this.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import IO, Any

from skipcost.bench.cases import Case
from skipcost.bench.metrics import METRICS, Metric
from skipcost.bench.records import Result
from skipcost.bench.timing import Budget
from skipcost.unet_models.geometry import norm_note

# How torch words a failed allocation on a CPU, and oneDNN inside it.
NO_MEMORY = ("can't allocate memory", "could not create a memory object", "not enough memory", "Cannot allocate memory")


def run_case(request: dict[str, Any]) -> Iterator[Result]:
    """Yield one result for each metric asked for; a failure is a result with its reason."""
    case = Case.from_json(json.dumps(request["case"]))
    budget = Budget(**request["budget"])
    refusal = refusal_of(case)
    _take_threads(case.threads)
    for name in request["metrics"]:
        metric = METRICS[name]
        yield Result(name, "unsupported", note=refusal) if refusal else _measure(metric, name, case, budget)


def refusal_of(case: Case) -> str:
    """Say why a case cannot work at all, by arithmetic alone: its size, or a norm over a single value."""
    graph = case.graph()
    try:
        return norm_note(graph, (case.batch, case.height, case.width), training=case.mode == "training")
    except ValueError as error:
        return str(error)


def _measure(metric: Metric, name: str, case: Case, budget: Budget) -> Result:
    if metric.origin == "measured":
        reason = _why_not(case)
        if reason:
            return Result(name, "unsupported", note=reason)
    try:
        return metric.measure(case, budget)
    except MemoryError:
        return Result(name, "out_of_memory", note="the process ran out of memory")
    except Exception as error:  # noqa: BLE001 - whatever a network raises is that case's row
        text = " ".join(str(error).split())
        kind = type(error).__name__
        short = kind == "OutOfMemoryError" or any(words in text for words in NO_MEMORY)
        return Result(name, "out_of_memory" if short else "crash", note=f"{kind}: {text[:400]}")


def _why_not(case: Case) -> str:
    """Say why this machine cannot run the case as asked; empty where it can."""
    import torch  # noqa: PLC0415 - the counted metrics do without

    from skipcost.kernels import BACKENDS  # noqa: PLC0415 - imports torch

    if case.device == "cuda" and not torch.cuda.is_available():
        return "device=cuda, but torch sees no CUDA device here; use --device cpu"
    if case.device == "cpu" and case.precision == "tf32":
        return "precision=tf32 exists on NVIDIA GPUs only; use fp32 on a CPU"
    reason: str = BACKENDS[case.backend].why_not(case.device)
    return reason


def _take_threads(threads: int) -> None:
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
    answer(json.loads(sys.stdin.readline()), sys.stdout)
