"""The map of winners: what `skipcost kernels bench` measured, here and on the cards that others contributed.

Rows are lines of JSON. The ones that come with the package are the published ones, `reports/published/<card>/kernels*`;
a machine's own, which come first, are in the file that `own_file` names. Reading needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from skipcost.kernels.dispatch.call import Call

ROW = {  # what is read of a row, where it has it; both names may be null
    "call": str | None,
    "network": str | None,
    "case": str | None,
    "precision": str | None,
    "implementation": str,
    "outcome": str,
    "device": dict,
    "versions": dict,
    "seconds": list,
}
RUN, RUN_NETWORK = ("implementation", "device", "seconds"), ("case", "precision")  # what a row that is ok has
FOLDER = "SKIPCOST_KERNELS"  # the environment variable that names another place for a machine's own rows


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation of one call on one card: the median of its samples, and where the row comes from."""

    call: str
    implementation: str
    card: str
    seconds: float
    source: str


def own_file() -> Path:
    """Return where this machine's rows are: $SKIPCOST_KERNELS/kernels.jsonl, or the user's cache folder."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(cache_home, "skipcost")) / "kernels.jsonl"


def read_rows(text: str, source: Path | str = "the rows") -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; a last line that was torn off while it was written is passed over.

    ValueError for a line that is none.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise no_row(number, source, f"no JSON ({error})") from None
            return
        if wrong := _wrong(row):
            raise no_row(number, source, f"no row of measurements: {wrong}")
        yield row


def no_row(number: int, source: Path | str, what: str) -> ValueError:
    """Make the refusal of a line of a file that should hold rows."""
    return ValueError(f"line {number} of {source} is {what}: remove it and measure again, or name another file")


def _wrong(row: Any) -> str:
    """What is wrong with the parts of a row that are read; empty where nothing is."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    for name, kind in ROW.items():
        if name in row and not isinstance(row[name], kind):
            return f"its {name} is {row[name]!r:.60}"
    if row.get("outcome") != "ok":
        return ""
    lacking = [name for name in (*RUN, *(RUN_NETWORK if row.get("network") else ())) if not row.get(name)]
    if lacking:
        return f"it is ok without {lacking[0]}"
    if not all(isinstance(each, int | float) and 0 <= each < math.inf for each in row["seconds"]):
        return "its seconds are no times"
    return "" if isinstance(row["device"].get("name"), str) else "its device has no name"


def timings(rows: Iterable[dict[str, Any]]) -> Iterator[Timing]:
    """Yield what can be compared: rows of calls with samples, caches hot, as the layers of a network find them."""
    for row in rows:
        if row.get("call") and row.get("outcome") == "ok" and row.get("cache", "hot") == "hot":
            seconds = statistics.median(row["seconds"])
            yield Timing(row["call"], row["implementation"], row["device"]["name"], seconds, row["source"])


@cache
def table(names: tuple[str, ...]) -> dict[str, dict[str, Timing]]:
    """Return, for a card by its names, the timings of each call by implementation; a machine's own rows win."""
    found: dict[str, dict[str, Timing]] = {}
    for timing in [*published(), *timings(_own_rows())]:
        if timing.card in names:
            found.setdefault(timing.call, {})[timing.implementation] = timing
    return found


def measured(call: Call, names: tuple[str, ...]) -> dict[str, Timing]:
    """Return the timings of a call on a card by implementation; empty where nobody measured it."""
    return table(names).get(call.key, {})


@cache
def networks(names: tuple[str, ...]) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """Return what whole networks took on a card: by label, by case and precision, by way, the median in seconds."""
    found: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for row in [*_published_rows(), *_own_rows()]:
        if row.get("network") and row.get("outcome") == "ok" and row["device"]["name"] in names:
            at = found.setdefault(row["network"], {}).setdefault((row["case"], row["precision"]), {})
            at[row["implementation"]] = statistics.median(row["seconds"])
    return found


def published() -> Iterator[Timing]:
    """Yield the timings that come with the package."""
    return timings(_published_rows())


def _published_rows() -> Iterator[dict[str, Any]]:
    """Yield rows by card and file; they are data of `reports`, read as files, without its code."""
    folder = resources.files("skipcost.reports") / "published"
    for card in sorted(folder.iterdir(), key=lambda each: each.name) if folder.is_dir() else ():
        for file in sorted(card.iterdir(), key=lambda each: each.name) if card.is_dir() else ():
            if file.name.startswith("kernels") and file.name.endswith(".jsonl"):
                yield from (
                    {**row, "source": f"{card.name}/{file.name}"}
                    for row in read_rows(file.read_text(encoding="utf-8"), file.name)
                )


def _own_rows() -> Iterator[dict[str, Any]]:
    path = own_file()
    if path.is_file():
        yield from ({**row, "source": str(path)} for row in read_rows(path.read_text(encoding="utf-8"), path))
