"""Measure both forms of convolutions over up-sampled maps on this machine's CPU, for `low_winners` to read.

A GPU's rows are made by `skipcost kernels bench`, which measures them beside everything else there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.bench.errors import MachineError
from skipcost.bench.measure.journal import Journal, code_hash
from skipcost.bench.measure.timing import Budget, cpu_clock, sample
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.low_winners import CPU, TAP_FIRST
from skipcost.kernels.low_resolution.tap_first import tap_first

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # of the largest value: only a wrong result is so far off
BUDGET = Budget(seconds=0.5, warmup_seconds=1.0)


def measure(calls: Iterable[Call], threads: int, budget: Budget = BUDGET) -> Iterator[Call]:
    """Time both forms of each call, one after the other, on `threads`; yield a call when its rows are written.

    Samples are of one image, forward, without gradients. MachineError where the forms do not agree, before any timing.
    """
    origin = {"device": {"name": CPU}, "versions": {"torch": torch.__version__, "code": code_hash()}}
    journal, before = Journal(winners.own_file(), origin), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in calls:
            for name, run in _forms(call).items():
                samples = sample(run, cpu_clock, budget)
                row = {"op": call.op, "call": call.key, "precision": call.precision, "implementation": name}
                journal.add(row | _numbers(samples.seconds, samples.note(budget), threads))
            yield call
    finally:
        torch.set_num_threads(before)
        winners.table.cache_clear()


def _numbers(seconds: list[float], note: str, threads: int) -> dict[str, Any]:
    return {"outcome": "ok", "note": note, "seconds": seconds, "cache": "hot", "graph": False, "threads": threads}


def _forms(call: Call) -> dict[str, Callable[[], Tensor]]:
    """Return both forms on random operands, by implementation, after comparing them."""
    ((channels, height, width),) = call.sources
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[call.precision]
    x = torch.randn(call.batch, channels, height, width, generator=generator).to(dtype)
    shape = call.out_channels, channels, call.kernel, call.kernel
    weight = (torch.randn(shape, generator=generator) / (call.kernel * channels**0.5)).to(dtype)

    @torch.no_grad()
    def direct() -> Tensor:
        up = functional.interpolate(x, scale_factor=float(call.factor), mode="bilinear")
        return functional.conv2d(up, weight, padding=call.padding)

    @torch.no_grad()
    def ours() -> Tensor:
        return tap_first(x, weight, factor=call.factor, padding=call.padding)

    wanted = direct().float()
    error = (ours().float() - wanted).abs().max() / wanted.abs().max()
    if not error <= TOLERANCE[call.precision]:
        message = (
            f"both forms of {call.key} differ by {float(error):.2g} of the largest value, more than rounding can: "
            "nothing was timed; report it with the CPU's name and torch's version"
        )
        raise MachineError(message)
    return {"reference": direct, TAP_FIRST["cpu"]: ours}
