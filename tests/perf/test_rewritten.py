"""Convolutions over up-sampled maps at low resolution, beside what else computes them; contenders take turns.

    python -m pytest tests/perf/test_rewritten.py -s                        all of it: about half an hour
    python -m pytest tests/perf/test_rewritten.py -s -k "unet3+ and 256 and 2-threads"

prints a table per network or edge. Networks: eager, compiled and `backend=rewritten`, with their counted MACs and
predicted peaks. Edges: the direct form, tap-first, and the order of StyleGAN2's conv2d_resample (Karras et al., 2020):
a transposed convolution, then the filter, which is the same function away from the borders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from interleaved import take_turns  # type: ignore[import-not-found]  # beside this file
from torch import Tensor
from torch.nn import functional

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.measure.counting import predicted_peaks
from skipcost.bench.measure.subject import make_subject
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.kernels.low_resolution.tap_first import tap_first
from skipcost.unet_models import ModelSpec

ROUNDS = {256: 5, 512: 3}
BACKENDS = ("eager", "compile", "rewritten")
LABELS = (
    "unet3+/d4/w64/concat",
    "unet++/d4/w64/concat/upsample=bilinear",
    "unet/d4/w64/concat/upsample=bilinear",
    "unet++/d4/w64/concat",
    "unet/d4/w64/concat",
)
EDGES = ((320, 64, 2), (320, 64, 4), (320, 64, 8), (1024, 64, 16))  # of UNet 3+'s last node: in, out, factor


@pytest.mark.filterwarnings("ignore")  # what torch.compile imports warns
@pytest.mark.parametrize("threads", [1, 2], ids=["1-thread", "2-threads"])
@pytest.mark.parametrize("size", ROUNDS)
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("label", LABELS)
def test_networks(label: str, mode: str, size: int, threads: int) -> None:
    """Time a step of every backend in turns and print the table."""
    case = Case(ModelSpec.parse(label), height=size, width=size, mode=mode, optimizer="sgd")
    cases = {backend: replace(case, backend=backend) for backend in BACKENDS}
    torch.set_num_threads(threads)
    steps: dict[str, Callable[[], object]] = {name: make_subject(each, "cpu").step for name, each in cases.items()}

    found = take_turns(steps, ROUNDS[size], threads)

    peaks = [predicted_peaks(cases[name])[1] / 2**20 for name in ("eager", "rewritten")]
    executed = executed_macs(case.graph(), size, size, mode=mode)
    macs = [count / 1e9 for count in (case.graph().conv_macs(size, size), executed)]
    print(
        found.table(f"{label} {mode} {size}x{size}"),
        f"\n  as rewritten: {macs[0]:.1f} -> {macs[1]:.1f} GMAC forwards ({macs[0] / macs[1]:.2f}x less), peak "
        f"{peaks[0]:.0f} -> {peaks[1]:.0f} MiB ({peaks[1] / peaks[0]:.2f})",
    )


@pytest.mark.parametrize("threads", [1, 2], ids=["1-thread", "2-threads"])
@pytest.mark.parametrize(("inner", "outer", "factor"), EDGES)
def test_edges(inner: int, outer: int, factor: int, threads: int) -> None:
    """Time an edge's three forms in turns, after checking that they agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, inner, 256 // factor, 256 // factor, generator=generator)
    weight = torch.randn(outer, inner, 3, 3, generator=generator) / (3 * inner**0.5)

    def direct() -> Tensor:
        up = functional.interpolate(x, scale_factor=float(factor), mode="bilinear")
        return functional.conv2d(up, weight, padding=1)

    calls = {
        "direct": direct,
        "tap-first": lambda: tap_first(x, weight, factor=factor),
        "transposed, then filtered": lambda: _transposed_then_filtered(x, weight, factor),
    }

    with torch.no_grad():
        results = [call() for call in calls.values()]
        inside = (..., slice(2 * factor, -2 * factor), slice(2 * factor, -2 * factor))
        for each in results[1:]:
            torch.testing.assert_close(each[inside], results[0][inside], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
        found = take_turns(calls, 21, threads)

    print(found.table(f"{inner} -> {outer} channels, x{factor}, to 256x256"))


def _transposed_then_filtered(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Insert zeros and convolve, in one transposed convolution; then the bilinear filter along rows and columns."""
    sparse = functional.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=factor)
    taps = torch.arange(0.5, factor) / factor
    taps = torch.cat([taps, taps.flip(0)])  # 2 * factor of them, an even number: pixels lie between centres
    around = factor + factor // 2 - 2  # so that the result begins and ends with the direct form's
    for shape in ((2 * factor, 1), (1, 2 * factor)):
        kernel = taps.view(1, 1, *shape).expand(weight.shape[0], -1, -1, -1)
        amount = (0, 0, around, around) if shape[1] == 1 else (around, around, 0, 0)
        sparse = functional.conv2d(functional.pad(sparse, amount), kernel, groups=weight.shape[0])
    return sparse
