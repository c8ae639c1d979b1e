"""Sows the faults of `mutants.toml`, one at a time, into a copy of the kernels, and sees that a check finds each.

    python tests/helpers/mutants.py [--kernel conv ...]

A check that finds no fault proves nothing about what it passes. Run before a release, not in CI: it takes minutes.
Exit codes: 0 all found, 1 a fault survived or its text is no longer in the source, 4 the checks fail without a fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from places import HELPERS, TESTS

import skipcost.kernels

KERNELS = Path(skipcost.kernels.__file__).parent
TABLE = HELPERS / "mutants.toml"
TIMEOUT_S = 300.0  # a loop that does not end is found too; the checks of a kernel take a tenth of this
FAILED = 1  # pytest's exit code where tests failed; others say that it could not run them
# The copy must be what is imported, and not the package itself: then every fault would survive, or none be there.
PROGRAM = """
import sys, pytest, skipcost.kernels
assert skipcost.kernels.__file__.startswith(sys.argv[1]), skipcost.kernels.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""
# Of the package, the copy has the kernels; everything else is where it always is.
PACKAGE = "import pkgutil\n\n__path__ = pkgutil.extend_path(__path__, __name__)\n"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: `old`, which occurs once in `file` of the kernels, becomes `new`; `why`: what that would do."""

    kernel: str
    name: str
    file: str
    old: str
    new: str
    why: str

    def sow(self, text: str) -> str:
        """Return the source with the fault in it; ValueError where the place for it is not there or not unique."""
        if (count := text.count(self.old)) != 1:
            message = f"{self.kernel}, {self.name}: {count} places in {self.file} read {self.old!r}, not 1"
            raise ValueError(message)
        return text.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the checks said of a copy: killed, with by what; or survived; or broken, where they did not run at all."""

    word: str
    detail: str
    seconds: float


def read_table() -> tuple[dict[str, list[str]], list[Mutant]]:
    """Return what pytest is told for each kernel, and all mutants."""
    table = tomllib.loads(TABLE.read_text())
    checks = table.pop("checks")
    told = {
        kernel: ["-k", " ".join(each["select"].split()), *(str(TESTS / file) for file in each["files"])]
        for kernel, each in checks.items()
    }
    return told, [Mutant(kernel=kernel, **each) for kernel, rows in table.items() for each in rows]


def try_out(told: Sequence[str], mutant: Mutant | None) -> Outcome:
    """Run the checks against a copy of the kernels, with the fault of a mutant or with none."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "skipcost" / "kernels"
        shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy.parent / "__init__.py").write_text(PACKAGE)
        if mutant:
            (copy / mutant.file).write_text(mutant.sow((copy / mutant.file).read_text()))
        options = [
            "-x",
            "-q",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:cacheprovider",
            "--tb=short",
        ]
        command = [sys.executable, "-P", "-c", PROGRAM, folder, *options, *told]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome("killed", f"no end within {TIMEOUT_S:.0f} s", TIMEOUT_S)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return Outcome("survived", re.findall(r"\d+ passed", done.stdout)[-1], seconds)
    if done.returncode < 0:
        return Outcome("killed", f"the process died of signal {-done.returncode}", seconds)
    found = re.search(r"^FAILED \S+::(test_.+)$", done.stdout, re.MULTILINE)
    if done.returncode != FAILED or found is None:
        return Outcome("broken", f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}", seconds)
    return Outcome("killed", found[1], seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see above for its exit codes."""
    told, mutants = read_table()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=told, help="may be repeated; default: all")
    kernels = parser.parse_args(arguments).kernel or list(told)
    chosen = [mutant for mutant in mutants if mutant.kernel in kernels]
    outcomes: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kernel, outcome in zip(kernels, pool.map(lambda each: try_out(told[each], None), kernels), strict=True):
            sys.stdout.write(f"{kernel}: without a fault, {outcome.detail} in {outcome.seconds:.0f} s\n")
            if outcome.word != "survived":
                sys.stdout.write("checks that fail anyway find nothing\n")
                return 4
        for mutant, outcome in zip(
            chosen, pool.map(lambda each: try_out(told[each.kernel], each), chosen), strict=True
        ):
            outcomes.append(outcome.word)
            line = f"{outcome.word:8} {mutant.kernel}: {mutant.name} ({outcome.seconds:.0f} s): {outcome.detail}"
            sys.stdout.write(line if outcome.word == "killed" else f"{line}\n         it would: {mutant.why}")
            sys.stdout.write("\n")
            sys.stdout.flush()
    sys.stdout.write(f"{outcomes.count('killed')} of {len(outcomes)} faults found\n")
    return int(outcomes.count("killed") < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
