"""Metrics that take running the network on the device: latency, compile time, what the GPU's allocator says."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import torch

from skipcost.bench.cases import Case
from skipcost.bench.gpu import process_bytes, throttle_reason
from skipcost.bench.records import Result
from skipcost.bench.subject import make_subject
from skipcost.bench.timing import Budget, Clock, cpu_clock, sample

CUDA_EXTRA = {"num_alloc_retries": "the allocator ran out of memory and retried"}


def cuda_clock(call: Callable[[], object], count: int) -> list[float]:
    """Time `count` calls on the device: an event either side of each, one synchronisation at the end."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def latency(case: Case, budget: Budget) -> Result:
    """Sample the duration of one step; on a GPU the caches are hot and the events include launch gaps."""
    subject = make_subject(case, case.device)
    clock: Clock = cuda_clock if case.device == "cuda" else cpu_clock
    samples = sample(subject.step, clock, budget)
    detail = {"warmup_calls": samples.warmup_calls, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    throttled = throttle_reason() if case.device == "cuda" else ""
    if throttled:
        return Result("latency_s", "throttled", tuple(samples.seconds), throttled, detail)
    return Result("latency_s", samples=tuple(samples.seconds), note=samples.note(budget), detail=detail)


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


def gpu_memory(case: Case, metric: str, figure: str, *, first: bool) -> Result:
    """Read one figure of the caching allocator after the first step, or after the second with its peaks reset."""
    if case.device != "cuda":
        return Result(metric, "unsupported", note="measured on a GPU only; peak_memory_predicted_bytes holds anywhere")
    torch.cuda.empty_cache()
    subject = make_subject(case, "cuda")
    for _ in range(1 if first else 2):
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    detail = {text: stats[key] for key, text in CUDA_EXTRA.items() if stats.get(key)}
    if figure == "process":
        value, why_not = process_bytes()
        return (
            Result(metric, "unsupported", note=why_not) if why_not else Result(metric, samples=(value,), detail=detail)
        )
    return Result(metric, samples=(stats[f"{figure}_bytes.all.peak"],), detail=detail)
