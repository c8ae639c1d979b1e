"""`skipcost calibrate`: fit a model of a device to a store's latencies, and say how wrong it is on other networks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from skipcost.bench import figures
from skipcost.bench.cases.case import CHOICES
from skipcost.bench.console import DB, ERR, JSON, OUT, Column, Screen, bold, check_outputs, going_on
from skipcost.bench.errors import BenchError
from skipcost.bench.predictions.calibration import FEATURES, Calibration, calibrate, file_of, save_calibration, words_of
from skipcost.bench.store.store import open_store
from skipcost.unet_models.spec import suggest

DEVICES = ("auto", *CHOICES["device"])


def calibrate_command(
    store: DB,
    output: Annotated[
        Path | None, typer.Option("-o", help="the file; default results/calibrations/DEVICE.json")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU's rows where the store has any")] = "auto",
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Fit what MACs, bytes and operators cost on a device to measured latencies, and report the error held out."""
    if device not in DEVICES:
        raise BenchError(suggest("device", device, DEVICES))
    check_outputs({"-o": output}, [store])
    with open_store(store) as opened, going_on("fitting"):
        made = calibrate(opened, store.name, device)
    path = output or file_of(made.device)
    save_calibration(made, path, [store])
    OUT.print_json(data=asdict(made)) if as_json else print_calibration(made, OUT)
    ERR.print(f"written to {path}")


def print_calibration(made: Calibration, console: Screen) -> None:
    """The calibration for people."""
    console.print(f"{made.device}, measured {made.measured}, {made.store}")
    if made.doubtful:
        rows = "1 row" if made.doubtful == 1 else f"{made.doubtful} rows"
        console.print(f"{rows} with a doubt (noise, throttling, warm-up) left out")
    for model in made.models:
        console.print()
        console.print(bold(words_of(model.setting)), f": {model.rows} rows, {model.networks} networks", sep="")
        held = model.held_out
        console.print(
            f"  held out, by network: Spearman {held.spearman:.3f}, mean error {held.mean_error:.1%}, worst "
            f"{held.worst_error:.1%}, within 10 %: {held.within_tenth:.0%} of rows"
        )
        low, typical, high = model.ratios
        console.print(
            f"  {model.coverage:.0%} interval: {low / typical - 1:+.1%} to {high / typical - 1:+.1%} of the prediction"
        )
        costs = [(f"  {name}", *_words(name, model.costs[name])) for name in FEATURES if model.costs[name]]
        console.table((Column("  cost"), Column("fitted", right=True), Column("as a rate", right=True)), costs)


def _words(name: str, cost: float) -> tuple[str, str]:
    """A cost in words, and MACs and bytes also as what they reach in a second."""
    if name.startswith("MACs"):
        return f"{cost * 1e12:.3g} ps each", f"{figures.text(1 / cost, 'macs')}/s"
    if name.startswith("bytes"):
        return f"{cost * 1e12:.3g} ps each", f"{figures.text(1 / cost, 'bytes')}/s"
    return f"{figures.text(cost, 'seconds')} each", ""
