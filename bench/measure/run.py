"""Metrics that take running the network on the device: latency, compile time, what the GPU's allocator says.

`layers_s` has a clock around every operator that the step dispatches. They come in the order of `passes`, so that each
time has the pass's name and stands beside its reference line. What the clock itself costs is in every time, and on a
GPU the gap before a kernel's launch: the sum is above `latency_s`, and for layers of a few microseconds far above.
Training is left out: its backward pass joins two convolutions in one operator.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.doubts import Timing, machine
from skipcost.bench.measure.gpu import process_bytes, throttle_reason
from skipcost.bench.measure.here import known_device
from skipcost.bench.measure.machine import cuda_clock
from skipcost.bench.measure.metrics import gpu_metric, gpu_metrics
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.timing import Budget, Clock, cpu_clock, preempted, sample, waited
from skipcost.bench.time.passes import passes

CUDA_EXTRA = {"num_alloc_retries": "the allocator ran out of memory and retried"}
MAP_DIMENSIONS = 4  # (N, C, H, W): what a pass is about; scores and masks of one value an image are not
NOTHING_AT_INFERENCE = ("aten::dropout",)
SHARE, LEAST = 0.25, 3  # of latency_s's seconds, whose calls have warmed the process up; and the fewest steps


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


def compile_time(case: Case, _budget: Budget) -> Result:
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


def gpu_memory(case: Case, _budget: Budget) -> list[Result]:
    """Read the caching allocator and the driver after the first step and, with peaks reset, after the second.

    All come from one run: what cuDNN tries in a first step it tries once per process, so a second run here would have
    no first step.
    """
    if case.device != "cuda":
        note = "measured on a GPU only; peak_memory_predicted_bytes holds anywhere"
        return [Result(name, "unsupported", note=note) for name in gpu_metrics()]
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
            results.append(Result(gpu_metric(figure, first), samples=(peak,), note=subject.note, detail=detail))
        held, why_not = process_bytes()
        name = gpu_metric("process", first)
        results.append(Result(name, "unsupported", note=why_not) if why_not else Result(name, samples=(held,)))
    return results


class Clocked(TorchDispatchMode):
    """Time every operator on maps that is no view. `seconds()` are the durations so far, in order."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self._cuda = device == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        start = self._now()
        result = func(*args, **(kwargs or {}))
        end = self._now()
        if _is_pass(func, args, result):
            self._marks.append((start, end))
        return result

    def seconds(self) -> list[float]:
        """Durations of the operators; waits for a GPU."""
        if not self._cuda:
            return [end - start for start, end in self._marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self._marks]


def _is_pass(func: Any, args: object, result: object) -> bool:
    if func.is_view or func._schema.name in NOTHING_AT_INFERENCE:  # noqa: SLF001 - the operator's name; torch has no other
        return False
    tensors = (each for each in tree_iter((args, result)) if isinstance(each, torch.Tensor))
    return any(each.dim() == MAP_DIMENSIONS for each in tensors)


def _why_not(case: Case) -> str:
    """Say why the operators of a case are not the passes one for one; empty where they are."""
    if case.mode == "training":
        return "a backward pass joins two convolutions in one operator; layers are timed with mode=inference"
    if case.backend != "eager":
        return f"backend={case.backend} joins passes; layers are timed with backend=eager"
    if case.precision.startswith("amp-"):
        return "autocast adds an operator for every cast; layers are timed with precision=bf16 or fp16"
    return ""


def layer_times(case: Case, budget: Budget) -> Result:
    """The metric `layers_s`: a sample is the sum over a step's passes, the detail has the median of each by name."""
    expected = passes(case)
    if reason := _why_not(case):
        return Result("layers_s", "unsupported", note=reason)
    step = make_subject(case, case.device).step
    steps: list[list[float]] = []

    def clock(call: Callable[[], object], count: int) -> list[float]:
        for _ in range(count):
            with Clocked(case.device) as clocked:
                call()
            steps.append(clocked.seconds())
        return [sum(each) for each in steps[-count:]]

    short = replace(budget, seconds=budget.seconds * SHARE, least=LEAST, warmup_seconds=0.0)
    samples = sample(step, clock, short)
    kept = steps[-len(samples.seconds) :]
    if len(kept[-1]) != len(expected):
        note = f"{len(kept[-1])} operators ran where {len(expected)} passes are known: they cannot be told apart"
        return Result("layers_s", "unsupported", note=note)
    medians = [statistics.median(times) for times in zip(*kept, strict=True)]
    layers = {each.name: seconds for each, seconds in zip(expected, medians, strict=True)}
    note = waited(samples, short) or preempted(samples, short)
    return Result("layers_s", samples=tuple(samples.seconds), note=note, detail={"layers": layers})
