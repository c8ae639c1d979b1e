"""The doors of the command line: text from anywhere is printed as it is, and no cell of a table is cut."""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from skipcost import bench, reports
from skipcost.bench import cli
from skipcost.bench import console as doors
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.places import explain
from skipcost.bench.cases.record import Result
from skipcost.bench.commands import plan as preview
from skipcost.bench.commands import show
from skipcost.bench.commands.counters import print_counters
from skipcost.bench.commands.doctor import print_findings
from skipcost.bench.commands.explain import print_explanation
from skipcost.bench.compare.verdicts import Verdict, print_verdicts, tell_ci
from skipcost.bench.console import Column, Description, Screen
from skipcost.bench.fitting import question as fit_question
from skipcost.bench.fitting.answer import answer, print_rows
from skipcost.bench.fitting.table import print_left_out
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import create_store, open_store
from skipcost.bench.streams import steady_streams, visible
from skipcost.unet_models import ModelSpec

ODD = (
    "[big]",
    "[/data/a.png]",
    "[red]x[/red]",
    ":smile:",
    "a\x1b[31mb",
    "a\nb",
    "a\tb",
    "\u202eab",
    "\udcff",
    "[",
    "a\\[b",
)
WIDTHS = (40, 60, 80, 200)
WIDE = 5000


def told(write: Callable[[Screen], Any], width: int = 400) -> str:
    """What is printed in so many columns."""
    text = io.StringIO()
    write(Screen(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_printed_as_it_is(text: str) -> None:
    """In one line: no markup, no emoji, and what a terminal would act upon is written out."""
    assert told(lambda screen: screen.print(text)) == f"{visible(text)}\n"
    assert told(lambda screen: screen.print(f"{text}:", doors.bold(text))) == f"{visible(text)}: {visible(text)}\n"
    table = told(lambda screen: screen.table((Column("a"), Column("b", prose=True)), [(text, text)]))
    assert [line.split() for line in table.splitlines()] == [["a", "b"], [visible(text), visible(text)]]
    lines = told(lambda screen: screen.table((Column("a"), Column("b")), [(text, "x" * 400)]))
    assert lines == f"a: {visible(text)}\nb: {'x' * 400}\n"


@pytest.mark.parametrize("text", ODD)
def test_a_bar_says_what_it_is_about_as_it_is(text: str) -> None:
    """A case's label may be anybody's text."""
    with Progress(Description(), console=Screen(file=io.StringIO(), width=80)) as progress:
        progress.add_task(text)
        (task,) = progress.tasks

        assert Description().render(task).plain == visible(text)


def test_visible_leaves_what_can_be_seen() -> None:
    """Letters of any script, and the space that figures keep to their units."""
    assert visible("µ 二 2.0\u00a0ms \\") == "µ 二 2.0\u00a0ms \\"
    assert visible("\x1b\n\x07\u2028\x9b\udcff") == "\\x1b\\n\\x07\\u2028\\x9b\\udcff"


def test_nothing_is_printed_by_another_door() -> None:
    """Only this module knows rich: what others print goes through it."""
    folders = [Path(package.__path__[0]) for package in (bench, reports)]
    using = set()
    for file in (each for folder in folders for each in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if any(str(name).partition(".")[0] == "rich" for name in names):
                using.add(file.name)

    assert using <= {"console.py", "ab.py"}  # the latter has a bar of its own, of columns without text


def test_no_file_is_written_by_another_door() -> None:
    """What `bench` and `reports` leave on a disk goes through `write_file`, `append_file` or the store."""
    writing = re.compile(r"\.write_(text|bytes)\(|\.open\(\"[wax]|[^.]open\([^)]*\"[wax]b?\"")
    folders = [Path(package.__path__[0]) for package in (bench, reports)]
    found = [
        f"{file.name}: {line.strip()}"
        for folder in folders
        for file in folder.rglob("*.py")
        for line in file.read_text().splitlines()
        if writing.search(line) and "fdopen" not in line and "os.devnull" not in line
    ]

    assert found == []


@pytest.mark.parametrize("text", ODD)
def test_every_verdict_is_told_with_its_whole_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """In the table and in GitHub's annotation, whatever a benchmark is called."""
    found = [Verdict(f"test_b.py::test_net{text}", "params", "regressed", 10, 11, f"why {text}")]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    table, annotation = (
        told(lambda screen: print_verdicts(found, screen)),
        told(lambda screen: tell_ci(found, "x", screen)),
    )

    assert f"test_net{visible(text)}  params" in table
    assert f"why {visible(text)}" in table
    escaped = visible(text.replace("%", "%25").replace("\n", "%0A"))
    assert annotation == f"::error title=x::test_b.py::test_net{escaped}: params regressed +10.00%25 why {escaped}\n"


def _preview(text: str) -> dict[str, Any]:
    case = {"name": text, "refused": text, "will_not_fit": False, "note": text, "aliases": [text], "predicted_bytes": 3}
    return {
        "cases": [case],
        "planned": 1,
        "left_out": {text: text},
        "memory_limit_bytes": None,
        "time_s": 1.0,
        "slow": [],
    }


def _doctor(text: str) -> dict[str, Any]:
    environment = {"cpu": text, "cpus": 1, "memory_bytes": 1, "gpus": [], "versions": {text: text}}
    return {"environment": environment, "can": {text: text}, "limits": {text: text}, "doubts": [text]}


def _counters(text: str) -> dict[str, Any]:
    answer = {"counter": text, "version": "", "macs": None, "conversion": text, "note": text}
    exact = {"macs": 1, "kinds": {text: 1}}
    return {"network": text, "size": [8, 8], "batch": 1, "arithmetic": exact, "counters": [answer], "aliases": {}}


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    ("write", "facts", "often"),
    [
        (preview.print_preview, _preview, 6),
        (print_findings, _doctor, 8),
        (print_counters, _counters, 5),
        (print_left_out, lambda text: {text: text}, 2),
    ],
    ids=["plan", "doctor", "counters", "fit"],
)
def test_what_commands_are_told_from_outside_is_printed_as_it_is(
    write: Callable[[Any, Screen], None], facts: Callable[[str], dict[str, Any]], often: int, text: str
) -> None:
    """Names, notes and reasons: each as often as it is said."""
    assert told(lambda screen: write(facts(text), screen)).count(visible(text)) >= often


def test_a_plan_without_a_gpu_names_the_key_in_brackets() -> None:
    """The sentence quotes TOML, which looks like markup."""
    assert '(set [limits] memory = "24GiB" in the sweep)' in told(
        lambda screen: preview.print_preview(_preview("x"), screen)
    )


def _fit() -> dict[str, Any]:
    settings = ["variant=unet,unet3+", "depth=1", "skip=concat,sum"]
    case = {"size": "64", "mode": None, "precision": None, "optimizer": None}
    question = fit_question.ask({"memory": "64MiB"}, case, 1, None, settings)
    return answer(question, None, 3)


@pytest.fixture(scope="module")
def printers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Screen], None]]:
    """What each command prints of something real, by its name."""
    path = tmp_path_factory.mktemp("store") / "x.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "test", 0, {"fingerprint": "here"})
        for width in (8, 16):
            case = Case(spec=ModelSpec(width=width), batch=width)
            store.add_case(case, [])
            for number, name in enumerate(METRICS):
                detail = {"device": "d", "flop_per_s": 1.0, "bandwidth_bytes_per_s": 1.0, "sources": {}, "layers": {}}
                result = Result(name, samples=(123_456_789 + number,), detail=detail)
                store.add_result(run, case.case_id, result if number else Result(name, "timeout", note="late"))
    with open_store(path) as store:
        frame = show.select(store, None, None)
        labels = {case_id: case.spec.label for case_id, (case, _) in store.cases().items()}
    facts = explain(ModelSpec.parse("unet3+/d3/w8/gated"), (100, 100), 1, "fp32", "inference")
    why = "fvcore 0.1.5 in the baseline, 0.1.6 here: the numbers of both are not those of one count"
    found = [
        Verdict(
            "unet3+/d4/w64/concat/norm=instance  512x512, batch 1, training, amp-bf16",
            "conv_macs",
            word,
            1e12,
            2e12,
            why,
        )
        for word in ("regressed", "not_comparable")
    ]
    fitting = _fit()
    shown = _preview("unet3+/d4/w64/concat/norm=instance  512x512, batch 1, training, amp-bf16")
    return {
        "show": lambda screen: show.write(frame, "table", screen, labels),
        "explain": lambda screen: print_explanation(facts, screen),
        "fit": lambda screen: print_rows(fitting, screen),
        "plan": lambda screen: preview.print_preview(shown, screen),
        "gate": lambda screen: print_verdicts(found, screen),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["show", "explain", "fit", "plan", "gate"])
def test_no_number_and_no_label_is_cut(printers: dict[str, Callable[[Screen], None]], command: str, width: int) -> None:
    """What a narrow terminal shows is whole in a wide one; a column is left out, or has a line."""
    whole = set(told(printers[command], WIDE).split())
    said = [line for line in told(printers[command], width).splitlines() if not line.startswith("too narrow for: ")]

    words = [word for line in said for word in line.split()]
    titles = {word for word in words if word.endswith(":")}
    assert [word for word in words if word not in whole | titles] == []
    assert {word.removesuffix(":") for word in titles - whole} <= whole
    assert "…" not in "".join(words)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 9), (2, 30)])
def test_a_table_is_as_wide_as_the_terminal_or_a_line_for_each_field(width: int, rows: int, columns: int) -> None:
    """No line of a table is wider; where not even the first column fits, each field has a line, whole."""
    head = [Column(f"title of {at}", right=at > 0, drop=at) for at in range(columns)]
    cells = [[f"{row}/{at}/{'x' * (7 * at % 5)}" for at in range(columns)] for row in range(rows)]
    text = told(lambda screen: screen.table(head, cells, more="--all has them"), width)
    wide = told(lambda screen: screen.table(head[:1], [["y" * (width + 1)]]), width)

    lines = text.splitlines()
    left_out = lines.pop() if lines[-1].startswith("too narrow") else ""
    assert max(map(len, lines)) <= width
    assert all(lines[-rows:][row].startswith(cells[row][0]) for row in range(rows))
    for at, column in enumerate(head):
        assert (f"{column.title}," in left_out.replace(";", ",")) == (cells[0][at] not in text)
    assert not left_out or left_out.endswith("--all has them")
    assert wide == f"title of 0: {'y' * (width + 1)}\n"


def test_titles_end_on_one_line_and_cells_begin_on_one() -> None:
    """A title in two lines stands on its numbers; a sentence goes on below its row; wide letters take two places."""
    columns = [Column("network"), Column("receptive field", right=True), Column("said", prose=True)]
    rows = [("a", "7", "all is as it was before"), ("\u5bbd", "12", "fine")]

    printed = told(lambda screen: screen.table(columns, rows), 36).splitlines()

    assert printed == [
        "         receptive",
        "network      field  said",
        "a                7  all is as it was",
        "                    before",
        "\u5bbd              12  fine",
    ]


def test_the_least_important_column_goes_first() -> None:
    """By its rank, not its place; a column without one stays, in lines if it must."""
    head = (Column("a", drop=1), Column("b"), Column("c", drop=2))
    row = [["1" * 9, "2" * 9, "3" * 9]]

    assert told(lambda screen: screen.table(head, row), 31).split() == ["a", "b", "c", *row[0]]
    assert told(lambda screen: screen.table(head, row), 30).split()[:4] == ["a", "b", *row[0][:2]]
    assert told(lambda screen: screen.table(head, row), 19).split()[:2] == ["b", row[0][1]]
    assert told(lambda screen: screen.table(head, row), 8).splitlines() == [f"{x}: {y}" for x, y in zip("abc", row[0])]  # noqa: B905


def test_no_color_leaves_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither colours nor bold or dim, on a terminal that has them."""

    def shown() -> str:
        text = io.StringIO()
        screen = Screen(file=text, force_terminal=True, width=80, **{} if plain else {"color_system": "truecolor"})
        screen.print(doors.bold("x"), "y", style="red")
        screen.table([Column("a")], [["b"]], ["dim"])
        return text.getvalue()

    plain = False
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in shown()
    plain = True
    monkeypatch.setenv("NO_COLOR", "1")

    assert shown() == "x y\na\nb\n"


def test_a_line_on_a_terminal_is_wrapped_between_words_alone() -> None:
    """A path or a label is never cut, whatever the terminal's width; elsewhere a line is a line."""
    text = f"see {'x' * 30} and {'y' * 30}"

    assert told(lambda screen: screen.print(text), 20) == f"{text}\n"
    file = io.StringIO()
    Screen(file=file, width=20, force_terminal=True, color_system=None).print(text)
    assert {"x" * 30, "y" * 30} <= set(file.getvalue().split())


def test_a_stream_without_letters_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler's ASCII: the micro sign of a latency is lost, the command is not; JSON keeps every letter."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    steady_streams()

    Screen(width=80).print("2.0 µs \udcff")
    Screen(width=80).table([Column("a")], [["µ"]])
    Screen(width=80).print_json(data={"a": "µ"})

    assert raw.getvalue().decode() == '2.0 ?s \\udcff\na\n?\n{\n  "a": "\\u00b5"\n}\n'


def test_a_closed_stream_takes_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever closes a stream wants nothing of it: the command runs, and its exit code counts."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def command() -> None:
        print("nobody hears it")  # noqa: T201 - as a library would
        Screen(width=80).print("nor this")
        (tmp_path / "x").write_text("done")

    cli.guarded(command)
    for stream in (sys.stdout, sys.stderr):
        stream.close()

    assert (tmp_path / "x").read_text() == "done"


def test_a_full_disk_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    """Where any write fails for want of room, that is said, with the code of the environment."""

    def command() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as ended:
        cli.guarded(command)

    assert ended.value.code == 4
    assert "skipcost: cannot write: No space left on device; what was measured is kept" in capsys.readouterr().err


def test_other_errors_of_the_system_are_defects_still(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that should be there and is not is nobody's full disk."""

    def command() -> None:
        raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(SystemExit):
        cli.guarded(command)

    said = capsys.readouterr().err
    assert "which is a defect" in said
    Path(said.split("traceback is in ")[1].strip()).unlink()


def test_a_defect_without_room_for_its_log_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback goes to stderr where no file can be written."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def command() -> None:
        raise RuntimeError

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(SystemExit):
        cli.guarded(command)

    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert "its traceback is above" in said
