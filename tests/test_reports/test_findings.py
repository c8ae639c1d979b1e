"""The sentences: their numbers are worked out here again, in another way, from the specs alone."""

from __future__ import annotations

import os
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from places import TESTS
from small_store import DOUBTFUL, FAILED, make_store

from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import create_store
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.reports.compare import TIMES, front, times
from skipcost.reports.data import Data, load
from skipcost.reports.drawings.charts import ticks
from skipcost.reports.findings import FINDERS, find, rank_correlation, rewriting_measured, rewriting_saves
from skipcost.reports.page import render
from skipcost.unet_models import ModelSpec

GOLDEN = TESTS / "golden" / "reports_findings.txt"
NUMBERS = st.integers(-4, 4).map(float)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The small store as the report reads it."""
    return load(make_store(tmp_path_factory.mktemp("findings") / "tiny.sqlite"))


@pytest.fixture(scope="module")
def told(data: Data) -> list[str]:
    """Every finding of the small store as text."""
    return [finding.text for finding in find(data)]


def _macs(label: str) -> int:
    return ModelSpec.parse(label).graph().conv_macs(64, 64)


def _ratios(top: str, bottom: str) -> list[float]:
    cells = [(depth, width) for depth in (2, 3) for width in (8, 12, 16)]
    return [_macs(top.format(d=d, w=w)) / _macs(bottom.format(d=d, w=w)) for d, w in cells]


def test_findings_equal_the_golden_file(told: list[str]) -> None:
    """The words of a fixed store are fixed; SKIPCOST_UPDATE_GOLDEN=1 rewrites them after a change."""
    text = "\n".join(told) + "\n"
    if os.environ.get("SKIPCOST_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)

    assert text == GOLDEN.read_text()


def test_a_variants_macs_are_the_median_of_matched_cells(told: list[str]) -> None:
    """UNet 3+ over U-Net with the papers' own skips, from the graphs."""
    ratios = _ratios("unet3+/d{d}/w{w}/concat", "unet/d{d}/w{w}/concat")
    low, high = times(min(ratios)), times(max(ratios))
    expected = f"{times(statistics.median(ratios))} ({low} to {high}) [counted] the MACs"

    sentence = next(text for text in told if text.startswith("Variants: UNet 3+"))

    assert expected in sentence
    assert "(6 pairs)" in sentence


def test_skips_cost_is_concat_over_none(told: list[str]) -> None:
    """The skips of UNet++ against UNet++ without any, which is U-Net without any."""
    ratios = _ratios("unet++/d{d}/w{w}/concat", "unet/d{d}/w{w}/none")

    text = next(text for text in told if text.startswith("What skips cost"))
    sentence = text.partition("UNet++ takes ")[2].partition("UNet 3+")[0]

    assert (
        f"{times(statistics.median(ratios))} ({times(min(ratios))} to {times(max(ratios))}) [counted] the MACs"
        in sentence
    )


def test_doubling_the_width_is_measured_on_pairs_of_networks(told: list[str]) -> None:
    """Width 16 over width 8, every network once, aliases left out."""
    names = [
        f"{variant}/d{depth}/w{{w}}/{skip}"
        for variant in ("unet", "unet++", "unet3+")
        for depth in (2, 3)
        for skip in ("concat", "sum", "none")
        if (variant, skip) != ("unet++", "none")
    ]
    ratios = [_macs(name.format(w=16)) / _macs(name.format(w=8)) for name in names]

    sentence = next(text for text in told if text.startswith("Growth: Twice the width"))

    assert (
        f"{times(statistics.median(ratios))} ({times(min(ratios))} to {times(max(ratios))}) [counted] the MACs"
        in sentence
    )
    assert f"{len(names)} pairs" in sentence


def test_no_sentence_rests_on_a_doubtful_or_failed_latency(told: list[str]) -> None:
    """The doubtful latency is 1000 s; made-up latencies grow with MACs alone, so without it the ranks agree."""
    latency = next(text for text in told if text.startswith("What latency follows"))

    assert "1.00 [measured] with convolution MACs" in latency
    assert f"{54 - 6 - 2} networks without a doubt" in latency
    assert not any("1.00e" in text or "16 min" in text for text in told)
    assert DOUBTFUL != FAILED


def test_the_dearest_edge_holds_the_share_that_is_told(told: list[str]) -> None:
    """From the convolutions of the graph: an edge's own and its slice of the one that it feeds."""
    spec = ModelSpec.parse("unet3+/d3/w16/concat")
    shares = []
    for node in spec.graph().nodes:
        area = (64 >> node.level) ** 2
        for edge in node.inputs:
            own = sum(conv.weights for conv in edge.convs if not conv.transposed)
            shares.append((own + 9 * edge.out_channels * node.convs[0].out_channels) * area)

    sentence = next(text for text in told if text.startswith("Where the cost is"))

    assert spec.label in sentence
    assert f"{max(shares) / _macs(spec.label):.1%} [counted] of all MACs" in sentence


def test_findings_are_few_and_each_leads_to_its_numbers(data: Data) -> None:
    """At most eight, and every anchor is in the page."""
    found = find(data)

    page = Page()
    page.feed(render(data))

    assert 1 < len(found) <= 8
    assert {finding.anchor for finding in found} <= set(page.ids)
    assert {f"#{finding.anchor}" for finding in found} <= set(page.addresses)


@pytest.mark.parametrize("finder", FINDERS, ids=lambda finder: finder.__name__)
def test_a_finding_without_its_rows_does_not_appear(finder: object, tmp_path: Path) -> None:
    """A store of a single failed result supports no sentence about costs."""
    from skipcost.bench.cases.case import Case  # noqa: PLC0415
    from skipcost.bench.cases.record import Result  # noqa: PLC0415
    from skipcost.bench.store.store import create_store  # noqa: PLC0415

    with create_store(tmp_path / "one.sqlite") as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "one", 0, {"fingerprint": "here"})
        store.add_case(Case(), [])
        store.add_result(run, Case().case_id, Result("latency_s", "crash", note="it fell"))

    assert callable(finder)
    assert list(finder(load(tmp_path / "one.sqlite"))) == []


def test_exact_algebra_is_counted_from_the_graphs(data: Data) -> None:
    """What is left of UNet 3+'s MACs with the papers' own skips."""
    graphs = {label: ModelSpec.parse(label).graph() for label in
              (f"unet3+/d{depth}/w{width}/concat" for depth in (2, 3) for width in (8, 12, 16))}  # fmt: skip

    shares = [executed_macs(graph, 64, 64) / graph.conv_macs(64, 64) for graph in graphs.values()]
    less = [share for share in shares if share < 1]

    found = next(finding.text for finding in rewriting_saves(data))

    low, high = times(min(less)), times(max(less))
    assert f"UNet 3+ {times(statistics.median(less))} ({low} to {high}) [counted] ({len(less)} networks)" in found


def test_both_backends_in_one_store_are_compared(tmp_path: Path) -> None:
    """Rows that differ in the backend alone are pairs; one without its partner is none."""
    with create_store(make_store(tmp_path / "tiny.sqlite")) as store:
        run = store.runs()[-1].run_id
        for case_id, (case, _) in list(store.cases().items()):
            measured = store.results("here").get(case_id, {}).get("latency_s")
            if case.spec.variant == "unet3+" and measured and measured.samples and case.spec.label != DOUBTFUL:
                other = replace(case, backend="rewritten")
                store.add_case(other, [])
                store.add_result(run, other.case_id, replace(measured, samples=tuple(s / 2 for s in measured.samples)))
        count = sum(case.backend == "rewritten" for case, _ in store.cases().values())

    (found,) = rewriting_measured(load(tmp_path / "tiny.sqlite"))

    assert count > 5
    assert f"UNet 3+ takes {times(0.5)} [measured] the latency ({count} pairs)." in found.text


def test_every_number_says_where_it_comes_from(told: list[str]) -> None:
    """A ratio or a percentage in a sentence is followed by counted, predicted or measured."""
    for text in told:
        sentence = text.rpartition(" (")[0]
        bare = re.sub(r"[\d.]+\S*( \([^)]*\))? \[(counted|predicted|measured)\]", "", sentence)
        assert not re.search(rf"\d[{TIMES}%]", bare), text


def test_rank_correlation_equals_the_textbook() -> None:
    """1 - 6 * sum of squared rank differences / (n (n^2 - 1)) where no ranks are tied."""
    import pandas as pd  # noqa: PLC0415

    left, right = pd.Series([1.0, 2.0, 3.0, 4.0]), pd.Series([10.0, 30.0, 20.0, 90.0])

    assert rank_correlation(left, right) == pytest.approx(1 - 6 * 2 / (4 * 15))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    """No point on the front is beaten, and every other one is."""
    kept = set(front([cost for cost, _ in points], [gain for _, gain in points]))

    for at, (cost, gain) in enumerate(points):
        beaten = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        assert (at in kept) is not beaten


@given(
    st.floats(1e-6, 1e12), st.floats(1.5, 1e6), st.sampled_from(sorted({metric.unit for metric in METRICS.values()}))
)
def test_ticks_lie_inside_and_are_few(low: float, factor: float, unit: str) -> None:
    """An axis is never crowded, and no tick is off it."""
    found = ticks(low, low * factor, unit)

    assert len(found) <= 5
    assert all(low <= tick <= low * factor for tick in found)
    assert found == sorted(found)
