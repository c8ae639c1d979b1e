"""The gate between exact numbers and latency: instructions of the suite's own Python, of two revisions, here and now.

A count depends on Python, on torch and on the machine's libraries, so none is kept from another day: both revisions are
counted by the same command, at the same time, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from skipcost.bench import callgrind
from skipcost.bench.callgrind import SUBJECTS
from skipcost.bench.errors import MachineError
from skipcost.bench.revisions import Revision
from skipcost.bench.verdicts import Verdict
from skipcost.kernels.serving import PYTHON, started

METRIC = "instructions"
TOOLS = ("valgrind", "callgrind_control", "callgrind_annotate")  # of one package
SCRIPT = Path(callgrind.__file__)


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions of one call by subject, and why a subject has none."""

    instructions: dict[str, int]
    failed: dict[str, str]


def why_not() -> str:
    """Why nothing can be counted here, in a sentence; "" where it can."""
    lacking = [name for name in TOOLS if shutil.which(name) is None]
    if not lacking:
        return ""
    return f"{', '.join(lacking)} cannot be run: install your system's package valgrind (apt-get install valgrind)"


def count(revision: Revision) -> Counts:
    """Count every subject of a revision; MachineError where valgrind is missing or fails."""
    with _counting(revision) as process:
        return _counts(revision, process)


def _counting(revision: Revision) -> AbstractContextManager[subprocess.Popen[str]]:
    if reason := why_not():
        raise MachineError(reason)
    return started([*PYTHON, str(SCRIPT)], env=_environment(revision))


def _counts(revision: Revision, process: subprocess.Popen[str]) -> Counts:
    said, errors = process.communicate()
    try:
        answer = json.loads(said)
    except json.JSONDecodeError:
        answer = {"error": f"exit code {process.returncode} {' '.join(errors.split())[-400:]}"}
    if not all(answer.get("instructions", {}).values()):
        answer = {"error": "a count is 0, so it saw nothing"}
    if "error" in answer:
        message = f"callgrind counts nothing at {revision.commit[:12]}: {answer['error']}"
        raise MachineError(message)
    return Counts({name: int(number) for name, number in answer["instructions"].items()}, answer["failed"])


def _environment(revision: Revision) -> dict[str, str]:
    """Variables that leave little to chance; the timer looks for its `python` on the path."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return revision.environment() | {"PATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


def count_both(base: Revision, now: Revision) -> tuple[Counts, Counts]:
    """Count two revisions side by side: what other processes do changes no count."""
    with _counting(base) as first, _counting(now) as second:
        return _counts(base, first), _counts(now, second)


def judge(base: Counts, now: Counts) -> list[Verdict]:
    """Compare every subject that either side has. Fewer instructions pass: there is no baseline to update."""
    names = dict.fromkeys((*base.instructions, *base.failed, *now.instructions, *now.failed))
    return [_verdict(name, base, now) for name in names]


def _verdict(name: str, base: Counts, now: Counts) -> Verdict:
    then, today = base.instructions.get(name), now.instructions.get(name)
    if then is None or today is None:
        word = "not_comparable" if then is today else "new" if then is None else "missing"
        why = "; ".join(side.failed[name] for side in (base, now) if name in side.failed)
        return Verdict(name, METRIC, word, then, today, why)
    ratio = today / then
    tolerance = SUBJECTS[name].tolerance
    interval = (ratio * (1 - tolerance), ratio * (1 + tolerance))
    word = "regressed" if interval[0] > 1 else "improved" if interval[1] < 1 else "unchanged"
    return Verdict(name, METRIC, word, then, today, ratio=ratio, interval=interval)
