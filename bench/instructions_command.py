"""`skipcost instructions`: how many instructions the suite's own Python takes, and whether a change made it more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from skipcost.bench import verdicts as telling
from skipcost.bench.callgrind import SUBJECTS
from skipcost.bench.console import ERR, JSON, JUNIT, KEPT, OUT, Column, check_outputs, going_on
from skipcost.bench.errors import BenchError
from skipcost.bench.instructions import Counts, count, count_both, judge
from skipcost.bench.revisions import WORKING_TREE, Revision, checked_out, merge_base

TITLE = "skipcost instructions"


def instructions(
    against: Annotated[
        str | None, typer.Option(help="a revision: both sides are counted, at the merge base and in the working tree")
    ] = None,
    junit: JUNIT = None,
    kept: KEPT = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Count instructions with valgrind's callgrind; against a revision 0 says none takes more, 1 that one does."""
    if against is None:
        if junit or kept:
            message = "--junit and --verdicts take verdicts, and there are none without --against REV"
            raise BenchError(message)
        _print(count(Revision("this code", os.environ.get("PYTHONPATH", ""), Path())), as_json=as_json)
        return
    check_outputs({"--junit": junit, "--verdicts": kept})
    trees = checked_out(merge_base(against)), checked_out(WORKING_TREE)
    with trees[0] as base, trees[1] as now, going_on("counting instructions"):
        verdicts = judge(*count_both(base, now))
    telling.write_json(verdicts, OUT) if as_json else telling.print_verdicts(verdicts, OUT)
    telling.pass_on(verdicts, TITLE, ERR, junit, kept)
    if not verdicts or any(each.fails for each in verdicts):
        raise typer.Exit(1)


def _print(found: Counts, *, as_json: bool) -> None:
    """Print a side's counts."""
    if as_json:
        OUT.print_json(
            data={
                "instructions": found.instructions,
                "failed": found.failed,
                "tolerance": {name: subject.tolerance for name, subject in SUBJECTS.items()},
            }
        )
        return
    OUT.table(
        (Column("subject"), Column("instructions a call", right=True), Column("tolerance", right=True)),
        [(name, f"{number:,}", f"{SUBJECTS[name].tolerance:.1%}") for name, number in found.instructions.items()],
    )
    for name, why in found.failed.items():
        ERR.print(f"skipcost: {name} cannot be counted: {why}")
