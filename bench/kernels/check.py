"""`skipcost kernels check`: every configuration of every kernel at the real shapes of the U-Net family, in float64.

Each result must be within the bound of rounding (`validate`), and the same bit for bit when it is computed again;
PyTorch's own implementations are shown beside ours. On a CPU, Triton's interpreter runs tiny shapes; what that cannot
show is races and asynchronous copies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import jobs
from skipcost.bench.kernels.cases import (
    INTERPRETED,
    NETWORKS,
    TINY,
    USEFUL,
    add_selection,
    chosen,
    distinct,
    forward_form,
    settings,
    tiles,
)
from skipcost.bench.kernels.jobs import Done, Job, Row
from skipcost.bench.kernels.judging import (
    FAILURES,
    implementations,
    job_bytes,
    limits_for,
    part_of,
    tile_of,
    verify,
    watched,
    what_of,
    why_not,
)
from skipcost.bench.streams import tell, visible, write_table
from skipcost.kernels.dispatch.call import OPS, Call
from skipcost.kernels.ops.launch import architecture_of

BATCHES = ((1, "inference"), (1, "training"), (2, "inference"), (2, "training"))
DATA = ("normal", "positive")  # only positive numbers show what is lost in sums that are too narrow


def make_jobs(calls: Sequence[Call], device: str) -> list[Job]:
    """List what is to be checked, the most useful first: shipped tiles on normal data, on positive, then all tiles.

    The interpreter is spared the last: what differs between tiles, it has no part in.
    """
    kind = architecture_of(device)
    first: dict[str, list[Job]] = {data: [] for data in DATA}
    others = []
    for call in calls:
        ways = {name: tiles(call, name, kind) for name in implementations(call, device)}
        shipped = tuple(part_of(name, each[0]) for name, each in ways.items())
        more = tuple(part_of(name, tile) for name, each in ways.items() for tile in each[1:])
        for data in DATA:
            first[data].append(Job(what_of(call, device, data), shipped, job_bytes(call)))
        if more and device == "cuda":
            others.append(Job(what_of(call, device), more, job_bytes(call)))
    return [*(job for data in DATA for job in first[data]), *others]


def run(calls: Sequence[Call], device: str, seconds: float) -> list[Row]:
    """Check calls on a device for at most so long and return a row for every configuration."""
    todo = make_jobs(calls, device)
    limits = limits_for(device, time.time() + seconds)
    return [as_row(done) for done in watched("check", todo, verify, limits)]


def as_row(done: Done) -> Row:
    """Return what is known of a part as one flat row; outcome "left out" where there was no time."""
    call = Call.parse(done.what["call"])
    row = done.row or jobs.failed("left out", "there was no time")
    return {"op": call.op, "call": call.key, "precision": call.precision, "data": done.what["kind"], **done.part, **row}


def failures(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that make a check fail."""
    return [row for row in rows if row["outcome"] in FAILURES]


def print_rows(rows: Sequence[Row]) -> None:
    """Write a line for each op, implementation and precision; then failures and refusals."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["op"], row["implementation"], row["precision"]].append(row)
    table: list[tuple[object, ...]] = []
    for key, members in groups.items():
        ran = [row for row in members if "worst" in row]
        counts = [sum(row["outcome"] == each for row in members) for each in ("ok", "unsupported", "left out")]
        worst: Any = max((row["worst"] for row in ran), default="-")
        table.append((*key, len({row["call"] for row in ran}), *counts, len(failures(members)), worst))
    head = ("op", "implementation", "precision", "shapes", "ok", "refused", "left out", "failed", "error/bound")
    write_table(head, table)
    print_grouped("failed", failures(rows))
    print_grouped("not run", [row for row in rows if row["outcome"] in ("unsupported", "out_of_memory")])


def print_grouped(title: str, rows: Sequence[Row]) -> None:
    """Write how often each op's implementation had each outcome, with the worst of them and its reason."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["op"], row["implementation"], row["outcome"]].append(row)
    for (op, name, outcome), members in groups.items():
        worst = max(members, key=lambda row: row.get("worst") or 0.0)
        tile = tile_of(worst)
        shape = worst["call"] + (f", {tile.name}" if tile else "")
        sys.stdout.write(f"{title}: {op} {name}: {len(members)} {outcome}, as {shape}: {visible(worst['note'])}\n")


def tell_left_out(rows: Sequence[Row], seconds: float) -> None:
    """Say on stderr how much there was no time for, by op and precision."""
    left: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["outcome"] == "left out":
            left[f"{row['op']} {row['precision']}"] += 1
    if left:
        named = ", ".join(f"{count} of {name}" for name, count in left.items())
        tell(f"{sum(left.values())} configurations left out, since --seconds {seconds:g} were over: {named}")


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser("skipcost kernels check", description=__doc__)
    made.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU; cpu is Triton's interpreter"
    )
    add_selection(made, 420)
    made.add_argument("--json", action="store_true", help="print JSON for a program")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if everything that ran is right, 1 if not."""
    given = parser().parse_args(argv)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = chosen(given.ops, "op", OPS)
    asked = settings(given.networks.split(",") if given.networks else NETWORKS if device == "cuda" else TINY, BATCHES)
    if missing := why_not(device):
        raise MachineError(missing)
    precisions = USEFUL if device == "cuda" else INTERPRETED
    if device == "cpu":
        tell(f"Triton's interpreter: {' and '.join(INTERPRETED)} only, it computes bf16 and tf32 as no GPU does")
    calls = [forward_form(call) for precision in precisions for each in asked for call in each.calls(precision)]
    rows = run(distinct(calls, ops), device, given.seconds)
    if given.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        print_rows(rows)
    tell_left_out(rows, given.seconds)
    return 1 if failures(rows) else 0
