"""Tables as the templates want them: texts to read, each with the base value that it sorts by."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from skipcost.bench import figures


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows; numbers carry their base value in `order`, which also sets them flush right."""

    text: str
    order: float | None = None
    note: str = ""

    @property
    def sort_key(self) -> str:
        """The base value as text; empty where there is none, which sorts to one end."""
        return "" if self.order in (None, float("inf")) else f"{self.order:.12g}"


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: `columns` are its heads."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with what to read from it and the numbers that it shows."""

    name: str
    title: str
    svg: Markup
    caption: str
    table: Grid


def words(text: object) -> Cell:
    """A cell of text."""
    return Cell(str(text))


def whole(value: int) -> Cell:
    """A cell of a whole number as it is."""
    return Cell(str(value), float(value))


def number(value: float | None, unit: str, *, doubtful: bool = False) -> Cell:
    """A cell of a metric's value in readable units; sorts by the base value; a tilde marks a doubt."""
    text = figures.text(value, unit)
    if value is None or text == "-":
        return Cell("\u2013", float("inf"))
    return Cell(f"~ {text}" if doubtful else text, float(value))
