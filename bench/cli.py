"""The command line. It turns texts into calls and errors into exit codes; everything else is elsewhere.

0 fine, 1 regression, 2 bad usage or input, 4 environment; an unexpected error is 4, its traceback in a log file.
"""

from __future__ import annotations

import errno
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from skipcost.bench.cases.case import CHOICES
from skipcost.bench.cases.places import explain as explain_places
from skipcost.bench.cases.record import FAILED, OUTCOMES, Result, notes_of, reasons_of
from skipcost.bench.commands import ab as ab_command
from skipcost.bench.commands import accuracy as accuracy_command
from skipcost.bench.commands import calibrate as calibrate_command
from skipcost.bench.commands import counters as counters_command
from skipcost.bench.commands import doctor as doctoring
from skipcost.bench.commands import fit as fitting
from skipcost.bench.commands import gate as gate_command
from skipcost.bench.commands import rewritings as rewritings_command
from skipcost.bench.commands import show as showing
from skipcost.bench.commands.explain import print_explanation
from skipcost.bench.commands.plan import preview, print_preview, slow_precisions
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
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.environment import cpus
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.streams import steady_streams
from skipcost.bench.sweeps.driver import Server, failed, has_numbers, pending, recognised
from skipcost.bench.sweeps.driver import sweep as run_sweep
from skipcost.bench.sweeps.plan import Plan, PlannedCase, load_plan
from skipcost.bench.units import parse_size
from skipcost.kernels.errors import PIPE_CLOSED, Stopped, flushed, stoppable
from skipcost.unet_models import ModelSpec
from skipcost.unet_models.spec import suggest

app = typer.Typer(
    help="What a U-Net variant costs, where the cost comes from, and whether your change made it worse.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a limit
MOST_REASONS = 10  # that a sweep tells at its end


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
    again: Annotated[bool, typer.Option("--again", help="measure everything anew; the newer rows are read")] = False,  # noqa: FBT002
    retry: Annotated[bool, typer.Option("--retry", help="try what failed again; the newer rows are read")] = False,  # noqa: FBT002
) -> None:
    """Measure every case of a sweep that the store does not have yet. Ctrl-C loses nothing; run it again to go on."""
    counts: dict[str, int] = {}
    repeated = OUTCOMES if again else FAILED if retry else ()
    with (
        _planned(sweep, model, settings, device) as (planned, server),
        create_store(path := store or Path("results") / f"{planned.name}.sqlite") as opened,
        progress_bar() as progress,
    ):
        todo = pending(planned, opened, server.environment["fingerprint"], repeated)
        for said in slow_precisions(todo):
            ERR.print(said)
        bar = progress.add_task("", total=len(todo))

        def tell(case: PlannedCase, results: list[Result]) -> None:
            for result in results:
                counts[result.outcome] = counts.get(result.outcome, 0) + 1
            progress.update(bar, advance=1, description=case.case.spec.label)

        try:
            run_sweep(planned, opened, server, seed, tell, repeated)
        except Stopped as stop:
            stop.add_note("what was measured is kept, run the same command again to go on")
            raise
        rows = recognised(planned, opened), opened, server.environment["fingerprint"]
        found, failures = has_numbers(*rows), failed(*rows)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "nothing was missing"
    ERR.print(f"{len(planned.cases)} cases in {path}; this run added: {told}")
    for text, reason in planned.left_out.items():
        ERR.print(f"left out: {text}: {reason}")
    if not found:
        ERR.print(f"skipcost: nothing of what was asked for has a number in {path}")
    _tell_failures(failures, MOST_REASONS, f"`skipcost show {path}` has them all")
    if not found:
        raise typer.Exit(1)


def _tell_failures(results: Iterable[tuple[str, Result]], most: int | None = None, rest: str = "") -> None:
    """Say on stderr why there are rows without a number, each reason once, and how to try them again."""
    reasons = reasons_of(results)
    _tell("failed", reasons, most, rest)
    if reasons:
        ERR.print("`skipcost sweep` with --retry tries what failed again")


def _tell(word: str, reasons: list[str], most: int | None, rest: str) -> None:
    for reason in reasons[:most]:
        ERR.print(f"{word}: {reason}")
    if more := len(reasons[most:]) if most else 0:
        ERR.print(f"{word} for {more} more reasons: {rest}")


@app.command()
def show(
    store: DB,
    sort: Annotated[str | None, typer.Option(help="a column, e.g. latency_s")] = None,
    where: Annotated[str | None, typer.Option(help="an expression over columns, e.g. \"variant == 'unet'\"")] = None,
    form: Annotated[
        Format, typer.Option("--format", help="table is for people; the others have every column")
    ] = Format.TABLE,
    every: Annotated[bool, typer.Option("--all", help="models of your own as they were before an edit, too")] = False,  # noqa: FBT002
) -> None:
    """Print what a store holds: one row per case, a column per metric; notes and failures go to stderr."""
    with open_store(store) as opened:
        frame = showing.select(opened, where, sort, every=every)
        left_out = "" if every else showing.former_states(opened)
        labels = {case_id: case.spec.label for case_id, (case, _) in opened.cases().items()}
        table = opened.results(opened.newest().fingerprint, opened.cases())
    showing.write(frame, form.value, OUT, labels)
    if left_out:
        ERR.print(left_out)
    if form is Format.TABLE:
        shown = [(labels[case_id], each) for case_id in frame.index for each in table[case_id].values()]
        _tell("noted", notes_of(shown), MOST_REASONS, "the report marks each number")
        _tell_failures(shown)


@app.command()
def explain(
    label: Annotated[str, typer.Argument(help="a network, e.g. unet3+/d4/w64/concat")],
    size: SIZE = "512",
    batch: BATCH = 1,
    precision: Annotated[str, typer.Option(help=", ".join(CHOICES["precision"]))] = "fp32",
    mode: Annotated[str, typer.Option(help=", ".join(CHOICES["mode"]))] = "inference",
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show every edge of a network: how its map gets there, what it costs, how long it is held."""
    for name, value in (("precision", precision), ("mode", mode)):
        if value not in CHOICES[name]:
            raise BenchError(suggest(name, value, CHOICES[name]))
    try:
        facts = explain_places(ModelSpec.parse(label), parse_size(size), batch, precision, mode)
    except ValueError as error:
        raise BenchError(str(error)) from None
    OUT.print_json(data=facts) if as_json else print_explanation(facts, OUT)


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
    from skipcost.bench.kernels import __main__ as commands  # noqa: PLC0415 - bench.kernels is a program of its own

    sys.exit(commands.main(context.args))


app.command()(gate_command.baseline)
app.command()(gate_command.gate)
app.command()(ab_command.ab)
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
    steady_streams()
    try:
        with flushed():
            _told(command)
    except BrokenPipeError:
        raise SystemExit(PIPE_CLOSED) from None


def _told(command: Any) -> None:
    try:
        with stoppable(), flushed():
            command()
    except BenchError as error:
        ERR.print(f"skipcost: {error}")
        raise SystemExit(error.exit_code) from None
    except Stopped as stop:
        ERR.print(f"skipcost: {stop.sentence}")
        raise SystemExit(stop.exit_code) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            _defect()
        ERR.print(f"skipcost: cannot write: {error.strerror}; what was measured is kept: make room, and run again")
        raise SystemExit(4) from None
    except Exception:  # noqa: BLE001 - the last resort: nothing that the user did explains this one
        _defect()


def _defect() -> NoReturn:
    """End with the traceback of what is being handled in a log file."""
    ERR.print(f"skipcost: an unexpected error, which is a defect; its traceback is {_logged()}")
    raise SystemExit(4) from None


def _logged() -> str:
    """Write the traceback of what is being handled to a file, and say where; to stderr where no file can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="skipcost-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            traceback.print_exc(file=log)
    except OSError:
        traceback.print_exc()
        return "above"
    return f"in {log.name}"


if __name__ == "__main__":
    main()
