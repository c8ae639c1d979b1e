"""The page as a file: complete, self-contained, the same every time, and never half written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from html_page import Page
from small_store import EVIL, FAILED, make_store

from skipcost.bench.cli import guarded
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import create_store
from skipcost.reports.__main__ import app
from skipcost.reports.data import load
from skipcost.reports.page import write_report
from skipcost.reports.sections import SECTIONS
from skipcost.reports.sections.curves import tradeoff_context
from skipcost.reports.sections.rows import rows_context

COMMAND = (
    "import sys; from skipcost.reports.__main__ import app; sys.argv = ['report', *sys.argv[1:]]; "
    "app(standalone_mode=False); print('torch' in sys.modules)"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small store."""
    return make_store(tmp_path_factory.mktemp("page") / "tiny.sqlite")


@pytest.fixture(scope="module")
def text(store: Path) -> str:
    """The report of the small store."""
    write_report(store, store.with_suffix(".html"))
    return store.with_suffix(".html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    """The report, parsed."""
    parsed = Page()
    parsed.feed(text)
    return parsed


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["skipcost report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        guarded(app)
    return int(stopped.value.code or 0)


def test_a_fresh_process_writes_the_same_bytes_and_never_imports_torch(store: Path, text: str, tmp_path: Path) -> None:
    """Another process, another hash seed, another folder: the same file; and a report needs no torch."""
    output = tmp_path / "again.html"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}

    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(store), "-o", str(output)],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip

    assert output.read_text() == text
    assert done.stdout.strip() == "False"


def test_nothing_is_loaded_from_anywhere(text: str, page: Page) -> None:
    """Every address is an anchor in the page, and no style sheet reaches out."""
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttpRequest", text)
    assert "link" not in page.tags


def test_the_page_is_well_formed(page: Page) -> None:
    """Every tag is closed where it should be, every id is there once, every anchor has its target."""
    assert page.wrong == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if len(address) > 1} <= set(page.ids)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_section_is_there_and_in_the_navigation(section: object, text: str) -> None:
    """A row of SECTIONS is a section of the page."""
    name, title = (getattr(section, key) for key in ("name", "title"))

    assert f'<section id="{name}"' in text
    assert f'<h2 id="{name}-title">{title}</h2>' in text
    assert f'<a href="#{name}">' in text


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_explained(name: str, text: str) -> None:
    """A metric without an explanation is a number without a meaning."""
    explained = text.partition('<section id="metrics"')[2]

    assert f"<small>{name}</small>" in explained


def test_every_drawing_has_a_title_and_a_description(text: str) -> None:
    """A reader who cannot see a figure is told what it shows."""
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)

    assert len(drawings) >= 4 + 3 * 3
    for drawing in drawings:
        name = re.search(r'aria-labelledby="(\S+)-title', drawing)
        assert name
        assert re.search(rf'<title id="{name[1]}-title">[^<]+</title><desc id="{name[1]}-desc">[^<]+</desc>', drawing)


def test_every_figure_has_a_caption_and_its_numbers(text: str) -> None:
    """A figure without a table cannot be checked."""
    found = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)

    assert found
    assert all("<figcaption>" in each and "<table" in each.partition("<details>")[2] for each in found)


def test_a_failure_is_shown_with_its_reason_and_escaped(text: str) -> None:
    """The note of the failed result is text, not markup."""
    failures = text.partition('<section id="failures"')[2].partition("</section>")[0]

    assert FAILED in failures
    assert "out_of_memory" in failures
    assert "&lt;script&gt;alert(&#39;note&#39;)&lt;/script&gt;" in failures
    assert EVIL not in text


def test_the_doubts_are_told_at_the_top(text: str) -> None:
    """A reader sees what not to trust before the first number."""
    head = text.partition('<section id="overview"')[0]

    assert "noisy: the median is known to" in head
    assert "Left out: 1 row of other environments, which cannot be compared." in head
    assert "not committed" in head


def test_the_report_carries_its_rows(text: str, store: Path) -> None:
    """The embedded JSON has every result of the environment, raw samples and all."""
    block = re.search(r'<script type="application/json" id="raw">(.*?)</script>', text, flags=re.DOTALL)
    assert block

    carried = json.loads(block[1])["cases"]

    data = load(store)
    assert {case: set(found["results"]) for case, found in carried.items()} == {
        case: set(found) for case, found in data.results.items()
    }
    assert carried[min(carried)]["results"]["params"]["samples"] == list(data.results[min(carried)]["params"].samples)


def test_numbers_sort_by_their_base_value(store: Path) -> None:
    """800 M is less than 1.2 G although its text is more."""
    data = load(store)

    table = rows_context(data)["table"]

    at = table.columns.index("convolution MACs")
    own = data.frame[data.frame["same_as"] == ""]
    assert [row[at].order for row in table.rows] == own["conv_macs"].tolist()


def test_the_colours_can_be_told_from_the_paper(text: str) -> None:
    """Lines have a contrast of 3:1, texts of 4.5:1, in light and in dark."""
    for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)[:2]:
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
        for name in ("c1", "c2", "c3", "c4", "c5", "c6", "faint"):
            assert _contrast(colours[name], colours["paper"]) >= 3, name
        for name in ("ink", "soft", "warn"):
            assert _contrast(colours[name], colours["paper"]) >= 4.5, name


def _contrast(left: str, right: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(left), luminance(right)))
    return (high + 0.05) / (low + 0.05)


def test_scores_are_drawn_and_unknown_labels_named(store: Path, tmp_path: Path) -> None:
    """Seeds become a mean and a range; a label that the store does not have is told."""
    scores = tmp_path / "scores.csv"
    scores.write_text(
        "label,score,seed\nunet/d2/w8/sum,0.8,0\nunet/d2/w8/sum,0.9,1\nunet++/d2/w8/none,0.7,0\nnope,1,0\n"
    )

    context = tradeoff_context(load(store, scores))

    plot = next(each for each in context["plots"] if each.name == "score")
    assert [row[0].text for row in plot.table.rows] == ["unet/d2/w8/sum", "unet++/d2/w8/none"]
    assert plot.table.rows[0][-3].text == "0.8500 (0.8000 to 0.9000)"
    assert context["quality"].unknown == ("nope",)


BAD_SCORES = {
    "label;score\nunet/d2/w8/sum;1\n": "required: label and score",
    "label,score\n": "has no scores",
    "label,score\nunet/d2/w8/sum,good\n": "line 2 of .* has the score 'good', which is not a number",
    "label,score\nunet/d2/w8/sum,nan\n": "not a number",
    "": "cannot read the quality scores",
}


@pytest.mark.parametrize("content", BAD_SCORES)
def test_bad_scores_are_refused_and_the_old_report_stays(
    content: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2, and what was at the output is untouched."""
    output, scores = tmp_path / "old.html", tmp_path / "scores.csv"
    output.write_text("old")
    scores.write_text(content)

    code = _run(monkeypatch, store, "-o", output, "--quality", scores)

    assert code == 2
    assert re.search(BAD_SCORES[content], capsys.readouterr().err)
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [output, scores]


def test_a_missing_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the file that is not there."""
    code = _run(monkeypatch, tmp_path / "none.sqlite", "-o", tmp_path / "r.html")

    assert code == 2
    assert f"there is no store at {tmp_path / 'none.sqlite'}" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("with_run", [False, True], ids=["no run", "no result"])
def test_an_empty_store_is_refused(
    with_run: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A report of nothing would look like a finding."""
    with create_store(tmp_path / "empty.sqlite") as opened:
        if with_run:
            opened.add_run("2026-01-01T00:00:00+00:00", "tiny", 0, {"fingerprint": "here"})

    code = _run(monkeypatch, tmp_path / "empty.sqlite", "-o", tmp_path / "r.html")

    assert code == 2
    assert re.search("holds no (run|result)", capsys.readouterr().err)


@pytest.mark.parametrize("where", ["", "file/x.html"], ids=["a folder", "below a file"])
def test_an_output_that_cannot_be_written_is_refused(
    where: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is drawn, with what to do instead."""
    (tmp_path / "file").write_text("mine")

    code = _run(monkeypatch, store, "-o", tmp_path / where)

    assert code == 2
    assert re.search("(is a folder|Not a directory).*name another file with -o", capsys.readouterr().err)


def test_a_write_that_fails_leaves_the_old_report(
    store: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new file takes the old one's place when it is complete, or not at all."""
    output = tmp_path / "old.html"
    output.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipcost.reports.page.render", lambda _: text)
    monkeypatch.setattr(Path, "replace", full)

    code = _run(monkeypatch, store, "-o", output)

    assert code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
