"""Predicted against measured: errors by hand, what is left out and why, and where the table goes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import invoke_cli
from places import ROOT

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import OUTCOMES, Result
from skipcost.bench.commands.accuracy import BEGIN, END, markdown, write_between
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import MEASURED, METRICS, PREDICTED
from skipcost.bench.predictions.accuracy import AIM_NETWORKS, NOT_MEASURED, PAIRS, Accuracy, accuracy_of_store
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.sweeps.plan import load_plan
from skipcost.unet_models import ModelSpec

CARD = "A pretended GPU"
METRIC = "peak_memory_allocated_bytes"
GIB = 1 << 30


def pair(metric: str, predicted: float, measured: float, slack: float = 0.05) -> tuple[Result, Result]:
    """A prediction that claims `slack` either way, and a measurement."""
    claim = {"low": predicted * (1 - slack), "high": predicted * (1 + slack)}
    return Result(PAIRS[metric], samples=(predicted,), detail=claim), Result(metric, samples=(measured,))


def fill(path: Path, rows: dict[int, tuple[Result, ...]], fingerprint: str = "gpu", card: str = CARD) -> Path:
    """A store of pretended GPU rows: the results of one network per width."""
    environment = {"fingerprint": fingerprint, "gpus": [{"name": card}]}
    with create_store(path) as store:
        run = store.add_run("2026-01-02T03:04:05+00:00", "memory", 0, environment)
        for width, results in rows.items():
            case = Case(spec=ModelSpec(width=width), device="cuda")
            store.add_case(case, [])
            for result in results:
                store.add_result(run, case.case_id, result)
    return path


def read(path: Path) -> Accuracy:
    """What the store's rows compare to."""
    with open_store(path) as store:
        return accuracy_of_store(store)


def run(*words: str) -> str:
    """Run the command and return what it prints."""
    result = invoke_cli(["accuracy", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("measured", "predicted"), PAIRS.items())
def test_every_pair_is_a_measurement_and_a_prediction_of_the_same_unit(measured: str, predicted: str) -> None:
    """The pairs are made from the table of metrics, so that a new figure is compared without being asked."""
    assert METRICS[measured].origin == MEASURED
    assert METRICS[predicted].origin == PREDICTED
    assert METRICS[measured].unit == METRICS[predicted].unit == "bytes"
    assert METRICS[measured].devices == METRICS[predicted].devices == ("cuda",)


def test_errors_are_worked_out_as_by_hand(tmp_path: Path) -> None:
    """Of 4 % over, 10 % under and exact: mean 4.67 %, worst and most under 10 %, a third under, two thirds inside."""
    path = fill(
        tmp_path / "x.sqlite",
        {8: pair(METRIC, 104, 100), 16: pair(METRIC, 90, 100), 32: pair(METRIC, 100, 100)},
    )

    (found,) = read(path).summaries()

    assert (found.device, found.metric, found.rows, found.networks) == (CARD, METRIC, 3, 3)
    assert found.mean == pytest.approx(0.14 / 3)
    assert found.worst == pytest.approx(-0.1)
    assert found.most_under == pytest.approx(0.1)
    assert found.under == pytest.approx(1 / 3)
    assert found.inside == pytest.approx(2 / 3)
    assert [each.case.spec.width for each in read(path).worst(2)] == [16, 8]


def test_a_prediction_that_is_always_over_is_never_under(tmp_path: Path) -> None:
    """Being over does not count as being under by a negative amount."""
    (found,) = read(fill(tmp_path / "x.sqlite", {8: pair(METRIC, 110, 100)})).summaries()

    assert (found.under, found.most_under) == (0, 0)
    assert found.worst == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ([0.02] * AIM_NETWORKS, "met"),
        ([0.02] * (AIM_NETWORKS - 1), f"too few networks: {AIM_NETWORKS} are needed"),
        ([0.031] * AIM_NETWORKS, "missed"),  # the mean
        ([0.0] * (AIM_NETWORKS - 1) + [0.09], "missed"),  # the worst
        ([0.0] * (AIM_NETWORKS - 1) + [-0.03], "missed"),  # under
        ([0.0] * (AIM_NETWORKS - 1) + [-0.019], "met"),
    ],
)
def test_the_aim_is_mean_worst_and_under_over_enough_networks(
    tmp_path: Path, errors: list[float], verdict: str
) -> None:
    """Each of the four conditions alone decides."""
    rows = {width: pair(METRIC, 1000 * (1 + error), 1000) for width, error in enumerate(errors, start=1)}

    (found,) = read(fill(tmp_path / "x.sqlite", rows)).summaries()

    assert found.verdict == verdict


def unusable() -> Iterator[tuple[tuple[Result, ...], str]]:
    """Rows with a measured figure that cannot be compared, and the reason."""
    predicted, measured = pair(METRIC, 100, 100)
    for outcome in sorted({*OUTCOMES} - {"ok", "unsupported"}):
        yield (predicted, replace(measured, outcome=outcome)), f"measured: {outcome}"
    for value in (math.nan, math.inf, 0.0):
        yield (predicted, replace(measured, samples=(value,))), "measured: no number above 0"
        yield (replace(predicted, samples=(value,)), measured), "predicted: no interval of numbers above 0"
    yield (predicted, replace(measured, samples=())), "measured: no number above 0"
    yield (replace(predicted, detail={}), measured), "predicted: no interval of numbers above 0"
    unknown = Result(PAIRS[METRIC], "unsupported", note="no such card")
    yield (unknown, measured), "predicted: unsupported, no such card"
    yield (measured,), "no prediction beside it: sweep again with this version of skipcost"


@pytest.mark.parametrize(("results", "reason"), list(unusable()))
def test_what_cannot_be_compared_is_counted_by_its_reason(
    tmp_path: Path, results: tuple[Result, ...], reason: str
) -> None:
    """Failed, missing and not-a-number sides make no comparison, and are not left out in silence."""
    found = read(fill(tmp_path / "x.sqlite", {8: results, 16: pair(METRIC, 100, 100)}))

    assert len(found.comparisons) == 1
    assert found.left_out == {reason: 1}


def test_a_network_counts_once_however_often_it_was_measured(tmp_path: Path) -> None:
    """Two batches of one network are two rows and one network; what failed in two environments failed twice."""
    path = fill(tmp_path / "x.sqlite", {8: pair(METRIC, 100, 100), 16: (Result(METRIC, "crash"),)})
    fill(path, {16: (Result(METRIC, "crash"),)}, "other")
    with create_store(path) as store:
        run = store.add_run("2026-01-03T00:00:00+00:00", "memory", 0, {"fingerprint": "gpu", "gpus": [{"name": CARD}]})
        twice = Case(spec=ModelSpec(width=8), device="cuda", batch=2)
        store.add_case(twice, [])
        for result in pair(METRIC, 100, 100):
            store.add_result(run, twice.case_id, result)

    found = read(path)

    assert [(each.rows, each.networks) for each in found.summaries()] == [(2, 1)]
    assert found.left_out == {"measured: crash": 2}


def test_nothing_is_compared_across_environments(tmp_path: Path) -> None:
    """A prediction made on one machine says nothing of a measurement on another; each card has its own rows."""
    predicted, measured = pair(METRIC, 100, 50)
    path = fill(tmp_path / "x.sqlite", {8: (predicted,)}, "here")
    fill(path, {8: (measured,)}, "there", "another GPU")
    fill(path, {8: pair(METRIC, 100, 100)}, "both", "a third GPU")

    found = read(path)

    assert [(each.device, each.error) for each in found.comparisons] == [("a third GPU", 0)]
    assert list(found.left_out.values()) == [1]


@pytest.mark.parametrize("results", [(), (Result(METRIC, "unsupported", note="measured on a GPU only"),)])
def test_without_a_gpu_row_nothing_is_invented(tmp_path: Path, results: tuple[Result, ...]) -> None:
    """The command says plainly that nothing was measured, and does not fail."""
    path = fill(tmp_path / "x.sqlite", {8: (Result("params", samples=(1,)), *results)})

    assert run(str(path)).strip() == NOT_MEASURED
    assert json.loads(run(str(path), "--json"))["figures"] == []
    assert markdown(read(path), "From x.") == "Not measured yet: no GPU row in this store."


def test_the_table_names_errors_cards_and_the_rows_furthest_off(tmp_path: Path) -> None:
    """People see the figures in words, programs get them as numbers."""
    path = fill(tmp_path / "x.sqlite", {8: pair(METRIC, 1.1 * GIB, GIB), 16: pair(METRIC, GIB, GIB)})

    shown, data = run(str(path)), json.loads(run(str(path), "--json"))

    assert CARD in shown
    assert "too few networks" in shown
    assert shown.index("unet/d4/w8/concat") < shown.index("unet/d4/w16/concat")
    assert "1.10 GiB (1.04 GiB to 1.16 GiB)" in shown
    assert "+10.0%" in shown
    assert data["figures"][0]["mean"] == pytest.approx(0.05)
    assert data["worst"][0]["measured"] == GIB


def test_the_table_is_put_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    """Writing twice changes nothing more, and the text around stays."""
    path = fill(tmp_path / "x.sqlite", {8: pair(METRIC, 104, 100)})
    page = tmp_path / "method.md"
    page.write_text(f"# Method\n{BEGIN}\nold\n{END}\nrest\n")

    run(str(path), "--write", str(page))
    once = page.read_text()
    run(str(path), "--write", str(page))

    assert page.read_text() == once
    assert once.startswith(f"# Method\n{BEGIN}\nFrom x.sqlite (memory of 2026-01-02, environment gpu).\n")
    assert once.endswith(f"{END}\nrest\n")
    assert "| A pretended GPU | allocated memory | 1 | 1 | 4.0% | +4.0% |" in once
    assert "old" not in once


@pytest.mark.parametrize(
    "content", ["no marker\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"]
)
def test_a_page_without_one_pair_of_markers_is_left_alone(tmp_path: Path, content: str) -> None:
    """One sentence says what is missing, and the file keeps every byte."""
    page = tmp_path / "method.md"
    page.write_text(content)

    with pytest.raises(BenchError, match="has no line <!-- accuracy: begin --> followed by one"):
        write_between(page, "table")

    assert page.read_text() == content


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A missing file is a sentence, not a traceback."""
    with pytest.raises(BenchError, match=r"cannot write .*nowhere\.md"):
        write_between(tmp_path / "nowhere.md", "table")


@pytest.mark.sources
def test_the_method_page_has_a_place_for_the_table() -> None:
    """`--write docs/method.md` finds its markers."""
    page = ROOT / "docs" / "method.md"

    assert page.read_text().count(f"{BEGIN}\n") == page.read_text().count(f"{END}\n") == 1


def test_the_sweep_of_memory_has_enough_networks_and_both_sides_of_every_pair() -> None:
    """`skipcost sweep memory` on a GPU fills what the aim asks for."""
    plan = load_plan("memory", {}, "cpu", 1)

    assert plan.left_out == {}
    assert len({planned.case.spec for planned in plan.cases}) >= AIM_NETWORKS
    assert {planned.case.device for planned in plan.cases} == {"cuda"}
    for planned in plan.cases:
        assert {*PAIRS, *PAIRS.values()} <= set(planned.metrics)
