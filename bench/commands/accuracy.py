"""`skipcost accuracy`: predicted against measured GPU memory of a store, for people, for programs, and for the docs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from skipcost.bench import figures
from skipcost.bench.console import DB, ERR, JSON, OUT, Column, Screen, check_outputs, write_file
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.predictions.accuracy import (
    AIM_MEAN,
    AIM_NETWORKS,
    AIM_UNDER,
    AIM_WORST,
    Accuracy,
    Summary,
    accuracy_of_store,
    to_json,
)
from skipcost.bench.store.store import Store, open_store

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
WORST_ROWS = 10
HEADS = ("figure", "rows", "networks", "mean error", "worst", "under", "most under", "inside the interval", "aim")
HEADED = [Column(head, drop=0 if head in ("figure", "mean error", "worst", "aim") else 1) for head in HEADS]
ALL = "--json has them"
AIM = (
    f"Aim: a mean error of at most {AIM_MEAN:.0%}, {AIM_WORST:.0%} at worst, never under by more than {AIM_UNDER:.0%}, "
    f"over at least {AIM_NETWORKS} networks. Below 0 a prediction was under what was measured."
)


def accuracy(
    store: DB,
    write: Annotated[
        Path | None, typer.Option(help=f"a Markdown file: put the table between its lines {BEGIN} and {END}")
    ] = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Compare predicted with measured GPU memory, for every row of a store that has both."""
    check_outputs({"--write": write}, [store])
    with open_store(store) as opened:
        found = accuracy_of_store(opened)
        origin = _origin(opened, store)
    if write is not None:
        write_between(write, markdown(found, origin), [store])
        ERR.print(f"the table is in {write}")
    if as_json:
        OUT.print_json(data=to_json(found, WORST_ROWS))
    else:
        print_accuracy(found, OUT)


def _origin(store: Store, path: Path) -> str:
    """Where the rows come from, in words."""
    environments = {run.fingerprint: run for run in store.runs()}
    runs = (f"{run.sweep} of {run.started[:10]}, environment {name}" for name, run in environments.items())
    return f"From {path.name} ({'; '.join(runs)})."


def table_rows(found: Accuracy) -> list[tuple[str, tuple[str, ...]]]:
    """The error table in words: the device, and a cell for each of HEADS."""
    return [(each.device, _cells(each)) for each in found.summaries()]


def _cells(each: Summary) -> tuple[str, ...]:
    return (
        METRICS[each.metric].title,
        str(each.rows),
        str(each.networks),
        f"{each.mean:.1%}",
        f"{each.worst:+.1%}",
        f"{each.under:.0%} of rows",
        f"{each.most_under:.1%}",
        f"{each.inside:.0%} of rows",
        each.verdict,
    )


def worst_rows(found: Accuracy) -> list[tuple[str, ...]]:
    """The rows furthest off, in words: case, figure, predicted with its interval, measured, error."""
    return [
        (
            each.case.name,
            METRICS[each.metric].title,
            f"{figures.size(each.predicted)} ({figures.size(each.low)} to {figures.size(each.high)})",
            figures.size(each.measured),
            f"{each.error:+.1%}",
        )
        for each in found.worst(WORST_ROWS)
    ]


WORST_HEADS = ("furthest off", "figure", "predicted", "measured", "error")


def left_out(found: Accuracy) -> list[str]:
    """A sentence for each reason why a measured figure was not compared."""
    return [f"not compared: {count} x {reason}" for reason, count in found.left_out.items()]


def print_accuracy(found: Accuracy, console: Screen) -> None:
    """The error table and the rows furthest off, for people."""
    if found.why_none:
        console.print(found.why_none)
        return
    for device in dict.fromkeys(device for device, _ in table_rows(found)):
        console.print(device)
        console.table(HEADED, [cells for name, cells in table_rows(found) if name == device], more=ALL)
    console.print()
    console.table([Column(head) for head in WORST_HEADS], worst_rows(found))
    for line in (*left_out(found), AIM):
        console.print(line)


def markdown(found: Accuracy, origin: str) -> str:
    """The error table for a document; the plain sentence where there is none."""
    if found.why_none:
        return f"{found.why_none[0].upper()}{found.why_none[1:]}."
    heads = ("device", *HEADS)
    lines = [origin, "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join((device, *cells))} |" for device, cells in table_rows(found)]
    lines += ["", AIM, *left_out(found)]
    return "\n".join(lines)


def write_between(path: Path, text: str, taken: Iterable[Path] = ()) -> None:
    """Replace what lies between the two marker lines of a file; BenchError where it has not exactly one of each."""
    try:
        content = path.read_text(encoding="utf-8")
        before, begin, rest = content.partition(f"{BEGIN}\n")
        _, end, after = rest.partition(f"{END}\n")
        if not (begin and end) or content.count(BEGIN) != 1 or content.count(END) != 1:
            message = f"{path} has no line {BEGIN} followed by one {END}: put both where the table belongs"
            raise BenchError(message)
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot write {path}: {error}"
        raise BenchError(message) from None
    write_file(path, f"{before}{begin}{text}\n{end}{after}", taken, "--write")
