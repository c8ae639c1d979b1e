"""One browser and one report for all tests of what the page does; the session `browser` brings both tools.

Nothing here is skipped: without Chromium, its driver or axe-core every test fails, and no plain run collects them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from small_store import make_store

from skipcost.reports.page import write_report
from skipcost.reports.sections import SECTIONS

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network: no name has an address
)
TOUCHED = ("choose", "rows", "provenance")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small store: 48 networks, one latency doubtful, one failed."""
    return make_store(tmp_path_factory.mktemp("browser") / "tiny.sqlite")


@pytest.fixture(scope="session")
def whole(store: Path) -> str:
    """Where the report of the small store is."""
    write_report(store, store.with_suffix(".html"))
    return store.with_suffix(".html").as_uri()


@pytest.fixture(scope="session")
def address(store: Path) -> str:
    """Where its report is without the sections that no script touches: it opens in a fraction of the time."""
    return _brief(store, "brief.html")


@pytest.fixture(scope="session")
def scored(store: Path) -> str:
    """The same with somebody's scores: the smallest network leads by them."""
    scores = store.with_suffix(".csv")
    scores.write_text("label,score\nunet/d2/w8/none,0.9\nunet3+/d3/w16/concat,0.5\n")
    return _brief(store, "scored.html", scores)


def _brief(store: Path, name: str, scores: Path | None = None) -> str:
    needed = tuple(section for section in SECTIONS if section.name in TOUCHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipcost.reports.page.SECTIONS", needed)
        write_report(store, store.with_name(name), scores)
    return store.with_name(name).as_uri()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Chromium without a window, a profile or a network, of which every message and request is kept."""
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    assert binary, "Chromium is not installed"
    assert driver, "Chromium's driver is not installed"
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = Chrome(options=options, service=ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which the session has fetched."""
    return Path(os.environ["SKIPCOST_AXE"]).read_text()
