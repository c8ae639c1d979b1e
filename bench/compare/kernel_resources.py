"""What compiled kernels need of a GPU, in the form that the exact gate compares: one case for each kernel and target.

`skipcost kernels resources` compiles, without a GPU; each side does so in a process of its own. With one Triton equal
source gives equal numbers, so any change is a verdict here, where `kernels.baseline` asks what may ship.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from skipcost.bench.compare.baseline import Baseline, Entry
from skipcost.bench.compare.revisions import Revision
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.measure.process import PYTHON, finished
from skipcost.kernels.verify.baseline import PATHS, baseline_for

TARGETS = ("sm_90", "gfx942")
NUMBERS = (
    "registers", "spilled_bytes", "shared_bytes", "instructions", "accesses", "wide_accesses", "tensor_core",
    "copy_engine", "async_copies", "blocks",
)  # fmt: skip
MORE_IS_BETTER = frozenset({*PATHS, "blocks"})  # blocks: that fit a multiprocessor at once
UPDATE = "skipcost kernels resources --write-baseline"
PROGRAM = "skipcost.bench.kernels"  # run as a module
SAID = (0, 1)  # exit codes with which the command has said what it found
PROBLEM = re.compile(r"(?P<name>.+?) on (?P<target>\w+): (?P<what>.+)")


def compiled(
    revision: Revision | None, targets: Sequence[str] = TARGETS
) -> tuple[Baseline, dict[tuple[str, str], str]]:
    """Compile a revision's kernels, or this tree's: what they need, and what is wrong with one by (key, number).

    A kernel that does not compile is there without a number. MachineError where nothing can be compiled.
    """
    words = ["resources", "--json", *(word for target in targets for word in ("--target", target))]
    command = revision.command(PROGRAM, *words) if revision else [*PYTHON, "-m", PROGRAM, *words]
    environment = revision.environment() if revision else None
    done = finished(command, env=environment)
    where = f"revision {revision.commit[:12]}" if revision else "the working tree"
    try:
        found = json.loads(done.stdout) if done.returncode in SAID else None
    except json.JSONDecodeError:
        found = None
    if not found:
        message = f"`skipcost kernels resources` fails at {where}: {' '.join(done.stderr.split())[-400:]}"
        raise MachineError(message)
    problems: dict[tuple[str, str], str] = {}
    for told in filter(None, map(PROBLEM.fullmatch, found["problems"])):
        kernel = told["name"], told["target"]
        problems[kernel] = f"{problems[kernel]}; {told['what']}" if kernel in problems else told["what"]
    side = _baseline(found["rows"])
    broken = {_key(*kernel): Entry(" on ".join(kernel), {}) for kernel in problems}
    reasons = {(_key(*kernel), number): what for kernel, what in problems.items() for number in NUMBERS}
    return replace(side, entries=broken | side.entries), reasons


def reviewed(version: str, targets: Sequence[str] = TARGETS) -> Baseline:
    """The baseline that ships for a Triton, or the newest other one; BenchError where there is none to compare with."""
    try:
        stored = baseline_for(version)
    except ValueError as error:
        raise BenchError(str(error)) from None
    rows = [{"name": name, **asdict(row)} for (name, _), row in stored.rows.items()] if stored else []
    kept = [row for row in rows if row["target"] in targets]
    if not kept:
        message = f"no baseline of kernels has a row of {' or '.join(targets)}: `{UPDATE}` writes one"
        raise BenchError(message)
    return _baseline(kept)


def _key(name: str, target: str) -> str:
    return json.dumps({"kernel": name, "target": target}, sort_keys=True, separators=(",", ":"))


def _baseline(rows: Iterable[Mapping[str, Any]]) -> Baseline:
    entries, version = {}, "unknown"
    for row in rows:
        kernel = row["name"], row["target"]
        entries[_key(*kernel)] = Entry(
            " on ".join(kernel), {number: row[number] for number in NUMBERS if number in row}
        )
        version = row["triton"]
    return Baseline("kernels", {"triton": version}, entries)
