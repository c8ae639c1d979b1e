"""The table of metrics: every row explains itself and measures what its name says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.figures import FORMATS, text
from skipcost.bench.measure.metrics import COUNTED, EVERY_BACKEND, MEASURED, METRICS, PREDICTED
from skipcost.bench.measure.timing import Budget
from skipcost.bench.memory.liveness import why_not
from skipcost.unet_models import ModelSpec

CASE = Case(spec=ModelSpec(depth=2, width=4), height=19, width=30, batch=3)
UNITS = {"seconds": "_s", "bytes": "_bytes"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_explains_itself(name: str) -> None:
    """Title, unit, origin and method are filled in, and the unit is in the name where it has one."""
    metric = METRICS[name]

    assert metric.title
    assert metric.how
    assert metric.unit in FORMATS
    assert metric.origin in (COUNTED, PREDICTED, MEASURED)
    assert name.endswith(UNITS.get(metric.unit, ""))


@pytest.mark.parametrize("name", METRICS)
def test_exact_metrics_have_no_threshold(name: str) -> None:
    """What is counted is gated at zero; what is measured, or rests on a measured device, has room for noise."""
    metric = METRICS[name]

    assert metric.exact or metric.origin != COUNTED
    assert not metric.exact or metric.origin != MEASURED
    assert (metric.threshold == 0) == metric.exact


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.exact])
def test_an_exact_metric_is_measured_under_its_own_name(name: str) -> None:
    """What a row's function returns holds the row's metric, ok, as one number."""
    results = {result.metric: result for result in METRICS[name].measure(CASE, Budget())}

    assert results[name].outcome == "ok"
    assert len(results[name].samples) == 1


def test_arithmetic_needs_no_torch() -> None:
    """What is done without a process of its own imports nothing that runs a network."""
    script = """
import sys
from dataclasses import replace
from skipcost.bench.cases.case import Case
from skipcost.bench.measure.metrics import METRICS
from skipcost.unet_models import ModelSpec
cases = [Case(spec=ModelSpec(depth=1, width=2), height=16, width=16, backend=each) for each in ("eager", "rewritten")]
names = [name for name in METRICS if name != "roofline_s" and METRICS[name].is_arithmetic(cases[0])]
results = [result for case in cases for name in names for result in METRICS[name].measure(case, None)]
print(len(names), {result.outcome for result in results if "predicted_" not in result.metric}, "torch" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    count, *rest = done.stdout.split(maxsplit=1)
    assert int(count) > 7
    assert rest == ["{'ok'} False\n"]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_nothing_of_a_model_of_one_s_own_is_arithmetic(backend: str) -> None:
    """Its factory would run in the process that all cases share."""
    own, case = Case(spec=Factory("package.module:net"), backend=backend), Case(backend=backend)

    assert not any(metric.is_arithmetic(own) for metric in METRICS.values())
    assert METRICS["params"].is_arithmetic(case)
    assert METRICS["peak_memory_predicted_bytes"].is_arithmetic(case) == (not why_not(case))


@pytest.mark.parametrize("name", ["conv_macs", "activations", "fvcore_flops"])
def test_work_is_counted_for_the_whole_batch(name: str) -> None:
    """Three images cost three times one; parameters and receptive field do not change."""
    one = METRICS[name].measure(Case(spec=CASE.spec, height=19, width=30), Budget())[0].samples[0]
    three = METRICS[name].measure(CASE, Budget())[0].samples[0]

    assert three == 3 * one


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (26_971_777, "count", "27.0 M"),
        (197_652_381_696, "macs", "198 GMAC"),
        (0.0251, "seconds", "25.1 ms"),
        (2e-6, "seconds", "2.00 µs"),
        (125.0, "seconds", "2 min 5 s"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (512, "bytes", "512 B"),
        (204, "pixels", "204 px"),
        (0, "count", "0"),
        (None, "bytes", "-"),
    ],
)
def test_units_are_formatted_at_the_edge(value: float | None, unit: str, shown: str) -> None:
    """Base values become three significant figures with a unit; bytes in powers of two."""
    assert text(value, unit) == shown
