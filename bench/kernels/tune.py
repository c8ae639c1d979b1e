"""`skipcost kernels tune`: find the fastest tile of each shape on this GPU and write it down for the ops to use.

Every candidate is verified against float64 at the real shape before it is timed: tiles that are fast and wrong are
known (pytorch#173068). Timings are rows of a journal, `results/tune-DEVICE.jsonl`, which an interrupted run goes on
with. The file of winners is made from them, the same from the same timings: sorted, one row a line; what it had for
other shapes stays. Several shapes share a tile (`tiles.tuning_key`): theirs is the one that loses least against the
best of each, among those that were right and timed on all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import skipcost.kernels
from skipcost.bench.errors import MachineError
from skipcost.bench.kernels.cases import (
    NETWORKS,
    TILED,
    add_selection,
    chosen,
    distinct,
    form,
    forward_form,
    need,
    settings,
    tiles,
)
from skipcost.bench.kernels.check import print_grouped
from skipcost.bench.kernels.jobs import Row
from skipcost.bench.kernels.judging import FAILURES, Configuration, implementations, why_not
from skipcost.bench.kernels.measuring import open_bench
from skipcost.bench.streams import tell, write_table
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.ops.launch import architecture_of
from skipcost.kernels.ops.tiles import Tile, default_tile, tuned_row, tuning_key
from skipcost.kernels.outputs import check_output, write_file

PRECISIONS = ("bf16", "fp16", "tf32")  # fp32 has no tensor cores: there no kernel of ours is chosen
BATCHES = ((1, "inference"), (8, "inference"))
DIGITS = 3  # of the seconds that are written down
ORIGIN = ("torch", "triton", "cuda")


def candidates(calls: Iterable[Call], device: str) -> list[Configuration]:
    """Return every tile of every call's kernels."""
    kind = architecture_of(device)
    return [
        (call, name, tile)
        for call in calls
        for name in implementations(call, device)
        if form(call, name)
        for tile in tiles(call, name, kind)
    ]


def winners(rows: Iterable[Row]) -> list[Row]:
    """Return the tuned rows of a configuration file, sorted by key, from rows of timings."""
    timed: dict[str, dict[str, dict[Tile, float]]] = {}
    seen: dict[str, tuple[Call, Row]] = {}
    for row in rows:
        if row["outcome"] == "ok" and row["cache"] == "hot" and row["tile"]:
            call = Call.parse(row["call"])
            tile = Tile(**row["tile"])
            key = tuning_key(need(call), tile.form)
            timed.setdefault(key, {}).setdefault(call.key, {})[tile] = statistics.median(row["seconds"])
            seen.setdefault(key, (call, row))
    found = []
    for key, by_call in timed.items():
        call, row = seen[key]
        if chosen_tile := best_tile(by_call):
            found.append(_tuned(call, row, chosen_tile, by_call))
    return sorted(found, key=lambda each: each["key"])


def best_tile(by_call: dict[str, dict[Tile, float]]) -> Tile | None:
    """Return the tile that loses least against the best of each call, over all; None where none ran on all."""
    common = set.intersection(*(set(timed) for timed in by_call.values()))
    if not common:
        return None

    def loss(tile: Tile) -> float:
        return sum(math.log(timed[tile] / min(timed.values())) for timed in by_call.values())

    return min(sorted(common, key=lambda tile: tile.name), key=loss)


def _tuned(call: Call, row: Row, tile: Tile, by_call: dict[str, dict[Tile, float]]) -> Row:
    """Make a row: the tile, what it takes beside what the untuned one takes, where and when it was measured."""
    untuned = default_tile(need(call), tile.form)
    first = by_call[call.key]
    origin: dict[str, Any] = {
        "call": call.key,
        "seconds": _rounded(first[tile]),
        "untuned_seconds": _rounded(first[untuned]) if untuned in first else None,
        "device": row["device"]["name"],
        **{name: row["versions"].get(name) for name in ORIGIN},
        "date": row["time"][:10],
    }
    return tuned_row(need(call), tile.form, tile, **origin)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows into a configuration file, in place of those of the same keys: one a line, so that diffs are lines."""
    merged = {row["key"]: row for row in [*read_tuned(path), *rows]}
    lines = ",\n".join(json.dumps(merged[key], sort_keys=True) for key in sorted(merged))
    write_file(path, f'{{"rows": [\n{lines}\n]}}\n')


def read_tuned(path: Path) -> list[Row]:
    """Return the rows of a configuration file; none where there is no file. ValueError for a file of another kind."""
    if not path.is_file() or not path.stat().st_size:
        return []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["rows"]
        known = isinstance(kept, list) and all(isinstance(row["key"], str) for row in kept)
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        message = f"{path} is no file of tiles that `skipcost kernels tune` wrote: name another file with -o"
        raise ValueError(message)
    return list(kept)


def print_winners(rows: Sequence[Row]) -> None:
    """Write a line for each tuned shape: the tile and what it gained."""
    table = []
    for row in rows:
        before, after = row["untuned_seconds"], row["seconds"]
        gain = before / after if before else "-"
        table.append((row["key"], Tile(**row["tile"]).name, after * 1e6, gain))
    write_table(("shape", "tile", "us", "of untuned"), table)


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser("skipcost kernels tune", description=__doc__)
    made.add_argument("-o", "--output", type=Path, help="the file of winners; default: the package's, for this GPU")
    made.add_argument("--journal", type=Path, help="the timings, to go on with; default results/tune-DEVICE.jsonl")
    add_selection(made, 420)
    return made


def main(argv: Sequence[str], device: str = "cuda", **options: Any) -> int:
    """Run the command; 0, or 1 if a candidate failed. `device` and `options` (of `open_bench`) are for tests."""
    given = parser().parse_args(argv)
    asked = settings(given.networks.split(",") if given.networks else NETWORKS, BATCHES)
    ops = chosen(given.ops, "op", TILED) if given.ops else TILED
    if device == "cuda" and (missing := why_not(device)):
        raise MachineError(missing)
    path = given.output or Path(skipcost.kernels.__path__[0]) / "configs" / f"{architecture_of(device) or device}.json"
    check_output(path, [given.journal] if given.journal else [])
    read_tuned(path)
    bench = open_bench(given.journal, "tune", device, given.seconds, caches=("hot",), **options)
    calls = [forward_form(call) for name in PRECISIONS for each in asked for call in each.calls(name)]
    left = bench.time_calls("tune", candidates(distinct(calls, ops), device))
    rows = bench.journal.rows
    tuned = winners(rows)
    write(tuned, path)
    print_winners(tuned)
    print_grouped("failed", [row for row in rows if row["outcome"] in FAILURES])
    sys.stdout.flush()
    tell(f"{len(tuned)} tiles in {path}, from {len(rows)} timings in {bench.journal.path}")
    if left:
        tell(f"{left} candidates left out, since --seconds {given.seconds:g} were over; the same command goes on")
    return 1 if any(row["outcome"] in FAILURES for row in rows) else 0
