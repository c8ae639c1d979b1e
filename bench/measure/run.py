"""Metrics that take running the network on the device: latency, compile time, what the GPU's allocator says."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.doubts import Timing, machine
from skipcost.bench.measure.gpu import process_bytes, throttle_reason
from skipcost.bench.measure.here import known_device
from skipcost.bench.measure.machine import cuda_clock
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.timing import Budget, Clock, cpu_clock, sample

CUDA_EXTRA = {"num_alloc_retries": "the allocator ran out of memory and retried"}


def latency(case: Case, budget: Budget) -> Result:
    """Sample the duration of one step; on a GPU the caches are hot and the events include launch gaps."""
    subject = make_subject(case, case.device)
    clock: Clock = cuda_clock if case.device == "cuda" else cpu_clock
    before = machine()
    samples = sample(subject.step, clock, budget)
    timed = Timing(case, samples, before, machine(), known_device(case))
    detail = {"warmup_calls": samples.warmup_calls, "threads": torch.get_num_threads()} | timed.detail()
    throttled = throttle_reason() if case.device == "cuda" else ""
    if throttled:
        return Result("latency_s", "throttled", tuple(samples.seconds), throttled, detail)
    note = "; ".join(filter(None, (timed.note(budget), subject.note)))
    return Result("latency_s", samples=tuple(samples.seconds), note=note, detail=detail)


def compile_time(case: Case) -> Result:
    """Time the first call under torch.compile, less the quickest of three later ones."""
    if case.backend != "compile":
        return Result("compile_s", "unsupported", note=f"backend={case.backend} compiles nothing; use backend=compile")
    step = make_subject(case, case.device).step
    first, *later = [_host_time(step, case.device) for _ in range(4)]
    return Result("compile_s", samples=(first - min(later),))


def _host_time(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_memory(case: Case, names: Callable[[str, bool], str]) -> list[Result]:
    """Read the caching allocator and the driver after the first step and, with peaks reset, after the second.

    `names(figure, first)` is the metric of a figure. All come from one run: what cuDNN tries in a first step it tries
    once per process, so a second run here would have no first step.
    """
    torch.cuda.empty_cache()
    subject = make_subject(case, "cuda")
    results = []
    for first in (True, False):
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        detail = {text: stats[key] for key, text in CUDA_EXTRA.items() if stats.get(key)}
        for figure in ("requested", "allocated", "reserved"):
            peak = stats[f"{figure}_bytes.all.peak"]
            results.append(Result(names(figure, first), samples=(peak,), note=subject.note, detail=detail))
        held, why_not = process_bytes()
        name = names("process", first)
        results.append(Result(name, "unsupported", note=why_not) if why_not else Result(name, samples=(held,)))
    return results
