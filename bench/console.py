"""What every command of the command line shares: where it prints, its common options, its progress bar."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from skipcost.bench.cases import MAX_BATCH
from skipcost.bench.errors import BenchError

PIPED_WIDTH = 200  # columns for a pipe or a file; a terminal has its own
OUT = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
ERR = Console(stderr=True)
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


def number(title: str, low: float, high: float, kind: type[int | float] = int) -> Any:
    """An option that is a number from `low` to `high`, or a list of them; help and refusal say the range.

    typer's own `min` and `max` let nan pass, since it is not below or above anything.
    """

    def read(text: Any) -> Any:
        try:
            return kind(text) if str(text).isascii() else text
        except ValueError:
            return text  # no number: said below, where the option's name is known

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (isinstance(each, str) or not low <= each <= high):
                whole = "whole " if kind is int else ""
                message = f"{param.opts[-1]} {each!r} is not a {whole}number from {low} to {high}"
                raise BenchError(message)
        return value

    return typer.Option(help=f"{title}; {low} to {high}", parser=read, callback=check, metavar=f"<{kind.__name__}>")


BATCH = Annotated[int, number("images in a step", 1, MAX_BATCH)]


def progress_bar() -> Progress:
    """Make a bar on stderr with the time left."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=ERR, transient=False)
