"""Instructions of two revisions, counted here and now: what is judged, and what is said where nothing can be counted.

What valgrind itself counts is in tests/optional, which `nox -s instructions` runs.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from skipcost.bench import callgrind, cli, instructions
from skipcost.bench.callgrind import SUBJECTS, Subject
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.instructions import TOOLS, Counts, count, count_both, judge
from skipcost.bench.revisions import Revision
from skipcost.unet_models import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = 1_000_000
HERE = Revision("here", "", Path())


@pytest.fixture
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have valgrind, wherever the tests run."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def answering(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    """Have another program run in place of the script."""
    script = folder / "script.py"
    script.write_text(program)
    monkeypatch.setattr(instructions, "SCRIPT", script)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize(
    ("tolerances", "word", "fails"),
    [
        (0, "unchanged", False),
        (0.9, "unchanged", False),
        (-0.9, "unchanged", False),
        (1.1, "regressed", True),
        (-1.1, "improved", False),
        (100, "regressed", True),
    ],
)
def test_a_change_beyond_the_tolerance_is_a_verdict(name: str, tolerances: float, word: str, fails: bool) -> None:  # noqa: FBT001
    """More instructions fail; fewer pass, since no stored baseline has to be updated for them."""
    now = round(BASE * (1 + tolerances * SUBJECTS[name].tolerance))

    (verdict,) = judge(Counts({name: BASE}, {}), Counts({name: now}, {}))

    assert (verdict.case, verdict.metric, verdict.verdict, verdict.fails) == (name, "instructions", word, fails)
    assert (verdict.base, verdict.now) == (BASE, now)


@pytest.mark.parametrize(
    ("base", "now", "word"),
    [
        (Counts({"a": 1}, {}), Counts({}, {"a": "it broke"}), "missing"),
        (Counts({}, {"a": "it broke"}), Counts({"a": 1}, {}), "new"),
        (Counts({}, {"a": "it broke"}), Counts({}, {"a": "it broke"}), "not_comparable"),
        (Counts({"a": 1}, {}), Counts({}, {}), "missing"),
    ],
)
def test_a_subject_without_two_counts_fails(base: Counts, now: Counts, word: str) -> None:
    """What one revision cannot run is no pass, and the reason is told."""
    (verdict,) = judge(base, now)

    assert verdict.verdict == word
    assert verdict.fails
    assert ("it broke" in verdict.why) == bool(base.failed or now.failed)


def test_every_subject_runs_and_every_variant_is_one() -> None:
    """The table's calls work in this revision; the executor is counted for each variant."""
    calls, failed = callgrind.prepared()

    assert list(calls) == list(callgrind.SUBJECTS)
    assert not failed
    assert {name.removeprefix("forward ").partition("/")[0] for name in calls if name.startswith("forward")} == set(
        VARIANTS
    )


def test_what_a_revision_cannot_do_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a subject that cannot be made nor one that cannot be called stops the others."""

    def unmade() -> callgrind.Call:
        message = "no such variant"
        raise ValueError(message)

    makers = {"works": lambda: list, "unmade": unmade, "uncallable": lambda: lambda: 1 / 0}
    monkeypatch.setattr(callgrind, "SUBJECTS", {name: Subject(make, 0.1) for name, make in makers.items()})

    calls, failed = callgrind.prepared()

    assert calls == {"works": list}
    assert failed == {"unmade": "ValueError: no such variant", "uncallable": "ZeroDivisionError: division by zero"}


@pytest.fixture
def _collecting() -> Iterator[None]:
    """Leave the garbage collector as it was."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("_collecting")
def test_calls_come_warm_one_at_a_time_and_without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's first, unseen call warms everything up; each later one is a subject, in the table's order."""
    called: list[str] = []
    subjects = {name: Subject(lambda name=name: lambda: called.append(name), 0.1) for name in "ab"}  # type: ignore[misc]
    monkeypatch.setattr(callgrind, "SUBJECTS", subjects)
    turns = callgrind.turns()
    called.clear()

    next(turns)()
    warm, collecting = list(called), gc.isenabled()
    called.clear()
    for turn in turns:
        turn()

    assert warm == ["a"] * callgrind.WARM + ["b"] * callgrind.WARM
    assert not collecting
    assert called == ["a", "b"]


@pytest.mark.usefixtures("_tools")
def test_a_side_is_counted_in_a_process_of_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports the revision's sources, finds this environment's Python, and leaves no hash to chance."""
    program = """
import json, os, sys
print(json.dumps({"instructions": {name: len(os.environ[name]) for name in ("PYTHONPATH", "PYTHONHASHSEED")},
                  "failed": {"python": os.popen("command -v python").read().strip(), "here": sys.executable}}))
"""
    answering(monkeypatch, tmp_path, program)

    both = count_both(Revision("a", "12345", Path()), Revision("b", "123", Path()))

    assert [side.instructions["PYTHONPATH"] for side in both] == [5, 3]
    assert [side.instructions["PYTHONHASHSEED"] for side in both] == [1, 1]
    assert all(Path(side.failed["python"]).parent == Path(side.failed["here"]).parent for side in both)


@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ('print(\'{"error": "Valgrind is not supported on this platform."}\')', "Valgrind is not supported"),
        ("import sys; sys.exit('it died')", "it died"),
        ("print('not JSON')", "callgrind counts nothing at here"),
        ('print(\'{"instructions": {"a": 7, "b": 0}, "failed": {}}\')', "a count is 0"),
    ],
)
def test_a_process_that_counts_nothing_is_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    """Whatever valgrind or the process says instead of counts ends the command, as a fault of the environment."""
    answering(monkeypatch, tmp_path, program)

    with pytest.raises(MachineError, match=said):
        count(HERE)


@pytest.mark.parametrize("tool", TOOLS)
def test_without_valgrind_the_command_names_the_package(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    """Exit code 4, and what to install."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else name)

    result = CliRunner().invoke(cli.app, ["instructions"])

    assert isinstance(result.exception, MachineError)
    assert f"{tool} cannot be run: install your system's package valgrind" in str(result.exception)


@pytest.mark.usefixtures("_tools")
def test_counts_are_shown_with_the_tolerance_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each subject, and on stderr what cannot be counted."""
    first, second, *_ = SUBJECTS
    answer = {"instructions": {first: 1234567}, "failed": {second: "it broke"}}
    answering(monkeypatch, tmp_path, f"print({json.dumps(answer)!r})")

    table = CliRunner().invoke(cli.app, ["instructions"])
    data = CliRunner().invoke(cli.app, ["instructions", "--json"])

    assert table.exit_code == data.exit_code == 0
    assert f"{SUBJECTS[first].tolerance:.1%}" in table.stdout
    assert "1,234,567" in table.stdout
    assert f"{second} cannot be counted: it broke" in table.output
    assert json.loads(data.stdout) == {**answer, "tolerance": {name: each.tolerance for name, each in SUBJECTS.items()}}


@pytest.mark.parametrize("option", ["--junit", "--verdicts"])
def test_files_of_verdicts_are_refused_where_there_are_none(option: str) -> None:
    """A count alone is no comparison."""
    result = CliRunner().invoke(cli.app, ["instructions", option, "x"])

    assert isinstance(result.exception, BenchError)
    assert "there are none without --against REV" in str(result.exception)


def against(monkeypatch: pytest.MonkeyPatch, base: dict[str, int], now: dict[str, int], *words: str) -> Any:
    """Run the command against HEAD with the counts of both sides given."""
    from skipcost.bench import instructions_command  # noqa: PLC0415 - patched here alone

    monkeypatch.setattr(instructions_command, "count_both", lambda *_: (Counts(base, {}), Counts(now, {})))
    return CliRunner().invoke(cli.app, ["instructions", "--against", "HEAD", *words])


@pytest.mark.sources
def test_against_a_revision_more_instructions_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and a row that says by how much; 0 where nothing changed or less is done; nothing counted fails."""
    kept, junit = tmp_path / "verdicts.json", tmp_path / "junit.xml"

    name = next(iter(SUBJECTS))

    more = against(monkeypatch, {name: 100}, {name: 110}, "--verdicts", str(kept), "--junit", str(junit))
    same = against(monkeypatch, {name: 100}, {name: 100})
    less = against(monkeypatch, {name: 100}, {name: 90})
    none = against(monkeypatch, {}, {})

    assert [each.exit_code for each in (more, same, less, none)] == [1, 0, 0, 1]
    assert "regressed" in more.stdout
    assert "+10.0%" in more.stdout
    assert [each["verdict"] for each in json.loads(kept.read_text())] == ["regressed"]
    assert 'failures="1"' in junit.read_text()
