"""Compile every kernel for GPUs that need not be here, and compare what it needs of them with the baseline.

What is compiled: a real shape for each kernel and form that ships, with the tile that ships for it, and each tile that
was tuned on the GPU in question (`gated`). The rules are those of `baseline.compare`. What is left out: speed, which
takes a GPU (`skipcost kernels bench`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import jobs
from skipcost.bench.kernels.jobs import Job, Limits, Row
from skipcost.bench.streams import tell, write_table
from skipcost.kernels.outputs import OutputError
from skipcost.kernels.verify.baseline import Key, Resources, baseline_for, compare, incomparable, write
from skipcost.kernels.verify.compiling import can_run, compile_launch, why_not
from skipcost.kernels.verify.gated import gated
from skipcost.kernels.verify.targets import TARGETS

DEFAULT_TARGETS = ("sm_90", "gfx942")
PROCESSES = 8  # at most: each takes 0.5 GB
PATIENCE_S = 600.0  # for one kernel, which takes 3 s
COLUMNS: dict[str, Callable[[Resources], object]] = {
    "target": lambda row: row.target,
    "warps": lambda row: row.warps,
    "regs": lambda row: row.registers,
    "spilled B": lambda row: row.spilled_bytes,
    "shared B": lambda row: row.shared_bytes,
    "mma": lambda row: row.tensor_core,
    "tma": lambda row: row.copy_engine,
    "cp.async": lambda row: row.async_copies,
    "16 B": lambda row: f"{row.wide_accesses}/{row.accesses}",
    "instr": lambda row: row.instructions,
    "blocks": lambda row: row.blocks,
    "occupancy": lambda row: f"{row.occupancy:.2f}",
    "limit": lambda row: row.limit,
}


def keys(targets: Sequence[str]) -> list[Key]:
    """What is gated on the targets, without what cannot run there and no op would launch."""
    return [
        (name, each) for each in targets for name, make in gated(each).items() if can_run(make(), TARGETS[each])
    ]  # fmt: skip


def measure(wanted: Sequence[Key]) -> tuple[dict[Key, Resources], list[str]]:
    """Compile on all cores: what each kernel needs, and a sentence for each that does not compile."""
    workers = min(os.cpu_count() or 1, PROCESSES, len(wanted))
    limits = Limits(math.inf, PATIENCE_S, workers if workers > 1 else 0)
    todo = [Job({}, ({"name": name, "target": target},)) for name, target in wanted]
    rows: dict[Key, Row] = {}
    for done in jobs.run(todo, take, limits):
        rows[done.part["name"], done.part["target"]] = done.row or {}
    found = {key: Resources(**rows[key]["found"]) for key in wanted if rows[key]["outcome"] == "ok"}
    return found, [f"{key[0]} on {key[1]}: {rows[key]['note']}" for key in wanted if key not in found]


def take(_what: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Compile kernels for targets; a row has the fields of `Resources`, or what the compiler said."""
    for part in parts:
        try:
            found = compile_launch(gated(part["target"])[part["name"]](), part["target"])
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways; the others still count
            cause: BaseException = error
            while cause.__cause__:  # Triton quotes the kernel, and chains what is wrong with it
                cause = cause.__cause__
            last = str(cause).strip().splitlines() or [""]
            yield jobs.failed("crash", f"does not compile: {type(cause).__name__}: {last[-1]}")
        else:
            yield {"outcome": "ok", "found": asdict(found)}


def rows(found: dict[Key, Resources]) -> list[dict[str, Any]]:
    """What was found, for JSON: the fields of `Resources` under the kernel's `name`, sorted."""
    return [{"name": name, **asdict(found[name, target])} for name, target in sorted(found)]


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("skipcost kernels resources", description=__doc__)
    made.add_argument(
        "--target", action="append", choices=TARGETS, help=f"may be repeated; default: {', '.join(DEFAULT_TARGETS)}"
    )
    made.add_argument("--json", action="store_true", help="print rows and problems as JSON instead of a table")
    made.add_argument("--write-baseline", action="store_true", help="make what is found the baseline of its targets")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if every kernel is as it should be, 1 if not. MachineError: nothing can be compiled here."""
    given = _parser().parse_args(argv)
    if reason := why_not():
        raise MachineError(reason)
    found, failed = measure(keys(list(dict.fromkeys(given.target or DEFAULT_TARGETS))))
    if given.write_baseline:
        tell("no baseline was written: not every kernel compiles" if failed else f"wrote {_written(found)}")
    baseline = baseline_for(next(iter(found.values())).triton) if found else None
    problems = [*failed, *compare(found, baseline)]
    warning = incomparable(found, baseline) if found else ""
    if given.json:
        report = {"rows": rows(found), "problems": problems, "warning": warning}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        ordered = sorted(found, key=lambda key: (key[1], key[0]))
        write_table(
            ("kernel", *COLUMNS), [(key[0], *(read(found[key]) for read in COLUMNS.values())) for key in ordered]
        )
        sys.stdout.writelines(f"problem: {each}\n" for each in problems)
    if warning:
        tell(warning)
    return 1 if problems else 0


def _written(found: dict[Key, Resources]) -> Path:
    try:
        return write(found)
    except OutputError as error:
        message = f"the baseline cannot be written ({error}): run this in a checkout of the repository"
        raise MachineError(message) from error
