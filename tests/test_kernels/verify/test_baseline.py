"""The gate's rules on made-up kernels, and the files that baselines are kept in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from skipcost.kernels.verify import baseline as module
from skipcost.kernels.verify.baseline import (
    Baseline,
    Key,
    Resources,
    baseline_for,
    compare,
    incomparable,
    parse,
    stored,
    stored_rows,
    write,
)

ROW = Resources(
    kernel="conv.conv",
    target="sm_90",
    triton="3.7.1",
    warps=4,
    registers=152,
    spilled_bytes=0,
    shared_bytes=73728,
    products=1,
    tensor_core=8,
    block_moves=0,
    copy_engine=0,
    async_copies=36,
    accesses=24,
    wide_accesses=8,
    instructions=1462,
    blocks=3,
    occupancy=0.1875,
    limit="registers+shared",
)
KEY: Key = ("conv/pointer", "sm_90")
BASELINE = Baseline("3.7.1", {KEY: ROW})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled_bytes": 4}, "spills registers, 4 bytes per thread"),
        ({"tensor_core": 0}, "lost its tensor cores: 8 instructions before, none now"),
        ({"async_copies": 0}, "lost its cp.async: 36 instructions before, none now"),
        ({"wide_accesses": 0}, "lost its 16-byte accesses: 8 instructions before, none now"),
        ({"occupancy": 0.125, "blocks": 2, "limit": "registers"}, "fell from 0.19 (3 blocks) to 0.12 (2), for want of"),
        ({"registers": 161}, "161 registers instead of 152, more than 8 off"),
        ({"registers": 143}, "143 registers instead of 152, more than 8 off"),
        ({"instructions": 1682}, "1682 instructions instead of 1462, more than 15% off"),
        ({"instructions": 1242}, "1242 instructions instead of 1462, more than 15% off"),
        ({"shared_bytes": 232449}, "shared memory of 232449 bytes is over the limit of 232448, so it cannot be"),
        ({"blocks": 0, "limit": "registers"}, "not one block fits a multiprocessor: too little of registers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_way_of_getting_worse_is_a_problem(change: dict[str, Any], problem: str) -> None:
    """One sentence names the kernel, the target, and what was and is."""
    problems = compare({KEY: replace(ROW, **change)}, BASELINE)

    assert any(each.startswith("conv/pointer on sm_90: ") and problem in each for each in problems), problems


def test_a_lost_copy_engine_is_a_problem() -> None:
    """A kernel that moved blocks by TMA and no longer does has lost what it was written for."""
    row = replace(ROW, block_moves=3, copy_engine=7)

    problems = compare({KEY: replace(row, copy_engine=0)}, Baseline("3.7.1", {KEY: row}))

    assert "lost its TMA: 7 instructions before, none now" in "".join(problems)


@pytest.mark.parametrize(
    "change", [{}, {"registers": 160}, {"registers": 144}, {"instructions": 1681}, {"occupancy": 0.25, "blocks": 4}]
)
def test_a_small_change_is_none(change: dict[str, Any]) -> None:
    """8 registers and 15 % of the instructions are another day's compiler; more blocks are welcome."""
    assert compare({KEY: replace(ROW, **change)}, BASELINE) == []


def test_kernels_and_rows_must_match() -> None:
    """A kernel that no row judges, and a row that judges no kernel, are problems; other targets' rows are not."""
    other = ("conv/tma", "sm_90")
    elsewhere = ("conv/pointer", "gfx942")
    baseline = Baseline("3.7.1", {KEY: ROW, elsewhere: replace(ROW, target="gfx942")})

    problems = compare({other: ROW}, baseline)

    assert problems == [
        "conv/pointer on sm_90: is in the baseline, but no kernel: write the baseline again if it is gone for good",
        "conv/tma on sm_90: has no row in the baseline: write it with --write-baseline if it is as it should be",
    ]


def test_of_a_target_that_the_baseline_lacks_the_absolute_rules_hold() -> None:
    """The others are compared, and a sentence says what was not."""
    found = {KEY: replace(ROW, registers=200), ("conv/pointer", "sm_80"): replace(ROW, target="sm_80", spilled_bytes=4)}

    assert incomparable(found, BASELINE) == (
        "the baseline has no row of sm_80: only spills, tensor cores and limits are checked there"
    )
    assert compare(found, BASELINE) == [
        "conv/pointer on sm_80: spills registers, 4 bytes per thread",
        "conv/pointer on sm_90: 200 registers instead of 152, more than 8 off",
    ]


def test_nothing_compiled_is_a_problem() -> None:
    """An empty run does not pass."""
    assert compare({}, BASELINE) == ["nothing was compiled, so nothing was checked"]


@pytest.mark.parametrize("baseline", [None, replace(BASELINE, triton="3.6.0")], ids=["none", "another"])
def test_without_a_comparable_baseline_the_absolute_rules_hold(baseline: Baseline | None) -> None:
    """Compilers differ in registers, so only spills, lost engines and limits count, and a sentence says so."""
    worse = {KEY: replace(ROW, registers=200, instructions=9000, async_copies=0, occupancy=0.125, blocks=2)}
    bad = replace(ROW, spilled_bytes=8, tensor_core=0, block_moves=3, shared_bytes=10**6)

    assert compare(worse, baseline) == []
    assert "only spills, tensor cores and limits are checked" in incomparable(worse, baseline)
    assert [each.partition(": ")[2][:20] for each in compare({KEY: bad}, baseline)] == [
        "spills registers, 8 ",
        "no tensor-core instr",
        "no copy-engine instr",
        "shared memory of 100",
    ]


def test_a_spill_that_was_accepted_is_none_until_it_grows() -> None:
    """The baseline is where a person wrote down that a few bytes are all right on some card."""
    accepted = Baseline("3.7.1", {KEY: replace(ROW, spilled_bytes=28)})

    assert compare({KEY: replace(ROW, spilled_bytes=28)}, accepted) == []
    assert "spills registers, 32 bytes" in "".join(compare({KEY: replace(ROW, spilled_bytes=32)}, accepted))


def test_a_baseline_is_written_sorted_a_row_a_line_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the targets that were compiled are replaced, others kept; the file is the same whatever the order."""
    monkeypatch.setattr(module, "FOLDER", tmp_path / "baselines")
    rows = {(name, target): replace(ROW, target=target) for name in ("b", "a") for target in ("sm_90", "gfx942")}

    path = write(rows)
    write({("c", "sm_90"): ROW})

    assert path == tmp_path / "baselines" / "triton-3.7.1.json"
    lines = path.read_text().splitlines()
    assert [line[:13] for line in lines[1:-1]] == ['  {"name": "a', '  {"name": "b', '  {"name": "c']
    assert parse(path.read_text()).rows[("b", "gfx942")] == rows["b", "gfx942"]
    assert baseline_for("3.7.1") == stored()[0]
    assert stored_rows()[0] == {"name": "a", **asdict(rows["a", "gfx942"])}


def test_the_newest_baseline_stands_in_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are numbers: 3.10 is newer than 3.9. With no baseline at all there is none."""
    monkeypatch.setattr(module, "FOLDER", tmp_path)

    assert baseline_for("3.11.0") is None
    for version in ("3.10.0", "3.9.0"):
        write({KEY: replace(ROW, triton=version)})
    chosen = {version: baseline_for(version) for version in ("3.9.0", "3.11.0")}
    assert {version: each.triton for version, each in chosen.items() if each} == {"3.9.0": "3.9.0", "3.11.0": "3.10.0"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"triton": "3.7.1", "rows": [{"name": "a"}]}'])
def test_an_unreadable_baseline_is_refused(text: str) -> None:
    """One sentence says what to do."""
    with pytest.raises(ValueError, match=r"a baseline is not readable .*: write it again with skipcost kernels resou"):
        parse(text)


def test_stored_rows_need_neither_torch_nor_triton() -> None:
    """The report shows them on machines that have neither."""
    program = """
import sys
from skipcost.kernels.verify.baseline import stored_rows
print(len(stored_rows()), "torch" in sys.modules, "triton" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.stdout.split() == [str(len(stored_rows())), "False", "False"], done.stderr


@pytest.mark.sources
def test_the_pinned_triton_has_a_baseline() -> None:
    """Whoever moves the pin writes the baseline."""
    pins = ROOT.joinpath("constraints.txt").read_text().splitlines()

    assert {f"triton=={each.triton}" for each in stored()} & set(pins)
