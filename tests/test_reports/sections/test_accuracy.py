"""The report's section on predicted GPU memory says what the command says, or plainly that nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import ENVIRONMENT

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.predictions.accuracy import NOT_MEASURED, PAIRS
from skipcost.bench.store.store import create_store
from skipcost.reports.data import load
from skipcost.reports.page import render_section
from skipcost.reports.sections import SECTIONS
from skipcost.reports.sections.accuracy import accuracy_context
from skipcost.unet_models import ModelSpec

ACCURACY = next(section for section in SECTIONS if section.name == "accuracy")
CARD = "A pretended GPU"


def make_store(path: Path, *, gpu: bool) -> Path:
    """Two networks under an older environment of a card, and under the newest, which has the card's figures or not."""
    with create_store(path) as store:
        for day, fingerprint in (("01", "old"), ("02", "new")):
            facts = ENVIRONMENT | {"fingerprint": fingerprint, "gpus": [{"name": CARD}]}
            run = store.add_run(f"2026-01-{day}T00:00:00+00:00", "memory", 0, facts)
            for width, predicted in ((8, 104.0), (16, 90.0), (32, 100.0)):
                case = Case(spec=ModelSpec(width=width), device="cuda")
                store.add_case(case, [])
                store.add_result(run, case.case_id, Result("params", samples=(case.graph().params(),)))
                for metric, name in PAIRS.items() if gpu or fingerprint == "old" else ():
                    claim = {"low": predicted, "high": predicted + 5}
                    store.add_result(run, case.case_id, Result(name, samples=(predicted,), detail=claim))
                    died = Result(metric, "out_of_memory", note="too large")
                    store.add_result(run, case.case_id, died if width == 32 else Result(metric, samples=(100.0,)))
    return path


def test_without_gpu_rows_the_section_says_so(tmp_path: Path) -> None:
    """The newest environment has no figure of a card: the page names the sweep that measures one, and no number."""
    data = load(make_store(tmp_path / "x.sqlite", gpu=False))

    shown = accuracy_context(data)

    assert shown["why_none"] == NOT_MEASURED
    assert shown["table"].rows == ()
    assert "skipcost sweep memory" in render_section(ACCURACY, data)


@pytest.mark.parametrize(("at", "metric"), list(enumerate(PAIRS)))
def test_every_figure_has_its_errors(tmp_path: Path, at: int, metric: str) -> None:
    """Of 4 % over and 10 % under the table has the mean, the worst, the share under and the share inside."""
    data = load(make_store(tmp_path / "x.sqlite", gpu=True))

    row = [cell.text for cell in accuracy_context(data)["table"].rows[at]]

    assert row[:8] == [METRICS[metric].title, "2", "2", "7.0%", "-10.0%", "50%", "10.0%", "0%"]


def test_it_shows_card_errors_and_the_rows_furthest_off(tmp_path: Path) -> None:
    """The worst row comes first, with its interval beside what was measured."""
    data = load(make_store(tmp_path / "x.sqlite", gpu=True))

    context, section = accuracy_context(data), render_section(ACCURACY, data)

    assert [cell.text for cell in context["worst"].rows[0]][2:] == ["90 B", "90 B", "95 B", "100 B", "-10.0%"]
    assert context["worst"].rows[0][0].text.startswith("unet/d4/w16/concat")
    assert CARD in section
    assert "-10.0%" in section
    assert [[cell.text for cell in row] for row in context["left_out"].rows] == [
        [str(len(PAIRS)), "measured: out_of_memory"]
    ]
