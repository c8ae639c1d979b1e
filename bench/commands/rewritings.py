"""`skipcost rewritings`: which convolutions `backend=rewritten` runs at low resolution, what both forms cost, and why.

Arithmetic alone, without torch, but for --measure. What a network costs as it is defined: `skipcost explain`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from skipcost.bench import figures
from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.console import BATCH, ERR, JSON, OUT, SIZE, Column, Screen, bold, number
from skipcost.bench.errors import BenchError
from skipcost.bench.units import MAX_THREADS, parse_size
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.low_resolution import calls_to_measure, executed_macs, rewritings
from skipcost.unet_models import ModelSpec

COLUMNS = (
    Column("edge"),
    Column("form"),
    Column("MACs direct", right=True),
    Column("at low res.", right=True),
    Column("bytes direct", right=True, drop=1),
    Column("bytes at low res.", right=True, drop=2),
    Column("why", prose=True),
)


def rewritings_command(
    label: Annotated[str, typer.Argument(help="a network, e.g. unet3+/d4/w64/concat")],
    size: SIZE = "512",
    batch: BATCH = 1,
    precision: Annotated[str, typer.Option(help=", ".join(CHOICES["precision"]))] = "fp32",
    mode: Annotated[str, typer.Option(help=", ".join(CHOICES["mode"]))] = "inference",
    device: Annotated[str, typer.Option(help="whose rates are counted with: " + ", ".join(CHOICES["device"]))] = "cpu",
    measure: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--measure", help="first time both forms on this CPU: from then on the faster is taken")
    ] = False,
    threads: Annotated[int, number("with --measure: of the CPU", 1, MAX_THREADS)] = 1,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show which convolutions backend=rewritten computes at low resolution, what both forms cost, and why."""
    height, width = parse_size(size)
    try:
        spec = ModelSpec.parse(label)
        case = Case(spec, batch, height, width, mode, precision, device=device, backend="rewritten")
        if measure:
            _measure(case, threads)
        facts = facts_of(case)
    except ValueError as error:
        raise BenchError(str(error)) from None
    OUT.print_json(data=facts) if as_json else print_rewritings(facts, OUT)


def _measure(case: Case, threads: int) -> None:
    """Time both forms of every edge's call that can be measured; rows go to this machine's map of winners."""
    if case.device != "cpu":
        message = (
            f"--measure times a CPU, not --device {case.device}; on a machine with a GPU, skipcost kernels bench "
            "--ops tap_first measures there what backend=rewritten then goes by"
        )
        raise BenchError(message)
    calls = calls_to_measure(case.graph(), case.height, case.width, precision=case.precision, device=case.device)
    if not calls:
        ERR.print(f"{case.spec.label} has no convolution over an interpolated map that is not cropped: nothing to time")
        return
    from skipcost.bench.kernels.forms import measure  # noqa: PLC0415 - torch, for this alone

    for done, call in enumerate(measure(calls, threads), 1):
        ERR.print(f"{done} of {len(calls)} timed: {call.key}")
    ERR.print(f"rows are in {winners.own_file()}; without them the choice is by counting again")


def facts_of(case: Case) -> dict[str, Any]:
    """Everything that the command shows, as JSON values, for the whole batch; ValueError where a map would vanish."""
    graph, where = case.graph(), {"precision": case.precision, "device": case.device, "mode": case.mode}
    made = rewritings(graph, case.height, case.width, batch=case.batch, **where)
    return {
        "label": case.spec.label,
        "input": [case.height, case.width],
        "batch": case.batch,
        **where,
        "conv_macs": case.batch * graph.conv_macs(case.height, case.width),
        "executed_macs": executed_macs(graph, case.height, case.width, batch=case.batch, **where),
        "edges": [{"edge": each.edge, "form": each.form, **asdict(each.choice)} for each in made],
    }


def print_rewritings(facts: dict[str, Any], console: Screen) -> None:
    """The table for people, with the reason under every edge."""
    ratio = facts["conv_macs"] / facts["executed_macs"]
    console.print(
        bold(facts["label"]),
        f" {facts['input'][0]}x{facts['input'][1]}, batch {facts['batch']}, "
        f"{facts['mode']} in {facts['precision']} on {facts['device']}: "
        f"{figures.text(facts['conv_macs'], 'macs')} as defined, "
        f"{figures.text(facts['executed_macs'], 'macs')} as rewritten ({ratio:.2f}x less)",
    )
    if not facts["edges"]:
        console.print("No up-sampled map goes into a convolution as it is: nothing can be rewritten.")
        return
    rows = [
        (
            each["edge"],
            each["form"],
            *(figures.text(each[name], "macs") for name in ("direct_macs", "tap_macs")),
            *(figures.text(each[name], "bytes") for name in ("direct_bytes", "tap_bytes")),
            each["why"],
        )
        for each in facts["edges"]
    ]
    console.table(COLUMNS, rows, ["" if each["taken"] else "dim" for each in facts["edges"]], "--json has them")
    console.print(
        "Bytes: maps read and written. Counted, but for times: those were measured on this machine.", style="dim"
    )
