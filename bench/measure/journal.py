"""Rows of measurements in a file of JSON lines: each written and flushed as soon as it is there, none measured twice.

A row that is already in the file, from the same card, versions and code, is final: the same command goes on where it
was stopped. Every row has

    implementation, outcome ("ok" or what was wrong), note (why, or what makes the samples doubtful),
    seconds (samples, of one call each), cache ("hot" or "cold"), graph (whether as a CUDA graph),
    worst (error over its bound), fraction_of_copy and fraction_of_matmul (of the ceilings measured in the same run),
    device, versions, time

and one of a call also op, call (its key), precision, tile; one of a network: network (its label), case, precision,
saved_bytes, peak_bytes. A row with another outcome than "ok" has no samples and stands for hot and cold alike.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import skipcost.kernels
import skipcost.unet_models
from skipcost.kernels.dispatch.winners import no_row, read_rows
from skipcost.kernels.outputs import append_file, write_file

Row = dict[str, Any]
CODE = ("*.py", "devices.toml", "configs/*.json")  # of a package: what makes numbers
KEYS = ("network", "case", "call", "precision", "implementation")


def identity(row: Row) -> tuple[Any, ...]:
    """Return what makes two rows the same measurement, but for where; a failure stands for hot and cold alike."""
    tile = row.get("tile")
    return (*(row.get(key) for key in KEYS), tuple(sorted(tile.items())) if tile else None)


class Journal:
    """The rows of one file and one machine. `origin`: its device, versions and code, which every row gets.

    copy: a second file that gets the rows with numbers: the map of winners that dispatch reads.
    """

    def __init__(self, path: Path, origin: dict[str, Any], copy: Path | None = None) -> None:
        self.path, self.origin, self.copy = path, origin, copy
        for each in filter(None, (path, copy)):
            make_room(each)
            mend(each)
        self.rows: list[Row] = [
            row for row in read_rows(path.read_text(encoding="utf-8"), path) if self._from_here(row)
        ]
        self.known = {identity(row) for row in self.rows}

    def _from_here(self, row: Row) -> bool:
        there = row.get("device", {}).get("name"), row.get("versions")
        return there == (self.origin["device"]["name"], self.origin["versions"])

    def add(self, row: Row) -> None:
        """Write a row, with its origin and the time."""
        full = {**row, **self.origin, "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
        self.rows.append(full)
        self.known.add(identity(full))
        line = json.dumps(full) + "\n"
        _append(self.path, line)
        if self.copy is not None and full["outcome"] == "ok":
            _append(self.copy, line)


def _append(path: Path, line: str) -> None:
    append_file(path, line, kept="the rows before are kept")


def make_room(path: Path) -> None:
    """Make a file with its folder; OutputError where that cannot be, or must not."""
    append_file(path, "")


def mend(path: Path) -> None:
    """Cut off a last line within which a run was killed, so that the next row does not continue it.

    ValueError for a file that holds anything but rows, which is left as it is.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise no_row(1, path, "no text") from None
    whole, newline, last = text.rpartition("\n")
    for _ in read_rows(whole + newline, path):
        pass
    if last and not last.startswith("{"):
        raise no_row(text.count("\n") + 1, path, f"no row of measurements: {last[:40]!r}")
    if last:
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(last)
            whole, newline = text, "\n"
        write_file(path, whole + newline)


def code_hash(*more: ModuleType) -> str:
    """Hash the code and tables of unet_models, kernels and `more` that make numbers, in any folder of theirs.

    What was measured with others is measured again, whether or not a change of them is committed.
    """
    digest = hashlib.sha256()
    for package in (skipcost.unet_models, skipcost.kernels, *more):
        folder = Path(package.__path__[0])
        for path in sorted(path for pattern in CODE for path in folder.rglob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
