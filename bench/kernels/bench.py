"""`skipcost kernels bench`: every call and every network, ours and PyTorch's ways, timed on equal terms.

Equal terms: channels_last, the same precision, cuDNN trying its algorithms, CUDA graphs on both sides, nothing timed
that has not been verified first. Rows are raw samples (`journal`); losses are printed as plainly as wins. They also go
to this machine's map of winners, which dispatch reads: networks on our kernels, which come after the calls, run by it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import networks
from skipcost.bench.kernels.cases import LIBRARIES, NETWORKS, Setting, add_selection, chosen, distinct, settings, tiles
from skipcost.bench.kernels.check import print_grouped
from skipcost.bench.kernels.jobs import Row
from skipcost.bench.kernels.judging import FAILURES, Configuration, implementations, watched, why_not
from skipcost.bench.kernels.measuring import Bench, open_bench
from skipcost.bench.measure.journal import identity
from skipcost.bench.streams import tell, visible, write_table
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import OPS, Call
from skipcost.kernels.ops.launch import architecture_of

PRECISION = "bf16"
BATCHES = ((1, "inference"), (8, "inference"), (8, "training"))
PATIENCE_SECONDS = 400.0  # for one network: max-autotune tries some twenty kernels for each of its convolutions
OURS = ("triton", "tma", "fused")
Stage = tuple[str, Callable[[], int]]


def shipped(calls: Iterable[Call], device: str) -> list[Configuration]:
    """Return every implementation of every call, with the tile that ships for it."""
    kind = architecture_of(device)
    return [(call, name, tiles(call, name, kind)[0]) for call in calls for name in implementations(call, device)]


def time_networks(bench: Bench, title: str, rows: Sequence[Row]) -> int:
    """Time whole networks, given as rows without numbers; return for how many time ran out."""
    todo = [row for row in rows if identity(row) not in bench.journal.known]
    work = networks.make_jobs(todo, bench.device, bench.budget or networks.BUDGET)
    limits = replace(bench.alone, patience=PATIENCE_SECONDS)
    left = 0
    for done in watched(title, work, networks.take, limits):
        if done.row is None:
            left += 1
            continue
        found: Row = {
            "seconds": [],
            **dict.fromkeys(("cache", "graph", "saved_bytes", "peak_bytes", "worst")),
            **done.row,
        }
        macs = found.pop("macs", 0)
        rate = macs / statistics.median(found["seconds"]) if found["seconds"] else 0
        share = rate / bench.ceilings["macs_per_s"][PRECISION] or None
        bench.journal.add({**networks.row_of(done), **found, "fraction_of_copy": None, "fraction_of_matmul": share})
    return left


def stages(bench: Bench, asked: Sequence[Setting], ops: Sequence[str], only: str | None) -> Iterator[Stage]:
    """List the work, the most useful first: calls at inference, networks, the other calls, networks that compile."""
    calls = distinct((call for each in asked for call in each.calls(PRECISION)), ops)
    first = [call for call in calls if call.mode == "inference"]
    others = [call for call in calls if call.mode != "inference"]
    found: list[Stage] = [
        ("calls at inference", partial(bench.time_calls, "inference", shipped(first, bench.device))),
        ("networks", partial(time_networks, bench, "networks", networks.wanted(asked, networks.QUICK_WAYS))),
        ("calls in training", partial(bench.time_calls, "training", shipped(others, bench.device))),
    ]
    found += [
        (f"networks, {way}", partial(time_networks, bench, way, networks.wanted(asked, [way])))
        for way in networks.SLOW_WAYS
    ]
    yield from (stage for stage in found if only is None or stage[0].startswith(only))


def print_calls(rows: Sequence[Row]) -> None:
    """Write a line for each call: the best of PyTorch's and the best of ours with hot caches; losses first."""
    best: dict[str, dict[bool, tuple[float, Row]]] = {}
    for row in rows:
        if row.get("call") and row["outcome"] == "ok" and row["cache"] == "hot":
            seconds, own = statistics.median(row["seconds"]), row["implementation"] not in LIBRARIES
            known = best.setdefault(row["call"], {})
            if own not in known or seconds < known[own][0]:
                known[own] = seconds, row
    compared = {key: (pair[False], pair[True]) for key, pair in best.items() if len(pair) == 2}  # noqa: PLR2004 - both
    if not compared:
        return
    table = []
    for key, ((theirs, their_row), (ours, our_row)) in sorted(compared.items(), key=lambda item: _gain(item[1])):
        shares = [_percent(our_row[each]) for each in ("fraction_of_copy", "fraction_of_matmul")]
        names = their_row["implementation"], our_row["implementation"]
        table.append((key, names[0], theirs * 1e6, names[1], ours * 1e6, theirs / ours, *shares))
    head = ("call", "best of PyTorch's", "us", "best of ours", "us", "speed-up", "of copy", "of matmul")
    write_table(head, table)
    gains = [_gain(pair) for pair in compared.values()]
    wins = sum(each > 1 for each in gains)
    mean = statistics.geometric_mean(gains)
    sys.stdout.write(f"ours is faster in {wins} of {len(gains)} calls, not in the others; mean {mean:.2f}x\n\n")


def _gain(pair: tuple[tuple[float, Any], tuple[float, Any]]) -> float:
    return pair[0][0] / pair[1][0]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def print_networks(rows: Sequence[Row]) -> None:
    """Write a line for each way of each network, the fastest of a case first; what failed with its reason."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("network"):
            cases.setdefault((row["network"], row["case"]), []).append(row)
    table = []
    for key, members in cases.items():
        ran = [row for row in members if row["outcome"] == "ok"]
        seconds = {row["implementation"]: statistics.median(row["seconds"]) for row in ran}
        for row in sorted(ran, key=lambda row: seconds[row["implementation"]]):
            own = seconds[row["implementation"]]
            gain = seconds["eager"] / own if "eager" in seconds else "-"
            held = ["-" if row[name] is None else f"{row[name] / 2**20:.0f}" for name in ("saved_bytes", "peak_bytes")]
            table.append((*key, row["implementation"], own * 1e3, gain, _percent(row["fraction_of_matmul"]), *held))
    if table:
        write_table(("network", "case", "way", "ms", "of eager", "of matmul", "saved MiB", "peak MiB"), table)
    for key, members in cases.items():
        for row in (row for row in members if row["outcome"] != "ok"):
            sys.stdout.write(f"{' '.join(key)} {row['implementation']}: {row['outcome']}: {visible(row['note'])}\n")
    sys.stdout.write("\n" * bool(cases))


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser("skipcost kernels bench", description=__doc__)
    made.add_argument(
        "-o", "--output", type=Path, help="JSON lines to go on with; default results/kernels-DEVICE.jsonl"
    )
    made.add_argument("--only", choices=("calls", "networks"), help="leave the other out")
    add_selection(made, 420)
    return made


def main(argv: Sequence[str], device: str = "cuda", **options: Any) -> int:
    """Run the command; 0, or 1 if a kernel of ours failed. `device` and `options` (of `open_bench`) are for tests."""
    given = parser().parse_args(argv)
    asked = settings(given.networks.split(",") if given.networks else NETWORKS, BATCHES)
    ops = chosen(given.ops, "op", OPS)
    if device == "cuda" and (missing := why_not(device)):
        raise MachineError(missing)
    bench = open_bench(given.output, "kernels", device, given.seconds, copy=winners.own_file(), **options)
    left = 0
    for title, work in stages(bench, asked, ops, given.only):
        if missed := work():
            tell(f"{missed} configurations of {title!r} left out, since --seconds {given.seconds:g} were over")
            left += missed
    rows = bench.journal.rows
    print_calls(rows)
    print_networks(rows)
    print_grouped("failed", [row for row in rows if row.get("call") and row["outcome"] in FAILURES])
    again = "; the same command goes on with what was left out" if left else ""
    tell(f"{len(rows)} rows of this machine are in {bench.journal.path}{again}")
    return 1 if any(row["outcome"] in FAILURES and row["implementation"] in OURS for row in rows) else 0
