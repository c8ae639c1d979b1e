"""The table of metrics: every row explains itself and measures what its name says."""

from __future__ import annotations

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.figures import FORMATS, text
from skipcost.bench.measure.metrics import COUNTED, MEASURED, METRICS, PREDICTED
from skipcost.bench.measure.timing import Budget
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
