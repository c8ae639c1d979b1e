"""The choice in a browser: what a reader's limits do to the best, the plot and the table, and what a link keeps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from live_page import LivePage
from places import ROOT
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from skipcost.bench import figures
from skipcost.reports.data import load

MEMORY = "peak_memory_predicted_bytes"
MIB = 2**20
CONTROLS = """
const all = [...document.getElementById("chooser").elements].filter((each) => each.matches("input, select, button"));
return all.map((each) => each.id || each.name);
"""


@pytest.fixture
def page(browser: Chrome, address: str) -> LivePage:
    """The report, freshly opened."""
    return LivePage(browser, address)


@pytest.fixture(scope="session")
def networks(store: Path) -> pd.DataFrame:
    """Every network with its inference row, its training memory beside it, and whether its latency has a doubt."""
    data = load(store)
    rows = data.networks("inference").set_index("label")
    training = data.networks("training").set_index("label")[MEMORY]
    return rows.assign(training=training, doubtful=data.doubtful(rows, "latency_s"))


def ranked(rows: pd.DataFrame) -> list[str]:
    """Labels, best first: the farthest field, then the widest, then the fewest MACs and parameters."""
    by = ["receptive_field", "width", "conv_macs", "params"]
    return list(rows.reset_index().sort_values([*by, "label"], ascending=[False, False, True, True, True])["label"])


def test_without_a_limit_the_best_of_the_papers_own_lead(page: LivePage, networks: pd.DataFrame) -> None:
    """Five, in the order that the page names, and every network of theirs is in the plot."""
    own = networks[networks["skip"] == "concat"]

    assert [row["network"] for row in page.top()] == ranked(own)[:5]
    assert page.text("chosen") == f"No limit yet: the best of all {len(own)} networks."
    assert page.part("round-limits").get_attribute("open") is None


def test_a_limit_filters_the_best_the_plot_and_the_table(page: LivePage, networks: pd.DataFrame) -> None:
    """By loops over the rows: what keeps 1 MiB at inference."""
    own = networks[networks["skip"] == "concat"]
    keeping = own[own[MEMORY] <= MIB]
    page.choose("plot-x", "memory")
    page.limit("memory", "1MiB")
    page.part("rows-too").click()

    assert [row["network"] for row in page.top()] == ranked(keeping)[:5]
    assert page.marks("keeps") == len(keeping)
    assert page.marks("breaks") == len(own) - len(keeping)
    assert {name.partition(" ")[0] for name in page.names()} == {"1", "2", "3", "4", "5"}
    assert page.rows() == set(keeping.index)
    assert page.text("chosen").startswith(f"{len(keeping)} of {len(own)} networks keep memory ≤ 1.00 MiB.")


def test_all_limits_hold_at_once_over_all_schemes(page: LivePage, networks: pd.DataFrame) -> None:
    """Memory in training, MACs and parameters, each read in its unit."""
    keeping = networks[
        (networks["training"] <= 8 * MIB) & (networks["conv_macs"] <= 80e6) & (networks["params"] <= 2e5)
    ]
    page.choose("by-skips", "")
    for key, text in {"training-memory": "8 MiB", "MACs": "80M", "parameters": "0.2M"}.items():
        page.limit(key, text)

    assert 0 < len(keeping) < len(networks)
    assert [row["network"] for row in page.top()] == ranked(keeping)[:5]
    assert page.text("chosen").startswith(f"{len(keeping)} of {len(networks)} networks keep ")


def test_figures_are_those_of_the_tables(page: LivePage, networks: pd.DataFrame) -> None:
    """Each number of the best is written as Python writes it, a doubt with its tilde."""
    of = networks.loc["unet/d2/w8/concat"]
    page.limit("memory", f"{int(of[MEMORY])}B")

    (row,) = page.top()

    assert row["network"] == "unet/d2/w8/concat"
    assert row["memory"] == figures.text(of[MEMORY], "bytes")
    assert row["training memory"] == figures.text(of["training"], "bytes")
    assert row["latency"] == f"~ {figures.text(of['latency_s'], 'seconds')}"
    assert row["parameters"] == figures.text(of["params"], "count")
    assert row["MACs"] == figures.text(of["conv_macs"], "macs")
    assert row["sees"] == figures.text(of["receptive_field"], "pixels")


def test_a_doubtful_figure_keeps_no_limit_and_is_on_no_front(page: LivePage, networks: pd.DataFrame) -> None:
    """The network whose latency is doubtful is counted apart, hollow, whatever its latency says."""
    own = networks[networks["skip"] == "concat"]
    sound = own[~own["doubtful"]]

    page.limit("latency", "3000s")

    assert page.text("chosen").startswith(f"{len(sound)} of {len(own)} networks keep latency ≤ 50 min 0 s.")
    assert page.text("chosen").endswith("1 cannot be judged: a figure that is limited is missing or carries a doubt.")
    assert (page.marks("keeps"), page.marks("hollow")) == (len(sound), 1)


def test_the_front_is_of_what_keeps_the_limits_without_a_doubt(page: LivePage) -> None:
    """Of five points the cheapest is doubtful, the best breaks a limit, one is beaten: two are left."""
    points = [
        {"x": 1, "y": 9, "standing": "keeps", "doubtful": True},
        {"x": 2, "y": 2, "standing": "keeps", "doubtful": False},
        {"x": 3, "y": 1, "standing": "keeps", "doubtful": False},
        {"x": 4, "y": 5, "standing": "keeps", "doubtful": False},
        {"x": 5, "y": 9, "standing": "breaks", "doubtful": False},
    ]
    plot = (ROOT / "reports/templates/plot.js").read_text()

    drawn = page.js(
        f"{plot}; const axis = {{ at: (value) => value }};"
        "return drawFront(arguments[0], axis, axis).map((path) => path.getAttribute('d'))",
        points,
    )

    assert drawn == ["M2.0 2.0H4.0V5.0"]


def test_one_step_more_names_the_limit_that_breaks_first(page: LivePage, networks: pd.DataFrame) -> None:
    """A level more multiplies training memory and inference memory alike: the tighter limit is crossed first."""
    wider, deeper = networks.loc["unet/d2/w12/concat"], networks.loc["unet/d3/w8/concat"]
    of = networks.loc["unet/d2/w8/concat"]
    page.limit("memory", f"{int(of[MEMORY] * 1.3)}B")
    page.limit("training-memory", f"{int(of['training'] * 1.05)}B")

    (row,) = page.top()

    assert row["made wider"] == f"width 12 breaks training memory, {figures.text(wider['training'], 'bytes')}"
    assert row["made deeper"] == f"depth 3 breaks training memory, {figures.text(deeper['training'], 'bytes')}"


def test_a_limit_that_is_not_understood_ranks_nothing(page: LivePage) -> None:
    """Whoever writes 64 hears how to write it, and is not answered something else."""
    page.limit("memory", "64")

    assert page.text("chosen") == 'memory: "64" is not understood. Write 8GiB or 512MB.'
    assert page.top() == []
    assert page.part("most-memory").get_attribute("aria-invalid") == "true"


def test_one_mode_alone_leaves_the_others_limits_out(page: LivePage) -> None:
    """Who only infers has no training figures, and a limit on them does not hold."""
    page.limit("training-memory", "1B")
    assert page.top() == []

    page.choose("by-mode", "inference")

    assert len(page.top()) == 5
    assert "training memory" not in page.top()[0]
    assert not page.part("most-training-memory").is_displayed()


def test_scores_lead_where_somebody_brought_them(browser: Chrome, scored: str) -> None:
    """Over all schemes, and the page says by what."""
    page = LivePage(browser, scored)

    first, second, third, *_ = page.top()

    assert (first["network"], first["score"]) == ("unet/d2/w8/none", "0.9")
    assert (second["network"], second["score"]) == ("unet3+/d3/w16/concat", "0.5")
    assert third["score"] == "\u2013"
    assert "score in scores" not in page.text("by-objective")
    assert "score in tiny.csv" in page.text("by-objective")


def test_a_link_restores_the_view(page: LivePage, browser: Chrome, address: str) -> None:
    """Everything that was set stands in the address, and another page opened there shows the same."""
    page.limit("memory", "1MiB")
    page.choose("by-skips", "sum")
    page.choose("plot-y", "MACs")
    page.choose("plot-x", "parameters")
    page.part("rows-too").click()
    seen = (page.state(), page.text("chosen"), page.top(), page.marks("keeps"), page.rows())

    again = LivePage(browser, address + seen[0])

    assert seen[0].startswith("#choose&memory=1MiB&")
    assert (again.state(), again.text("chosen"), again.top(), again.marks("keeps"), again.rows()) == seen


def test_back_is_the_view_before(page: LivePage, browser: Chrome) -> None:
    """One entry of the history for each field, however many letters it took; anchors change nothing."""
    before = page.top()
    page.limit("memory", "1MiB")
    page.choose("by-skips", "sum")

    browser.back()
    page.until("return document.getElementById('by-skips').value === 'concat'")
    assert page.part("most-memory").get_property("value") == "1MiB"
    page.js("location.hash = '#rows'")
    assert page.part("most-memory").get_property("value") == "1MiB"

    browser.back()
    browser.back()
    page.until("return document.getElementById('most-memory').value === ''")

    assert page.top() == before


def test_the_keyboard_alone_reaches_and_works_every_control(page: LivePage) -> None:
    """Tab by tab through the section; a limit typed, a scheme chosen and the box ticked without a pointer."""
    wanted = set(page.js(CONTROLS))
    page.js("document.querySelector('nav a:last-of-type').focus()")
    reached: set[str] = set()
    for _ in range(60):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        at = page.js("return document.activeElement.id || document.activeElement.name")
        reached.add(at)
        if at == "most-memory":
            page.browser.switch_to.active_element.send_keys("1MiB")
        if at == "by-skips":
            page.browser.switch_to.active_element.send_keys("s")
        if at == "rows":
            page.browser.switch_to.active_element.send_keys(" ")
        if wanted <= reached:
            break

    assert wanted <= reached
    assert page.state() == "#choose&memory=1MiB&skips=sum&rows=1"
