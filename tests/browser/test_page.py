"""The page for everybody: no message, no request, nothing that axe finds, no text too small, nothing cut."""

from __future__ import annotations

from typing import Any

import pytest
from live_page import LivePage
from selenium.webdriver import Chrome

WIDTHS = (390, 820, 1280)
SMALLEST = 11  # pixels
LEAST_CONTRAST = 4.5
LEAST_TARGET = 24  # pixels
COLOURS = "['color-contrast', 'link-in-text-block']"  # the rules of axe that the colours decide
OPEN = "document.querySelectorAll('details').forEach((each) => { each.open = true; });"
UNCUT = """
const style = document.createElement("style");
style.textContent = ".scroll, .tall, details > .scroll { overflow: visible !important; max-height: none !important; }"
  + " nav, th, td { position: static !important; } body { max-width: none !important; width: max-content; }";
document.head.append(style);
"""
DRAWN = """
const channels = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
const shares = [0.2126, 0.7152, 0.0722];
const light = (colour) => shares.reduce((sum, share, at) => sum + share * linear(channels(colour)[at]), 0);
const paper = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll("svg text")].map((text) => light(getComputedStyle(text).fill))
  .map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
"""
ENDS = """
const parts = [...document.querySelectorAll("#chooser *, .live select, #live")];
return parts.map((each) => each.getBoundingClientRect().right);
"""
TARGETS = """
const all = [...document.querySelectorAll("#chooser input, #chooser button, select, label.tick, summary")];
const boxes = all.filter((each) => each.getClientRects().length).map((each) => [each, each.getBoundingClientRect()]);
const small = boxes.filter(([, box]) => Math.min(box.width, box.height) < arguments[0]);
return small.map(([each]) => each.id || each.textContent.slice(0, 30));
"""
SIZES = """
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !element.getClientRects().length) continue;
  if (element.closest("title, desc, script")) continue;
  const drawn = element.closest("svg") && element.getScreenCTM();
  const scale = drawn ? Math.hypot(drawn.a, drawn.b) : 1;
  const size = parseFloat(getComputedStyle(element).fontSize) * scale;
  if (size < arguments[0] - 0.01) found.push([size.toFixed(2), element.tagName, walk.currentNode.data.slice(0, 40)]);
}
return found;
"""


def test_the_page_says_nothing_to_the_console_and_asks_for_nothing(browser: Chrome, whole: str) -> None:
    """Also when it is used: its own file, and what it carries itself."""
    browser.get("about:blank")
    page = LivePage(browser, whole)
    page.messages()
    page.requests()
    page = LivePage(browser, whole)

    page.limit("memory", "1MiB")
    page.choose("plot-y", "MACs")
    page.part("rows-too").click()
    page.part("anew").click()

    assert page.messages() == []
    assert page.requests() <= {"file", "blob", "about", "data"}


@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(browser: Chrome, whole: str, axe: str, width: int) -> None:
    """No violation of any impact; everything unfolded, a limit set."""
    page = LivePage(browser, f"{whole}#choose&memory=1MiB&x=memory", width)
    page.js(OPEN)

    off = f"{{ rules: Object.fromEntries({COLOURS}.map((rule) => [rule, {{ enabled: false }}])) }}"
    assert _found(page, axe, off)["violations"] == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_contrast_is_decided_and_enough(browser: Chrome, whole: str, axe: str, scheme: str) -> None:
    """By axe at AA; regions show all that they scroll to, since axe does not judge what is cut off or covered.

    It judges no text of a drawing: those are held to the same ratio against the paper, on which all of them stand.
    """
    page = LivePage(browser, f"{whole}#choose&memory=1MiB&x=memory", 1280, scheme)
    page.js(OPEN)
    page.js(UNCUT)

    assert _found(page, axe, f"{{ runOnly: {COLOURS} }}") == {"violations": {}, "incomplete": {}}
    assert min(page.js(DRAWN)) >= LEAST_CONTRAST


def _found(page: LivePage, axe: str, options: str) -> dict[str, dict[str, list[Any]]]:
    """What axe says of everything but the insides of drawings: places by rule, some of each."""
    page.browser.set_script_timeout(120)
    page.js(axe)
    script = f"axe.run({{ exclude: ['svg > g'] }}, {options}).then(arguments[0])"
    found: dict[str, list[dict[str, Any]]] = page.browser.execute_async_script(script)
    kinds = ("violations", "incomplete")
    return {
        kind: {each["id"]: [node["target"] for node in each["nodes"]][:5] for each in found[kind]} for kind in kinds
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_is_too_small(browser: Chrome, whole: str, width: int) -> None:
    """After scaling, in drawings too, everything unfolded."""
    page = LivePage(browser, f"{whole}#choose&memory=1MiB", width)
    page.js(OPEN)

    assert page.js(SIZES, SMALLEST)[:20] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_as_wide_as_its_window(browser: Chrome, whole: str, width: int) -> None:
    """What is wider scrolls in a region of its own; the form and the plot are whole."""
    page = LivePage(browser, f"{whole}#choose&memory=1MiB", width)

    assert page.js("return document.documentElement.scrollWidth") <= width
    ends = page.js(ENDS)
    assert max(ends) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_targets_are_large_enough(browser: Chrome, whole: str, width: int) -> None:
    """Every control of the choice is at least 24 pixels high and wide, its label counted where it is pressed too."""
    page = LivePage(browser, whole, width)

    small = page.js(TARGETS, LEAST_TARGET)

    assert small == []
