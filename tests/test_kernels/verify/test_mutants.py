"""The table of seeded faults stays usable; `nox -s mutants` runs it."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from mutants import KERNELS, Mutant, read_table
from places import TESTS

CHECKS, MUTANTS = read_table()
LEAST = {"conv": 18}  # as promised; the other kernels have less to go wrong


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kernel}-{mutant.name}")
def test_every_fault_has_its_place(mutant: Mutant) -> None:
    """What is replaced occurs once in its file, and what comes out is another program that Python can read."""
    text = (KERNELS / mutant.file).read_text()

    changed = mutant.sow(text)

    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


def test_a_fault_without_a_place_is_refused() -> None:
    """The message says which fault, and where its text was looked for."""
    mutant = Mutant("conv", "nothing", "conv.py", "x", "y", "")

    with pytest.raises(ValueError, match=r"conv, nothing: 2 places in conv\.py read 'x', not 1"):
        mutant.sow("x x")


@pytest.mark.parametrize("kernel", CHECKS)
def test_every_kernel_has_enough_faults_and_its_checks_exist(kernel: str) -> None:
    """At least five, each with a name and a reason of its own."""
    rows = [mutant for mutant in MUTANTS if mutant.kernel == kernel]

    assert len(rows) >= LEAST.get(kernel, 5)
    assert max(Counter(row.name for row in rows).values()) == 1
    assert all(row.why for row in rows)
    assert all(Path(file).is_relative_to(TESTS) and Path(file).exists() for file in CHECKS[kernel][2:])


def test_no_fault_is_without_checks() -> None:
    """Rows of a kernel that has no table of checks would never run."""
    assert {mutant.kernel for mutant in MUTANTS} == set(CHECKS)
