"""`python -m skipcost.reports`, which is `skipcost report`: write the HTML report of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipcost.bench import figures
from skipcost.bench.cli import guarded
from skipcost.bench.console import ERR
from skipcost.reports.page import write_report

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def report(
    store: Annotated[Path, typer.Argument(metavar="DB", help="a store made by `skipcost sweep`")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the HTML file to write")] = Path("report.html"),
    quality: Annotated[
        Path | None, typer.Option(help="a CSV of label,score[,seed]: quality measured elsewhere, laid over the costs")
    ] = None,
    verdicts: Annotated[
        list[Path] | None, typer.Option(help="what `--verdicts` of gate or ab wrote; may be repeated")
    ] = None,
) -> None:
    """Write the report of a store's newest environment: one file that loads nothing from anywhere."""
    size = write_report(store, output, quality, verdicts or ())
    ERR.print(f"{output}: {figures.size(size)}")


if __name__ == "__main__":
    guarded(app)
