"""`skipcost rewritings`: which convolutions `backend=rewritten` runs at low resolution, what both forms cost, and why.

Arithmetic alone; needs no torch. What a network costs as it is defined: `skipcost explain`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from skipcost.bench import figures
from skipcost.bench.cases import CHOICES, Case
from skipcost.bench.console import JSON, OUT, SIZE
from skipcost.bench.errors import BenchError
from skipcost.bench.units import parse_size
from skipcost.kernels.tap_choice import executed_macs, rewritings
from skipcost.unet_models import ModelSpec


def rewritings_command(
    label: Annotated[str, typer.Argument(help="a network, e.g. unet3+/d4/w64/concat")],
    size: SIZE = "512",
    batch: int = 1,
    precision: Annotated[str, typer.Option(help=", ".join(CHOICES["precision"]))] = "fp32",
    mode: Annotated[str, typer.Option(help=", ".join(CHOICES["mode"]))] = "inference",
    device: Annotated[str, typer.Option(help="whose rates are counted with: " + ", ".join(CHOICES["device"]))] = "cpu",
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show which convolutions backend=rewritten computes at low resolution, what both forms cost, and why."""
    height, width = parse_size(size)
    try:
        spec = ModelSpec.parse(label)
        case = Case(spec, batch, height, width, mode, precision, device=device, backend="rewritten")
        facts = facts_of(case)
    except ValueError as error:
        raise BenchError(str(error)) from None
    OUT.print_json(data=facts) if as_json else print_rewritings(facts, OUT)


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


def print_rewritings(facts: dict[str, Any], console: Console) -> None:
    """The table for people, with the reason under every edge."""
    ratio = facts["conv_macs"] / facts["executed_macs"]
    console.print(
        f"[bold]{facts['label']}[/bold]  {facts['input'][0]}x{facts['input'][1]}, batch {facts['batch']}, "
        f"{facts['mode']} in {facts['precision']} on {facts['device']}: "
        f"{figures.text(facts['conv_macs'], 'macs')} as defined, "
        f"{figures.text(facts['executed_macs'], 'macs')} as rewritten ({ratio:.2f}x less)"
    )
    if not facts["edges"]:
        console.print("No up-sampled map goes into a convolution as it is: nothing can be rewritten.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("edge", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for name in ("MACs direct", "at low res.", "bytes direct", "at low res."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", ratio=1)
    for each in facts["edges"]:
        table.add_row(
            each["edge"],
            each["form"],
            *(figures.text(each[name], "macs") for name in ("direct_macs", "tap_macs")),
            *(figures.text(each[name], "bytes") for name in ("direct_bytes", "tap_bytes")),
            each["why"],
            style=None if each["taken"] else "dim",
        )
    console.print(table)
    console.print("[dim]Bytes: maps read and written. All of it is counted; what a form takes is not measured.[/dim]")
