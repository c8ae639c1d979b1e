"""Kernels in the exact gate: any number of a compiled kernel that changed, came or went is a verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke_cli

from skipcost.bench.commands import gate as gate_command
from skipcost.bench.compare import kernel_resources
from skipcost.bench.compare.gate import compared, judge
from skipcost.bench.compare.kernel_resources import MORE_IS_BETTER, NUMBERS, TARGETS, UPDATE, compiled, reviewed
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.kernels.resources import DEFAULT_TARGETS
from skipcost.kernels.verify import baseline
from skipcost.kernels.verify.baseline import PATHS, Resources, stored

Row = dict[str, Any]
STORED = stored()[-1]
ROWS = [{"name": name, **asdict(row)} for (name, target), row in sorted(STORED.rows.items()) if target in TARGETS]
FIRST = f"{ROWS[0]['name']} on {ROWS[0]['target']}"


class Compiling:
    """A revision whose kernels are compiled by a program that prints what it is told, and ends as it is told."""

    commit = "0123456789abcdef"

    def __init__(self, text: str, code: int = 0) -> None:
        self.program = f"import sys; sys.stdout.write({text!r}); sys.stderr.write('it broke'); sys.exit({code})"
        self.words: tuple[str, ...] = ()

    def command(self, module: str, *words: str) -> list[str]:
        """Keep what was asked for."""
        self.words = (module, *words)
        return [sys.executable, "-c", self.program]

    def environment(self) -> dict[str, str]:
        """Nothing but a path."""
        return {"PATH": "/usr/bin"}


def compiling(rows: list[Row], *problems: str) -> Compiling:
    """A revision that has these rows and problems."""
    report = json.dumps({"rows": rows, "problems": problems, "warning": ""})
    return Compiling(report, 1 if problems else 0)


def verdicts(rows: list[Row], *problems: str) -> list[Verdict]:
    """What the gate says of rows beside the baseline that ships, all that is not unchanged."""
    now, reasons = compiled(compiling(rows, *problems))
    found = judge(reviewed(STORED.triton), now, reasons)
    assert compared(found) or not rows
    return [each for each in found if each.verdict != "unchanged"]


def test_what_is_compared_is_what_the_kernels_gate_compiles() -> None:
    """Targets and numbers are those of the kernels' own tables."""
    revision = compiling(ROWS)

    compiled(revision)

    assert TARGETS == DEFAULT_TARGETS
    assert set(PATHS) < set(NUMBERS) < set(Resources.__dataclass_fields__)
    assert revision.words == (
        "skipcost.bench.kernels", "resources", "--json", "--target", "sm_90", "--target", "gfx942",
    )  # fmt: skip


def test_equal_kernels_pass() -> None:
    """Every number of every kernel on both targets, and none changed."""
    now, reasons = compiled(compiling(ROWS))

    found = judge(reviewed(STORED.triton), now, reasons)

    assert {each.verdict for each in found} == {"unchanged"}
    assert compared(found) == len(ROWS) * len(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("change", [-1, 1])
def test_any_change_of_a_number_is_a_verdict(number: str, change: int) -> None:
    """Of tensor cores, copies and wide accesses more is better, of the rest less; both fail until it is reviewed."""
    changed = {**ROWS[0], number: ROWS[0][number] + 5}
    base, now = ([changed], [{**changed, number: changed[number] + change}])

    before, (after, reasons) = compiled(compiling(base))[0], compiled(compiling(now))
    (found,) = [each for each in judge(before, after, reasons) if each.verdict != "unchanged"]

    assert (found.case, found.metric) == (FIRST, number)
    assert found.verdict == ("improved" if (change > 0) == (number in MORE_IS_BETTER) else "regressed")
    assert found.fails


def _other_triton(rows: list[Row]) -> list[Row]:
    return [{**row, "triton": "3.6.0"} for row in rows]


@pytest.mark.parametrize(
    ("edit", "problems", "word", "why"),
    [
        pytest.param(lambda rows: rows[1:], (), "missing", "", id="kernel that is no more"),
        pytest.param(
            lambda rows: rows[1:], (f"{FIRST}: does not compile: CompilationError: no",), "missing", "does not compile",
            id="kernel that does not compile",
        ),
        pytest.param(
            lambda rows: rows, ("new/kernel on sm_90: does not compile: no",), "not_comparable", "does not compile",
            id="new kernel that does not compile",
        ),
        pytest.param(lambda rows: [*rows, {**rows[0], "name": "new"}], (), "new", "", id="new kernel"),
        pytest.param(
            lambda rows: [{**rows[0], "name": "renamed"}, *rows[1:]], (), "missing new", "", id="renamed kernel"
        ),
        pytest.param(
            lambda rows: [{key: value for key, value in rows[0].items() if key != "registers"}, *rows[1:]], (),
            "missing", "", id="number that is no more",
        ),
        pytest.param(
            lambda rows: [row for row in rows if row["target"] != "gfx942"], (), "missing", "",
            id="target of which nothing compiles",
        ),
        pytest.param(
            lambda rows: [{**row, "registers": row["registers"] + 1} for row in _other_triton(rows)], (),
            "not_comparable", "triton 3.7.1 in the baseline, 3.6.0 here", id="changed with another Triton",
        ),
        pytest.param(
            lambda rows: [{**rows[0], "tensor_core": 9}, *rows[1:]], (f"{FIRST}: lost its TMA", f"{FIRST}: and more"),
            "improved", "lost its TMA; and more", id="what the kernels' own rules say",
        ),
    ],
)  # fmt: skip
def test_no_kernel_passes_by_not_being_compared(
    edit: Callable[[list[Row]], list[Row]], problems: tuple[str, ...], word: str, why: str
) -> None:
    """What only one side has, what does not compile, and what another compiler made all fail."""
    found = verdicts(edit(ROWS), *problems)

    assert {each.verdict for each in found} == set(word.split())
    assert all(each.fails for each in found)
    assert all(why in each.why for each in found)


def test_equal_numbers_of_another_triton_are_equal() -> None:
    """As with any package that a number rests on: it is the change that cannot be judged."""
    assert verdicts(_other_triton(ROWS)) == []


@pytest.mark.parametrize(
    "broken",
    [
        Compiling("", 4),
        Compiling("", 1),
        Compiling("", 0),
        Compiling("no JSON"),
        Compiling('{"rows": [], "problems": []}', 4),
    ],
)
def test_where_nothing_can_be_compiled_the_environment_is_at_fault(broken: Compiling) -> None:
    """Exit code 4 with what the command said, never an empty side."""
    with pytest.raises(MachineError, match=r"`skipcost kernels resources` fails at revision 0123456789ab: it broke"):
        compiled(broken)


@pytest.mark.parametrize("text", [None, "{", '{"triton": "9.9", "rows": []}'])
def test_without_a_baseline_there_is_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """No file, one that nobody can read, one without a row: a sentence with the command that writes one."""
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    if text:
        (tmp_path / "triton-9.9.json").write_text(text)

    with pytest.raises(BenchError, match=r"skipcost kernels resources"):
        reviewed("9.9")


@pytest.mark.parametrize(("rows", "code"), [(ROWS, 0), (ROWS[1:], 1), ([], 1)])
def test_the_gate_judges_kernels_beside_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row], code: int
) -> None:
    """One table and one exit code; what fails names the command that updates its own baseline, and no other."""
    same = [Verdict("case", "params", "unchanged", 1, 1)]
    side = compiled(compiling(rows))
    monkeypatch.setattr(gate_command, "_against_file", lambda *_: same)
    monkeypatch.setattr(kernel_resources, "compiled", lambda _: side)

    result = invoke_cli(["gate", str(tmp_path / "db"), "--baseline", "x.jsonl", "--kernels"])

    assert result.exit_code == code, result.output
    assert (UPDATE in result.output) == bool(code)
    assert "skipcost baseline" not in result.output
    assert f"{len(ROWS) * len(NUMBERS) + 1} numbers" in result.output
