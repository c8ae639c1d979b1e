"""What the reference line and a calibration's features cost: `skipcost fit` asks for them network by network."""

from __future__ import annotations

import itertools

from pytest_benchmark.fixture import BenchmarkFixture

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.predictions.calibration import features
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import device_named
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

CASES = [
    Case(spec=ModelSpec(variant=variant, skip=skip, depth=4, width=32), mode=mode)
    for variant, skip, mode in itertools.product(VARIANTS, SKIPS, CHOICES["mode"])
]


def test_reference_lines_per_second(benchmark: BenchmarkFixture) -> None:
    """Lines of depth-4 networks of every variant, skip scheme and mode; aim: 1,000 a second."""
    device = device_named("h100")

    benchmark.pedantic(lambda: [bound(case, device) for case in CASES], rounds=10, warmup_rounds=2)

    print(f"\n{len(CASES) / benchmark.stats.stats.median:,.0f} reference lines a second")


def test_features_per_second(benchmark: BenchmarkFixture) -> None:
    """A calibration's features of the same networks; aim: 1,000 a second."""
    benchmark.pedantic(lambda: [features(case) for case in CASES], rounds=10, warmup_rounds=2)

    print(f"\n{len(CASES) / benchmark.stats.stats.median:,.0f} cases a second")
