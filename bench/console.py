"""What every command of the command line shares: where it prints and writes, its options, its progress bar.

There is one door for each: `OUT` and `ERR` print text from anywhere as it is, never as markup, `Screen.table` prints
cells whole, and `write_file` and `append_file` write no file over an input or a store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from skipcost.bench.errors import BenchError
from skipcost.bench.streams import EVERY_S, how_far, minutes, visible
from skipcost.bench.units import MAX_BATCH, parse_number
from skipcost.kernels import outputs

PIPED_WIDTH = 200  # columns for a pipe or a file; a terminal has its own
GAP, PROSE_WIDTH = 2, 16  # columns between cells; the fewest that a sentence in a cell is wrapped to


def bold(text: str) -> Text:
    """A text for `Screen.print` that stands out."""
    return Text(visible(text), style="bold")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. prose: sentences, which may be wrapped between words; right: aligned so.

    drop: 0 is always shown; where the others do not fit, the highest goes first.
    """

    title: str
    right: bool = False
    prose: bool = False
    drop: int = 0

    def least(self, cells: Sequence[str]) -> int:
        """The fewest columns in which every word of the title and every cell is whole."""
        words = [cell_len(word) for text in (self.title, *(cells if self.prose else ())) for word in text.split()]
        widest = max(map(cell_len, cells), default=0)
        return max([min(widest, PROSE_WIDTH) if self.prose else widest, *words])


class Screen(Console):
    """Where people are told things. A text is a line of its own: no part of it is markup, an emoji or a command.

    A line is wrapped on a terminal, between words alone; elsewhere not at all. $NO_COLOR leaves plain text.
    """

    def __init__(self, **options: Any) -> None:
        plain = {"color_system": None} if os.environ.get("NO_COLOR") else {}
        super().__init__(markup=False, emoji=False, highlight=False, **(plain | options))

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, and what rich renders, as it is."""
        told = [Text(visible(each)) if isinstance(each, str) else each for each in objects]
        if all(isinstance(each, Text) for each in told):
            options = {
                **({"overflow": "ignore", "crop": False} if self.is_terminal else {"soft_wrap": True}),
                **options,
            }
        super().print(*told, **options)

    def print_json(self, json: str | None = None, **options: Any) -> None:
        """Print JSON, in ASCII where the stream has no other letters."""
        super().print_json(json, ensure_ascii=not self.encoding.startswith("utf"), **options)

    def table(
        self, columns: Sequence[Column], rows: Iterable[Sequence[str]], styles: Sequence[str] = (), more: str = ""
    ) -> None:
        """Print a table in which every cell is whole: with fewer columns where it is narrow, or a line for each field.

        styles: of each row; none where it is empty. more: what has the columns that are not shown.
        """
        cells = [[visible(cell) for cell in row] for row in rows]
        least = [column.least([row[at] for row in cells]) for at, column in enumerate(columns)]
        kept = _kept(columns, least, self.width)
        if sum(least[at] + GAP for at in kept) - GAP > self.width:
            self._records(columns, cells, styles)
            return
        widths = _widths(columns, cells, {at: least[at] for at in kept}, self.width)
        placed = [(at, columns[at].right, widths[at]) for at in kept]
        self.print(Text("\n".join(self._lines([column.title for column in columns], placed, low=True)), style="bold"))
        told = [Text("\n".join(self._lines(row, placed))) for row in cells]
        for text, style in zip(told, styles, strict=bool(styles)):
            text.stylize(style)
        if told:
            self.print(Text("\n").join(told))
        if dropped := [column.title for at, column in enumerate(columns) if at not in kept]:
            self.print(f"too narrow for: {', '.join(dropped)}{f'; {more}' if more else ''}", style="dim")

    def _lines(
        self, row: Sequence[str], placed: Sequence[tuple[int, bool, int]], *, low: bool = False
    ) -> Iterator[str]:  # fmt: skip
        """The lines of a row; placed: of each column that is shown its number, whether to the right, its width.

        low: cells with fewer lines than others end with them, in place of beginning with them.
        """
        parts = [self._wrapped(row[at], width) for at, _, width in placed]
        height = max(map(len, parts))
        for number in range(height):
            cells = []
            for each, (_, right, width) in zip(parts, placed, strict=True):
                at = number - (height - len(each)) * low
                cells.append(_padded(each[at] if 0 <= at < len(each) else "", width, right=right))
            yield (" " * GAP).join(cells).rstrip()

    def _wrapped(self, text: str, width: int) -> list[str]:
        if cell_len(text) <= width:
            return [text]
        return [line.plain.rstrip() for line in Text(text).wrap(self, width)]

    def _records(self, columns: Sequence[Column], cells: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
        """A line for each field that is not empty, rows apart."""
        for number, row in enumerate(cells):
            if number:
                self.print()
            for column, cell in zip(columns, row, strict=True):
                if cell.strip():
                    told = f"{column.title}: {cell}" if column.title.strip() else cell
                    self.print(told, style=styles[number] if styles else None)


def _padded(text: str, width: int, *, right: bool) -> str:
    """A text filled up with spaces to a width on the screen, where letters may take two places."""
    spaces = " " * (width - cell_len(text))
    return spaces + text if right else text + spaces


def _kept(columns: Sequence[Column], least: Sequence[int], width: int) -> list[int]:
    """Which columns are shown in a width: those that may go are left out one by one, until the rest fits or all are."""
    kept = list(range(len(columns)))
    while sum(least[at] + GAP for at in kept) - GAP > width and any(columns[at].drop for at in kept):
        kept.remove(max(kept, key=lambda at: columns[at].drop))
    return kept


def _widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], least: dict[int, int], width: int
) -> dict[int, int]:
    """The width of each column, from its least up to its widest text: titles in one line first, then sentences."""
    widths = dict(least)
    spare = width - sum(each + GAP for each in least.values()) + GAP
    for at in sorted(least, key=lambda each: columns[each].prose):
        widest = max(map(cell_len, (columns[at].title, *(row[at] for row in cells))))
        sharing = sum(columns[each].prose for each in least if each >= at) if columns[at].prose else 1
        more = min(widest - widths[at], spare // sharing)
        widths[at] += more
        spare -= more
    return widths


OUT = Screen(width=None if sys.stdout is not None and sys.stdout.isatty() else PIPED_WIDTH)
ERR = Screen(stderr=True)
SWEEP = Annotated[
    str | None,
    typer.Argument(help="a shipped sweep (quick, ci, full, paper, ...) or the path of a TOML file", show_default=False),
]
MODEL = Annotated[
    list[str] | None,
    typer.Option("--model", help="package.module:factory of a model of your own, measured beside; may be repeated"),
]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where torch sees one")]
SET = Annotated[
    list[str] | None, typer.Option("--set", help="key=v1,v2: replace or add a key of every grid; may be repeated")
]
JSON = Annotated[bool, typer.Option("--json", help="print JSON for a program")]
DB = Annotated[Path, typer.Argument(help="a store made by `skipcost sweep`")]
JUNIT = Annotated[Path | None, typer.Option(help="write JUnit XML here, too")]
KEPT = Annotated[
    Path | None, typer.Option("--verdicts", help="write the verdicts here, too, for `skipcost report --verdicts`")
]
SIZE = Annotated[str, typer.Option(help="of the image: 512, or 480x640 (height x width)")]


def settings_of(texts: list[str] | None) -> dict[str, list[str]]:
    """Read `--set key=v1,v2`, each given once or more; the values of a key that is given again are added."""
    settings: dict[str, list[str]] = {}
    for text in texts or []:
        key, separator, values = text.partition("=")
        if not separator or not values:
            message = f"--set {text!r} is not key=v1,v2"
            raise BenchError(message)
        settings.setdefault(key, []).extend(value.strip() for value in values.split(","))
    return settings


def write_file(
    path: Path, content: str | bytes, taken: Iterable[Path] = (), option: str = "-o", kept: str = ""
) -> None:
    """`outputs.write_file`, with a BenchError."""
    try:
        outputs.write_file(path, content, taken, option, kept)
    except outputs.OutputError as error:
        raise BenchError(str(error)) from None


def append_file(path: Path, text: str, option: str = "-o", kept: str = "") -> None:
    """`outputs.append_file`, with a BenchError."""
    try:
        outputs.append_file(path, text, option, kept)
    except outputs.OutputError as error:
        raise BenchError(str(error)) from None


def check_outputs(files: dict[str, Path | None], taken: Iterable[Path] = ()) -> None:
    """Refuse early what `write_file` would refuse, and two outputs in one place; files: by the option that names it."""
    known = list(taken)
    for option, path in files.items():
        if path is not None:
            try:
                outputs.check_output(path, known, option)
            except outputs.OutputError as error:
                raise BenchError(str(error)) from None
            known.append(path)


class Description(ProgressColumn):
    """What a bar is about, as it is."""

    def render(self, task: Task) -> Text:
        """Make the cell."""
        return Text(visible(task.description))


@contextlib.contextmanager
def telling(line: Callable[[float], str]) -> Iterator[None]:
    """Say on stderr every EVERY_S how far something is; `line` is given the seconds since it began."""
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY_S):
            ERR.print(line(time.monotonic() - began))

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def going_on(what: str) -> contextlib.AbstractContextManager[None]:
    """Say now and then that work which has no parts to count still goes on."""
    return telling(lambda seconds: f"{what}: {minutes(seconds)} so far")


@contextlib.contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Progress]:
    """A bar on stderr with the time left; where that is no terminal, a line now and then.

    columns: in front; without any, the bar and how many parts are done.
    """
    shown = columns or (BarColumn(), MofNCompleteColumn())
    bar = Progress(*shown, Description(), TimeRemainingColumn(), console=ERR, disable=not ERR.is_terminal)

    def told(seconds: float) -> str:
        task = bar.tasks[-1] if bar.tasks else None
        if task is None or not task.total:
            return f"{minutes(seconds)} so far"
        return f"{how_far(task.completed, task.total, seconds)}: {task.description or 'starting'}"

    with bar, contextlib.nullcontext() if ERR.is_terminal else telling(told):
        yield bar


def number(title: str, low: float, high: float, kind: type[int | float] = int) -> Any:
    """An option that is a number from `low` to `high`, or a list of them; help and refusal say the range.

    typer's own `min` and `max` let nan pass, since it is not below or above anything.
    """

    def read(param: typer.CallbackParam, value: Any) -> Any:
        if value is None or isinstance(value, list):
            return value and [read(param, each) for each in value]
        return parse_number(param.opts[-1], value, low, high, kind)

    return typer.Option(help=f"{title}; {low} to {high}", parser=str, callback=read, metavar=f"<{kind.__name__}>")


BATCH = Annotated[int, number("images in a step", 1, MAX_BATCH)]
