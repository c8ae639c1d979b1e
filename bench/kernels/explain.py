"""`skipcost kernels explain LABEL`: which implementation runs each layer of a network on a card, and why."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

from skipcost.bench.streams import write_table
from skipcost.bench.units import MAX_BATCH, parse_number, parse_size
from skipcost.kernels.devices import Device, device_or_guess, devices
from skipcost.kernels.dispatch.call import MODES, PRECISIONS
from skipcost.kernels.dispatch.choose import choose, predict
from skipcost.kernels.dispatch.network_calls import network_calls
from skipcost.unet_models.spec import ModelSpec

US = 1e6  # microseconds in a second
WAYS = {"reference": "eager PyTorch", "cudnn": "batch norm folded into cuDNN", "chosen": "as chosen here"}


def explain(label: str, batch: int, size: tuple[int, int], mode: str, precision: str, card: Device) -> dict[str, Any]:
    """Return the choice of every call of a network on a card, and the sum of the seconds of each way to run it all.

    Seconds of a call are measured where somebody measured it on that card, else predicted from bytes and MACs.
    """
    rows = []
    totals = dict.fromkeys(WAYS, 0.0)
    for where, call in network_calls(ModelSpec.parse(label), batch, *size, mode, precision):
        choice = choose(call, card)
        seconds = {name: choice.seconds.get(name) or predict(call, name, card) for name in ("reference", "cudnn")}
        if call.op in ("up_conv", "crop_concat"):
            seconds["cudnn"] = seconds["reference"]
        seconds["chosen"] = choice.seconds.get(choice.implementation, seconds["reference"])
        for way in WAYS:
            totals[way] += seconds[way]
        rows.append(
            {
                "where": where,
                "call": call.key,
                "implementation": choice.implementation,
                "origin": choice.origin,
                "why": choice.why,
                "seconds": seconds["chosen"],
                "macs": call.macs,
                "bytes": call.bytes,
            }
        )
    return {
        "label": label,
        "batch": batch,
        "size": list(size),
        "mode": mode,
        "precision": precision,
        "card": card.name,
        "card_origin": card.guess or "data sheet",
        "calls": rows,
        "seconds": totals,
    }


def print_explanation(facts: dict[str, Any]) -> None:
    """Write the table that people read: a line per call, then the sums."""
    write = sys.stdout.write
    height, width = facts["size"]
    write(f"{facts['label']}, {facts['mode']}, batch {facts['batch']}, {height}x{width}, {facts['precision']}\n")
    write(f"on {facts['card']} ({facts['card_origin']})\n\n")
    table = []
    for row in facts["calls"]:
        op, _, shape = row["call"].partition(" ")
        shape = shape.removesuffix(f" {facts['precision']} {facts['mode']}").partition(" ")[2]
        time = f"{row['seconds'] * US:.1f} us"
        table.append((row["where"], f"{op} {shape}", row["implementation"], time, row["origin"], row["why"]))
    write_table(("where", "op", "runs on", "time", "from", "why"), table)
    write("\nall calls, pooling and up-sampling without weights left out:\n")
    for way, title in WAYS.items():
        write(f"  {title:30s} {facts['seconds'][way] * US:10.1f} us\n")


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser("skipcost kernels explain", description=__doc__)
    made.add_argument("label", help="a network, e.g. unet3+/d4/w64/concat")
    made.add_argument("--size", default="512", help="of the image: 512, or 480x640 (height x width)")
    made.add_argument("--batch", type=partial(parse_number, "--batch", low=1, high=MAX_BATCH), default=1)
    made.add_argument("--precision", default="bf16", choices=PRECISIONS)
    made.add_argument("--mode", default="inference", choices=MODES)
    made.add_argument("--card", help=f"default: this machine's, or {_usual().name}; known: {', '.join(devices())}")
    made.add_argument("--json", action="store_true", help="print JSON for a program")
    return made


def _usual() -> Device:
    return next(iter(devices().values()))


def main(argv: list[str]) -> int:
    """Run the command; ValueError or BenchError says what is wrong with its arguments."""
    given = parser().parse_args(argv)
    card, note = _card(given.card)
    facts = explain(given.label, given.batch, parse_size(given.size), given.mode, given.precision, card)
    if given.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    print_explanation(facts)
    sys.stdout.write(note)
    return 0


def _card(name: str | None) -> tuple[Device, str]:
    """Return the card that was named, or this machine's; without either the first known one, and a note of that."""
    if name:
        return device_or_guess(name), ""
    import torch  # noqa: PLC0415 - needed only to ask for this machine's card

    if torch.cuda.is_available():
        from skipcost.kernels.ops.launch import architecture_of  # noqa: PLC0415 - imports torch

        return device_or_guess(torch.cuda.get_device_name(), architecture_of("cuda")), ""
    return _usual(), "\nThis machine has no GPU: here the PyTorch reference runs. Another card: --card\n"
