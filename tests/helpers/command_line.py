"""The command line in this process: its tree of commands and options is made once, not for each call.

Making it reads the signature of every command, 60 ms: fifty times what refusing an option takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import typer
from click.testing import CliRunner, Result
from typer.main import get_command

from skipcost.bench import cli


@cache
def _command(app: typer.Typer) -> Any:  # a command of the click that typer brings along
    return get_command(app)


def invoke_cli(words: Sequence[str], app: typer.Typer = cli.app, *, catch_exceptions: bool = True) -> Result:
    """Run `skipcost`, or one of its parts, with these words, and return what it printed and how it ended."""
    return CliRunner().invoke(_command(app), list(words), catch_exceptions=catch_exceptions)
