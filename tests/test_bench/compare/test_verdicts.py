"""Verdicts in the forms that other programs read: whatever a name holds, they can be parsed."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from skipcost.bench.compare.verdicts import Verdict, junit, markdown


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain [big] <a & b>", "plain [big] <a & b>"),
        ("bell\x07", "bell\\x07"),
        ("nothing\x00", "nothing\\x00"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("half a letter \udcff", "half a letter \\udcff"),
        ("no letter \uffff", "no letter \\uffff"),
        ("two\nlines", "two\\nlines"),
        ("gr\xfc\xdfe \U0001f600", "gr\xfc\xdfe \U0001f600"),
    ],
)
def test_junit_holds_any_text(text: str, written: str) -> None:
    """What XML has no form for is written out; the rest comes back as it went in."""
    found = ET.fromstring(junit([Verdict(text, "params", "regressed", 1, 2, why=text)], text))  # noqa: S314 - our own

    case = found[0]
    assert found.attrib["name"] == written
    assert case.attrib["classname"] == written
    assert case[0].attrib["message"].endswith(written)


def test_a_row_of_markdown_is_one_line() -> None:
    """A line break in a name does not end the table."""
    lines = markdown([Verdict("a\nb|c", "params", "regressed", 1, 2)], "gate").splitlines()

    assert lines[-1].startswith("| a\\nb\\|c | params |")
