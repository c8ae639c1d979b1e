"""What the commands of `skipcost kernels` tell: progress with the time left on stderr, tables on stdout."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

KEPT_SPACE = "\u00a0"  # which figures stand beside their units with
EVERY_S = 30.0  # between lines that say how far a command is, where none overwrites another
DIGITS_FROM, DIGITS_TO = 1e3, 1e7  # numbers between are written out; all others with three digits


class Progress:
    """Counts parts of some work against a limit in time; a line that is rewritten, or one now and then in a file."""

    def __init__(self, title: str, total: int, until: float) -> None:
        self.title, self.total, self.until = title, total, until
        self.done, self.failed = 0, 0
        self.began = self.told = time.time()

    def step(self, *, failed: bool = False) -> None:
        """Note that a part is done."""
        self.done += 1
        self.failed += failed
        now, last = time.time(), self.done == self.total
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{self.line(now)}\x1b[K" + "\n" * last)
        elif last or now >= self.told + EVERY_S:
            self.told = now
            sys.stderr.write(self.line(now) + "\n")
        sys.stderr.flush()

    def line(self, now: float) -> str:
        """Say how far it is: the time left is what it will take, or what there is if that is less."""
        trouble = f", {self.failed} failed" if self.failed else ""
        return f"{self.title}{trouble}: {how_far(self.done, self.total, now - self.began, self.until - now)}"


def how_far(done: float, total: float, seconds: float, most: float = math.inf) -> str:
    """Say how much of something is done after so many seconds, and from that what is left; there are `most` at most."""
    left = f", {minutes(max(min(seconds * (total - done) / done, most), 0))} left" if done else ""
    return f"{done:.0f} of {total:.0f} done{left}"


def minutes(seconds: float) -> str:
    """Minutes and seconds, as a clock shows them."""
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def write_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write aligned columns: the first to the left, numbers to the right."""
    lines = [list(head), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    numbers = [all(_is_number(line[at]) for line in lines[1:]) for at in range(len(head))]
    for line in lines:
        cells = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if DIGITS_FROM <= abs(cell) < DIGITS_TO else f"{cell:.3g}"
    return visible(str(cell))


def _is_number(text: str) -> bool:
    return text in ("", "-") or text[0].isdigit()


def tell(sentence: str) -> None:
    """Write a sentence to stderr, under the command's name."""
    sys.stderr.write(f"skipcost kernels: {visible(sentence)}\n")


def visible(text: str) -> str:
    """A text in one line, with whatever a terminal would act upon written out, as in a Python string."""
    return "".join(
        each if each.isprintable() or each == KEPT_SPACE else each.encode("unicode_escape").decode() for each in text
    )


def steady_streams() -> None:
    """Let no letter and no closed stream end a command: what has no letter becomes `?`, what is closed takes all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this; its number must not become that of the next file
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
