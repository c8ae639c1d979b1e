"""The command line. It turns texts into calls and errors into exit codes; everything else is elsewhere.

0 fine, 1 regression, 2 bad usage or input, 4 environment; an unexpected error is 4, its traceback in a log file.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from skipcost.bench import (
    ab_command,
    accuracy_command,
    calibrate_command,
    counters_command,
    gate_command,
    instructions_command,
    rewritings_command,
)
from skipcost.bench import doctor as doctoring
from skipcost.bench import explain as explaining
from skipcost.bench import fit as fitting
from skipcost.bench import show as showing
from skipcost.bench.cases import CHOICES
from skipcost.bench.console import (
    BATCH,
    DB,
    DEVICE,
    ERR,
    JSON,
    MODEL,
    OUT,
    SET,
    SIZE,
    SWEEP,
    number,
    progress_bar,
    settings_of,
)
from skipcost.bench.driver import Server, pending
from skipcost.bench.driver import sweep as run_sweep
from skipcost.bench.environment import cpus
from skipcost.bench.errors import BenchError
from skipcost.bench.plan import Plan, PlannedCase, load_plan
from skipcost.bench.preview import preview, print_preview
from skipcost.bench.records import Result
from skipcost.bench.store import create_store, open_store
from skipcost.bench.units import parse_size
from skipcost.unet_models import ModelSpec
from skipcost.unet_models.spec import suggest

app = typer.Typer(
    help="What a U-Net variant costs, where the cost comes from, and whether your change made it worse.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Format(StrEnum):
    """How `show` writes the table."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


@contextmanager
def _planned(
    sweep: str | None, models: list[str] | None, settings: list[str] | None, device: str
) -> Iterator[tuple[Plan, Server]]:
    """Plan a sweep and start what measures it; what is wrong with the plan is said before anything starts."""
    if device not in ("auto", *CHOICES["device"]):
        raise BenchError(suggest("device", device, ("auto", *CHOICES["device"])))
    axes = settings_of(settings)
    plan = load_plan(sweep, axes, "cpu" if device == "auto" else device, cpus(), models or ())
    with Server() as server:
        if device == "auto" and server.environment["cuda"]:
            plan = load_plan(sweep, axes, "cuda", cpus(), models or ())
        yield plan, server


@app.command()
def plan(
    sweep: SWEEP = None,
    model: MODEL = None,
    device: DEVICE = "auto",
    settings: SET = None,
    store: Annotated[Path | None, typer.Option("-o", help="leave out what this store already has")] = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show what a sweep would run: cases, predicted memory, what will not fit, time left. Measures nothing."""
    with (
        open_store(store) if store else nullcontext() as opened,
        _planned(sweep, model, settings, device) as (planned, server),
        progress_bar() as progress,
    ):
        todo = pending(planned, opened, server.environment["fingerprint"]) if opened else list(planned.cases)
        bar = progress.add_task("tracing memory", total=len(todo))
        facts = preview(planned, todo, server, lambda: progress.advance(bar))
    OUT.print_json(data=facts) if as_json else print_preview(facts, OUT)


@app.command()
def sweep(
    sweep: SWEEP = None,
    model: MODEL = None,
    store: Annotated[Path | None, typer.Option("-o", help="the store; default results/SWEEP.sqlite")] = None,
    device: DEVICE = "auto",
    settings: SET = None,
    seed: Annotated[int, number("of the order in which the cases run", 0, 2**32 - 1)] = 0,
) -> None:
    """Measure every case of a sweep that the store does not have yet. Ctrl-C loses nothing; run it again to go on."""
    counts: dict[str, int] = {}
    with (
        _planned(sweep, model, settings, device) as (planned, server),
        create_store(path := store or Path("results") / f"{planned.name}.sqlite") as opened,
        progress_bar() as progress,
    ):
        bar = progress.add_task("", total=len(pending(planned, opened, server.environment["fingerprint"])))

        def tell(case: PlannedCase, results: list[Result]) -> None:
            for result in results:
                counts[result.outcome] = counts.get(result.outcome, 0) + 1
            progress.update(bar, advance=1, description=escape(case.case.spec.label))

        try:
            run_sweep(planned, opened, server, seed, tell)
        except KeyboardInterrupt:
            progress.stop()
            ERR.print("skipcost: stopped; what was measured is kept, run the same command again to go on")
            raise typer.Exit(INTERRUPTED) from None
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "nothing was missing"
    ERR.print(f"{len(planned.cases)} cases in {path}; this run added: {told}", soft_wrap=True, highlight=False)
    for text, reason in planned.left_out.items():
        ERR.print(f"left out: {text}: {reason}", soft_wrap=True, highlight=False)


@app.command()
def show(
    store: DB,
    sort: Annotated[str | None, typer.Option(help="a column, e.g. latency_s")] = None,
    where: Annotated[str | None, typer.Option(help="an expression over columns, e.g. \"variant == 'unet'\"")] = None,
    form: Annotated[
        Format, typer.Option("--format", help="table is for people; the others have every column")
    ] = Format.TABLE,
) -> None:
    """Print what a store holds: one row per case, a column per metric."""
    with open_store(store) as opened:
        frame = showing.select(opened, where, sort)
        labels = {case_id: case.spec.label for case_id, (case, _) in opened.cases().items()}
    showing.write(frame, form.value, OUT, labels)


@app.command()
def explain(
    label: Annotated[str, typer.Argument(help="a network, e.g. unet3+/d4/w64/concat")],
    size: SIZE = "512",
    batch: BATCH = 1,
    precision: Annotated[str, typer.Option(help=", ".join(explaining.VALUE_BYTES))] = "fp32",
    mode: Annotated[str, typer.Option(help=", ".join(CHOICES["mode"]))] = "inference",
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show every edge of a network: how its map gets there, what it costs, how long it is held."""
    for name, value in (("precision", precision), ("mode", mode)):
        if value not in CHOICES[name]:
            raise BenchError(suggest(name, value, CHOICES[name]))
    try:
        facts = explaining.explain(ModelSpec.parse(label), parse_size(size), batch, precision, mode)
    except ValueError as error:
        raise BenchError(str(error)) from None
    OUT.print_json(data=facts) if as_json else explaining.print_explanation(facts, OUT)


@app.command()
def doctor(as_json: JSON = False) -> None:  # noqa: FBT002 - a flag of the command line
    """Say what this machine can measure, and what would make its numbers doubtful."""
    with Server() as server:
        facts = doctoring.examine(server.environment)
    OUT.print_json(data=facts) if as_json else doctoring.print_findings(facts, OUT)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def report(context: typer.Context) -> None:
    """Write the HTML report of a store: `skipcost report DB -o report.html`."""
    sys.argv = ["skipcost report", *context.args]
    runpy.run_module("skipcost.reports", run_name="__main__", alter_sys=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def kernels(context: typer.Context) -> None:
    """Check, time, tune and explain the fused kernels: `skipcost kernels --help` lists the commands."""
    sys.argv = ["skipcost kernels", *context.args]
    runpy.run_module("skipcost.kernels", run_name="__main__", alter_sys=False)


app.command()(gate_command.baseline)
app.command()(gate_command.gate)
app.command()(ab_command.ab)
app.command()(instructions_command.instructions)
app.command()(accuracy_command.accuracy)
app.command("calibrate")(calibrate_command.calibrate_command)
app.command()(counters_command.counters)
app.command("rewritings")(rewritings_command.rewritings_command)
app.command()(fitting.fit)


def main() -> None:
    """Run the command line; the entry of the console script."""
    guarded(app)


def guarded(command: Any) -> None:
    """Run a command line and turn what it raises into one sentence and an exit code."""
    try:
        command()
    except BenchError as error:
        ERR.print(f"skipcost: {error}", soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception:  # noqa: BLE001 - the last resort: nothing that the user did explains this one
        with tempfile.NamedTemporaryFile("w", prefix="skipcost-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        ERR.print(f"skipcost: an unexpected error, which is a defect; its traceback is in {log.name}", soft_wrap=True)
        raise SystemExit(4) from None


if __name__ == "__main__":
    main()
