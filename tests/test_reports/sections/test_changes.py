"""The section on changes: verdicts in files, those that fail first, latencies with intervals, the self-test's table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from small_store import make_store

from skipcost.bench.compare.ab import Rules
from skipcost.bench.compare.self_test import SLOWDOWNS, finding, to_json
from skipcost.bench.compare.verdicts import VERDICTS, Verdict, read_json
from skipcost.bench.compare.verdicts import to_json as verdicts_json
from skipcost.bench.errors import BenchError
from skipcost.reports.data import Data, load
from skipcost.reports.page import render_section
from skipcost.reports.sections import SECTIONS
from skipcost.reports.sections import changes as regressions
from skipcost.reports.sections.changes import regressions_context

EXACT = (
    Verdict("unet <b>", "params", "unchanged", 100, 100),
    Verdict("unet <b>", "operators", "regressed", 100, 104, "aten.clone.default +4"),
    Verdict("unet <b>", "conv_macs", "improved", 2000, 1000, "x0_1 -1,000"),
    Verdict("other", "conv_macs", "missing", 2000, None, "the whole case"),
)
CHANGES = next(section for section in SECTIONS if section.name == "regressions")
COUNTED = Verdict("forward", "operators", "improved", 100, 90, "", 0.9, (0.89, 0.91))
TIMED = (
    Verdict("unet training", "latency_s", "regressed", 0.1, 0.12, "by profiles", 1.2, (1.15, 1.25)),
    Verdict("unet inference", "latency_s", "inconclusive", 0.1, 0.15, "noise", 1.5, (0.9, 2.4)),
    Verdict("unet++ inference", "latency_s", "unchanged", 0.1, 0.1, "", 1.001, (0.99, 1.01)),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A store, and two files of verdicts."""
    folder = tmp_path_factory.mktemp("changes")
    made = folder / "tiny.sqlite", folder / "gate.json", folder / "ab.json"
    make_store(made[0])
    for path, verdicts in zip(made[1:], (EXACT, TIMED), strict=True):
        path.write_text(json.dumps(verdicts_json(verdicts)))
    return made


@pytest.fixture(scope="module")
def data(files: tuple[Path, Path, Path]) -> Data:
    """The store with the verdicts of both files."""
    return load(files[0], verdicts=files[1:])


def test_verdicts_come_back_from_their_file(files: tuple[Path, Path, Path]) -> None:
    """What a comparison prints as JSON is read as it was."""
    assert tuple(read_json(files[1])) == EXACT
    assert tuple(read_json(files[2])) == TIMED


def test_what_fails_comes_first_and_what_stayed_the_same_is_counted_only(data: Data) -> None:
    """Missing before measured before small; every row says where the change comes from."""
    context = regressions_context(data)

    rows = [(row[0].text, row[1].text, row[5].text, row[6].text) for row in context["notable"].rows]
    assert [row[2] for row in rows] == ["missing", "improved", "regressed", "regressed", "inconclusive"]
    assert rows[3] == ("unet <b>", "operators", "regressed", "aten.clone.default +4")
    assert context["fails"] == 4
    assert context["sentence"].startswith("7 numbers of 5 cases: 2 unchanged")
    assert [word for word, _ in context["meanings"]] == list(dict.fromkeys(row[2] for row in rows))
    assert all(meaning == VERDICTS[word] for word, meaning in context["meanings"])


def test_latencies_are_drawn_with_their_intervals(data: Data) -> None:
    """One line for each that was measured, whatever its verdict."""
    plot = regressions_context(data)["plot"]

    drawn = regressions_context(replace(data, verdicts=(*data.verdicts, COUNTED)))["plot"]

    assert drawn == plot
    assert [(row[0].text, row[1].order) for row in plot.table.rows] == [(each.case, each.ratio) for each in TIMED]
    assert "+20.0% [+15.0%, +25.0%]" in plot.table.rows[0][1].text
    assert all(each.case in plot.svg for each in TIMED)


def test_the_section_shows_them_escaped(data: Data) -> None:
    """Names of cases are text, and what stands around them stays well formed."""
    text = render_section(CHANGES, data)

    page = Page()
    page.feed(text)
    assert page.wrong == []
    assert "unet &lt;b&gt;" in text
    assert "+4.00%" in text
    assert "aten.clone.default +4" in text


def test_without_verdicts_the_section_says_how_to_get_some(files: tuple[Path, Path, Path]) -> None:
    """No file, no claim."""
    context = regressions_context(load(files[0]))

    assert not context["given"]
    assert context["plot"] is None
    assert "No verdicts were given" in render_section(CHANGES, load(files[0]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read .*No such file"),
        ("", "holds no verdicts"),
        ("[]", "holds no verdict at all"),
        ('{"a": 1}', "holds no verdicts"),
        ('[{"case": "a"}]', "holds no verdicts"),
        ('[{"case": "a", "metric": "params", "verdict": "fine", "interval": null}]', "'fine' is unknown"),
    ],
)
def test_a_file_without_verdicts_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    """One sentence that names the file and what is read."""
    path = tmp_path / "gate.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(BenchError, match=words):
        read_json(path)


def test_the_self_tests_table_is_that_of_the_file(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slowdown with its trials, share and interval, on the machine that is named."""
    found = [finding(slowdown, [["regressed", "unchanged"]] * 3, 60.0) for slowdown in SLOWDOWNS]
    stored: dict[str, Any] = to_json(found, (), Rules())
    monkeypatch.setattr(regressions, "SELF_TEST", tmp_path / "self-test.json")
    absent = regressions_context(data)["self_test"]
    (tmp_path / "self-test.json").write_text(json.dumps(stored))

    shown = regressions_context(data)["self_test"]

    assert absent is None
    assert [row[0].text for row in shown["table"].rows] == ["equal code", "+3%", "+5%", "+10%", "+20%"]
    assert [row[1].text for row in shown["table"].rows] == ["3 of 3 runs", *["3 of 6 cases"] * 4]
    assert [row[4].text for row in shown["table"].rows] == ["10 s"] * 5
    assert stored["cpu"] in shown["machine"]
