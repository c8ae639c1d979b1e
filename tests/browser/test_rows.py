"""The table of all rows: what has no figure is last, figures filter it, and its first column stays."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from live_page import LivePage
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from small_store import FAILED

from skipcost.reports.data import load

LATENCIES = """
const heads = [...document.querySelectorAll("#all-rows thead th")];
const at = heads.findIndex((head) => head.textContent.startsWith("latency"));
const rows = [...document.querySelectorAll("#all-rows tbody tr")];
return rows.map((row) => [row.dataset.label, row.cells[at].dataset.order]);
"""


@pytest.fixture
def page(browser: Chrome, address: str) -> LivePage:
    """The report, freshly opened."""
    return LivePage(browser, address)


@pytest.fixture(scope="module")
def everything(store: Path) -> pd.DataFrame:
    """All rows as Python has them."""
    return load(store).everything()


def _sort_by_latency(page: LivePage) -> list[list[str]]:
    page.js(
        "[...document.querySelectorAll('#all-rows thead th')].find((head) => head.textContent.startsWith('latency'))"
        ".querySelector('.dt-column-order').click()"
    )
    return list(page.js(LATENCIES))


def test_rows_without_a_figure_are_last_either_way(page: LivePage, everything: pd.DataFrame) -> None:
    """Training was not timed, and one latency failed: these follow the smallest and the largest alike."""
    known = int(everything["latency_s"].notna().sum())

    ups, downs = _sort_by_latency(page), _sort_by_latency(page)

    for rows in (ups, downs):
        assert all(order for _, order in rows[:known])
        assert not any(order for _, order in rows[known:])
    figures = [float(order) for _, order in ups[:known]]
    assert figures == pytest.approx(sorted(map(float, everything["latency_s"].dropna())))
    assert [float(order) for _, order in downs[:known]] == figures[::-1]
    assert FAILED in [label for label, _ in ups[known:]]


def test_figures_filter_the_table(page: LivePage, everything: pd.DataFrame) -> None:
    """Limits with units on several columns at once; a row without the figure is not shown."""
    wanted = everything[(everything["latency_s"] < 0.1) & (everything["params"] >= 50_000)]
    page.part("figures-only").send_keys("latency < 100ms, Parameters >= 50k")

    found = [label for label, _ in page.js(LATENCIES)]

    assert 0 < len(found) < len(everything)
    assert sorted(found) == sorted(wanted["label"])
    assert page.text("figures-told") == ""


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("nothing < 3", "no column is called nothing"),
        ("latency < 50", "50 is no figure: write 15ms, 0.2s or 800us"),
        ("latency", "latency: write a column, <, <=, > or >=, and a figure"),
    ],
)
def test_what_is_not_understood_is_said(page: LivePage, everything: pd.DataFrame, typed: str, told: str) -> None:
    """And every row is shown."""
    page.part("figures-only").send_keys(typed)

    assert page.text("figures-told") == told
    assert len(page.js(LATENCIES)) == len(everything)


def test_the_name_stays_where_the_table_is_scrolled(page: LivePage) -> None:
    """The first column is beside every other one."""
    page.js("document.querySelector('#all-rows').closest('.tall').scrollLeft = 500")
    left = page.js(
        "const cell = document.querySelector('#all-rows tbody td');"
        "return cell.getBoundingClientRect().left - cell.closest('.tall').getBoundingClientRect().left"
    )

    assert left == pytest.approx(0, abs=1)


def test_the_keyboard_sorts(page: LivePage) -> None:
    """A head that has the focus is a button."""
    page.js("document.querySelector('#all-rows thead th:nth-child(2) .dt-column-order').focus()")
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)

    assert page.js("return document.querySelector('#all-rows thead th:nth-child(2)').ariaSort") == "ascending"
