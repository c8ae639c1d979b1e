"""`skipcost counters`: several counters on one network, side by side, and the operator at which they part."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.console import BATCH, JSON, OUT, SIZE, Column, Screen, number
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.units import parse_size
from skipcost.unet_models import ModelSpec
from skipcost.unet_models.spec import MAX_CHANNELS

if TYPE_CHECKING:
    from skipcost.bench.measure.arithmetic import Place
    from skipcost.bench.measure.counters import Answer, Part

MOST_PARTS = 4  # in a table's cell; JSON has all
COLUMNS = (
    Column("counter"),
    Column("MACs", right=True),
    Column("off by", right=True),
    Column("from", drop=1),
    Column("where it parts from arithmetic", prose=True),
)


def counters(
    label: Annotated[str | None, typer.Argument(help="a network, e.g. unet/d4/w32/concat", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:factory of a model of your own, in place of a label")
    ] = None,
    size: SIZE = "128",
    batch: BATCH = 1,
    in_channels: Annotated[int, number("of the image that --model reads", 1, MAX_CHANNELS)] = 1,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Count one network's MACs with every counter at hand, and say at which operator each parts from arithmetic."""
    if (label is None) == (model is None):
        message = "name one network: a label such as unet/d4/w32/concat, or --model package.module:factory"
        raise BenchError(message)
    height, width = parse_size(size)
    try:
        spec = ModelSpec.parse(label) if label else Factory(model or "", in_channels=in_channels)
        case = Case(spec=spec, batch=batch, height=height, width=width)
    except ValueError as error:
        raise BenchError(str(error)) from None
    if refusal := refusal_of(case):
        raise BenchError(refusal)
    facts = examine(case)
    OUT.print_json(data=facts) if as_json else print_counters(facts, OUT)


def examine(case: Case) -> dict[str, Any]:
    """Everything that the command shows, as JSON values; BenchError where the model itself does not run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler announces itself on stderr; read once, by torch
    from skipcost.bench.measure.counters import aliases, ask_all  # noqa: PLC0415 - imports torch

    try:
        places, answers = ask_all(case)
        several = aliases(case)
    except Exception as error:
        if case.factory is None:
            raise
        message = f"{case.spec.label} cannot be counted: {'; '.join([str(error), *getattr(error, '__notes__', [])])}"
        raise BenchError(message) from None
    macs = sum(place.macs for place in places)
    if case.factory is None:
        macs = case.batch * case.graph().conv_macs(case.height, case.width)
    return {
        "network": case.spec.label,
        "size": [case.height, case.width],
        "batch": case.batch,
        "arithmetic": {"macs": macs, "kinds": _sums(places, "kind"), "layers": _sums(places, "layer")},
        "aliases": several,
        "counters": [_answer(each, macs) for each in answers],
    }


def _sums(places: list[Place], what: str) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for place in places:
        sums[getattr(place, what)] += place.macs
    return dict(sums)


def _answer(answer: Answer, macs: int) -> dict[str, Any]:
    return {
        "counter": answer.counter,
        "version": answer.version,
        "conversion": answer.conversion,
        "macs": answer.macs,
        "difference": _difference(answer, macs),
        "parts": [
            {
                "kind": part.kind,
                "macs": part.macs,
                "arithmetic_macs": part.arithmetic,
                "layers": [
                    {"layer": name, "macs": theirs, "arithmetic_macs": exact} for name, theirs, exact in part.layers
                ],
                "words": _words(part, macs),
            }
            for part in answer.parts
        ],
        "note": answer.note,
    }


def _difference(answer: Answer, macs: int) -> float | None:
    """How far a counter is off, of the exact MACs; None without a number, and where it counts something of nothing."""
    if answer.macs is None or (answer.macs and not macs):
        return None
    return answer.macs / macs - 1 if macs else 0.0


def _off(counter: dict[str, Any]) -> str:
    """A difference for people: a sum is exact only where nothing in it is off."""
    if counter["difference"] is None:
        return "-"
    if counter["difference"]:
        return f"{counter['difference']:+.2%}"
    return "in sum exact" if counter["parts"] else "exact"


def _words(part: Part, macs: int) -> str:
    """One part in words: how much is too much or too little, and the layer at which it is most."""
    off = part.macs - part.arithmetic
    share = f"{off / macs:+.2%} of the total" if macs else f"{figures.text(off, 'macs')}"
    if not part.arithmetic:
        return f"adds {figures.text(part.macs, 'macs')} for {part.kind} ({share})"
    if not part.macs:
        return f"leaves {part.kind} out ({share})"
    worst = ""
    if part.layers:
        name, theirs, exact = part.layers[0]
        worst = f", most at {name or 'the network itself'}" + (f" ({theirs / exact:.3g} times)" if exact else "")
    return f"{part.kind} {part.macs / part.arithmetic:.4g} times ({share}){worst}"


def print_counters(facts: dict[str, Any], console: Screen) -> None:
    """The table for people: a line per counter, arithmetic first."""
    exact = facts["arithmetic"]
    height, width = facts["size"]
    kinds = ", ".join(f"{kind} {figures.text(macs, 'macs')}" for kind, macs in exact["kinds"].items())
    console.print(f"{facts['network']}  {height}x{width}, batch {facts['batch']}, forward")
    if facts["aliases"]:
        several = "; ".join(f"{first} is also {', '.join(others)}" for first, others in facts["aliases"].items())
        console.print(f"registered under several names, counted once, under the first: {several}")
    rows = [("arithmetic (counted)", f"{exact['macs']:,}", "", "weights x positions", kinds)]
    for each in facts["counters"]:
        name = f"{each['counter']} {each['version']}".strip()
        if each["macs"] is None:
            rows.append((name, "-", "-", each["conversion"], each["note"]))
            continue
        words = [part["words"] for part in each["parts"]]
        more = [f"{len(words) - MOST_PARTS} more in --json"] if len(words) > MOST_PARTS else []
        said = "; ".join(words[:MOST_PARTS] + more) or "nowhere"
        rows.append((name, f"{each['macs']:,.0f}", _off(each), each["conversion"], said))
    console.table(COLUMNS, rows, more="--json has it")
