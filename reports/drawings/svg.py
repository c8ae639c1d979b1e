"""From a matplotlib figure to a piece of SVG that belongs to the page: its text, its colours, its ids.

Figures are drawn in marker colours; here those become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

INK, SOFT, FAINT, RULE = "#010101", "#040404", "#020202", "#030303"
SMALLEST = 11  # pixels of a text in the page
PALETTE = ("#0000a1", "#0000a2", "#0000a3", "#0000a4", "#0000a5", "#0000a6")  # --c1 to --c6 of style.css
_CSS = {INK: "currentColor", SOFT: "var(--soft)", FAINT: "var(--faint)", RULE: "var(--rule)"} | {
    colour: f"var(--c{at})" for at, colour in enumerate(PALETTE, 1)
}
_TIDY = (  # what matplotlib writes and the page has no use for
    (r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", ""),
    (r'<clipPath.*?</clipPath>| clip-path="[^"]*"', ""),  # axes have room at their ends
    (r' id="(?!m[0-9a-f]{10})[^"]*"', ""),  # only markers are referred to
    (r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px"),
    (r"font-family: [^;\"]*;? ?", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"\s*\n\s*", "\n"),
    (r"<g>\n(<use [^>]*/>)\n</g>", r"\1"),
    (r"<defs>\n</defs>\n|<g/>\n", ""),
)
_RC: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "skipcost",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the layout is the same everywhere; the page sets its own
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "normal",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_capstyle": "round",
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """Set matplotlib and seaborn up for the page, for the time of the block."""
    plt.switch_backend("svg")
    with mpl.rc_context(), sns.axes_style("white"):
        mpl.rcParams.update(cast("Any", _RC))
        yield
        plt.close("all")


def to_svg(drawing: Drawing, name: str, title: str, description: str) -> Markup:
    """Write the drawing as inline SVG with a title and a description, ids prefixed by `name`."""
    buffer = io.StringIO()
    drawing.savefig(
        buffer,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None, "Creator": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _TIDY:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    words = (name, title, description)
    inside = Markup(text[text.index(">") + 1 : text.rindex("</svg>")])  # noqa: S704 - matplotlib escapes its text
    return as_image("chart", box[1], words, inside, SMALLEST / _RC["xtick.labelsize"])


def as_image(kind: str, box: str, words: tuple[str, str, str], inside: Markup, scale: float = 1.0) -> Markup:
    """Lay out an SVG as one image that scrolls before its text is too small, with a name, a title and a description.

    box: its viewBox. scale: pixels of the page for each of the drawing, at least. What is inside is hidden from who
    hears the page: an image has no parts, and its numbers are in a table.
    """
    name, title, described = words
    least = math.ceil(float(box.split()[2]) * scale)
    return Markup(
        '<svg class="{0}" viewBox="{1}" style="min-width:{2}px" role="img" aria-labelledby="{3}-title {3}-desc">'
        '<title id="{3}-title">{4}</title><desc id="{3}-desc">{5}</desc><g aria-hidden="true">{6}</g></svg>'
    ).format(kind, box, least, name, title, described, inside)
