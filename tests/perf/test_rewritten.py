"""Whole networks, eager against `backend=rewritten`: paired and interleaved in one process, and their traced peaks.

    python -m pytest tests/perf/test_rewritten.py -s

prints one row per network and mode. Times are CPU seconds on one thread, which other programs on a shared machine
stretch least; a row's ratio is the median over pairs of one step each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from skipcost.bench.cases import CHOICES, Case
from skipcost.bench.counting import predicted_peaks
from skipcost.bench.subject import make_subject
from skipcost.kernels.tap_choice import executed_macs
from skipcost.kernels.timing import no_gc
from skipcost.unet_models import ModelSpec

PAIRS = 5
BACKENDS = ("eager", "rewritten")
LABELS = (
    "unet3+/d4/w64/concat",
    "unet++/d4/w64/concat/upsample=bilinear",
    "unet/d4/w64/concat/upsample=bilinear",
)


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("label", LABELS)
def test_pairs(label: str, mode: str) -> None:
    """Time a step of either backend in turn, after one of each to warm up, and print the row."""
    case = Case(ModelSpec.parse(label), height=256, width=256, mode=mode, optimizer="sgd")
    cases = [replace(case, backend=backend) for backend in BACKENDS]
    torch.set_num_threads(1)
    steps = [make_subject(each, "cpu").step for each in cases]

    with no_gc():
        times = [[_seconds(step) for step in steps] for _ in range(PAIRS + 1)]

    eager, rewritten = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratios = sorted(first / second for first, second in times[1:])
    peaks = [predicted_peaks(each)[1] / 2**20 for each in cases]
    macs = case.graph().conv_macs(256, 256) / executed_macs(case.graph(), 256, 256)
    print(
        f"\n{label} {mode}: {eager:.2f} -> {rewritten:.2f} CPU s, {statistics.median(ratios):.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}, {PAIRS} pairs, load {os.getloadavg()[0]:.1f}); "
        f"MACs {macs:.2f}x less; peak {peaks[0]:.0f} -> {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f})"
    )


def _seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start
