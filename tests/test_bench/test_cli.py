"""The command line: every command answers, every mistake gets one sentence and its exit code."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke_cli

from skipcost.bench import cli, figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.record import Result
from skipcost.bench.commands import show as showing
from skipcost.bench.errors import BenchError, MachineError
from skipcost.bench.store.store import create_store
from skipcost.bench.store.tables import COLUMNS
from skipcost.bench.sweeps.driver import Server
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

COMMANDS = (
    "plan",
    "sweep",
    "show",
    "explain",
    "rewritings",
    "counters",
    "fit",
    "baseline",
    "gate",
    "ab",
    "accuracy",
    "calibrate",
    "report",
    "kernels",
    "doctor",
)
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: str) -> str:
    """Run a command in this process and return its output."""
    result = invoke_cli(words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def outside(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does; a process of its own takes seconds."""
    return subprocess.run([sys.executable, "-m", "skipcost.bench", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process as its script does, until it ends with an exit code.

    Two have a process of their own: they run a package as a program, of which pytest's import hook has no code.
    """

    def run_script(*words: str) -> subprocess.CompletedProcess[str]:
        if words[0] in ("kernels", "report"):
            return outside(*words)
        monkeypatch.setattr("sys.argv", ["skipcost", *words])
        with pytest.raises(SystemExit) as exit_code:
            cli.main()
        return subprocess.CompletedProcess(words, exit_code.value.code or 0, *capsys.readouterr())

    return run_script


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    """A fork server; it takes eight seconds to start."""
    with Server() as running:
        yield running


@pytest.fixture
def served(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have commands ask the one server instead of starting their own."""
    monkeypatch.setattr(cli, "Server", lambda: contextlib.nullcontext(one_server))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two cases, one of which timed out."""
    path = tmp_path / "x.sqlite"
    with create_store(path) as opened:
        number = opened.add_run("2026-01-01T00:00:00+00:00", "test", 0, {"fingerprint": "here"})
        for width, latency in (
            (16, Result("latency_s", samples=(0.002,))),
            (8, Result("latency_s", "timeout", note="late")),
        ):
            case = Case(spec=ModelSpec(width=width))
            opened.add_case(case, [])
            opened.add_result(number, case.case_id, Result("params", samples=(case.graph().params(),)))
            opened.add_result(number, case.case_id, latency)
        opened.add_result(number, case.case_id, Result("conv_macs", samples=(10**9,)))  # the second case's alone
    return path


def test_the_listed_commands_are_those_there_are() -> None:
    """The help lists exactly these commands, each with a line."""
    names = {each.name or each.callback.__name__ for each in cli.app.registered_commands if each.callback}

    assert names == set(COMMANDS)
    assert all(each.callback.__doc__ for each in cli.app.registered_commands if each.callback)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, run_script: Run) -> None:
    """`--help` explains each command without doing anything."""
    done = run_script(command, "--help")

    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "unett/d4/w64/concat"), "unknown variant 'unett'; did you mean 'unet'"),
        (("explain", "unet/d4"), "is not a label"),
        (("explain", "unet/d4/w64/concat", "--size", "abc"), "is not an image size"),
        (("explain", "unet/d4/w64/concat/padding=valid", "--size", "100"), "the nearest size that works is 188x188"),
        (("explain", "unet/d4/w64/concat", "--precision", "fp23"), "unknown precision 'fp23'; did you mean 'fp32'"),
        (("explain", "unet/d4/w64/concat", "--batch", "0"), "--batch '0' is not a whole number from 1 to 65536"),
        (("show", "missing.sqlite"), "there is no store at missing.sqlite"),
        (("sweep", "quik"), "unknown sweep 'quik'; did you mean 'quick'"),
        (("plan", "quick", "--device", "gpu"), "unknown device 'gpu'"),
        (("plan", "quick", "--set", "depth"), "is not key=v1,v2"),
        (("plan", "quick", "--set", "dept=3"), "unknown key in a grid 'dept'; did you mean 'depth'"),
        (("report", "missing.sqlite"), "there is no store at missing.sqlite"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words: tuple[str, ...], message: str, run_script: Run) -> None:
    """A mistake gets one line on stderr that says what and what instead; nothing on stdout, no traceback."""
    done = run_script(*words)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unwritable_store_is_refused_before_anything_runs(tmp_path: Path, run_script: Run) -> None:
    """A file in the place of the store's folder is named, and kept."""
    (tmp_path / "results").write_text("mine")

    done = run_script("sweep", "ci", "-o", str(tmp_path / "results" / "x.sqlite"))

    assert done.returncode == 2
    assert "cannot make the folder" in done.stderr
    assert (tmp_path / "results").read_text() == "mine"


@pytest.mark.parametrize(("error", "code"), [(BenchError("input"), 2), (MachineError("machine"), 4)])
def test_errors_have_their_exit_codes(error: BenchError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each family of errors ends the program with its own code and its sentence."""

    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.guarded(command)

    assert ended.value.code == code
    assert str(error) in capsys.readouterr().err


def test_an_unexpected_error_leaves_its_traceback_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A defect ends with code 4 and a sentence that names the log."""

    def command() -> None:
        message = "a defect"
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as ended:
        cli.guarded(command)

    said = capsys.readouterr().err
    assert ended.value.code == 4
    log = Path(said.split("traceback is in ")[1].strip().replace("\n", ""))
    assert "RuntimeError: a defect" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_explain_accounts_for_everything(variant: str, skip: str) -> None:
    """Edges, nodes and heads add up to the network's MACs and parameters, for every variant and skip scheme."""
    facts: dict[str, Any] = json.loads(run("explain", f"{variant}/d3/w8/{skip}", "--size", "50x67", "--json"))

    macs = sum(edge["all_macs"] for edge in facts["edges"]) + sum(facts["node_macs"].values()) + facts["head_macs"]
    params = sum(edge["params"] + edge["merge_params"] for edge in facts["edges"])
    assert macs == facts["conv_macs"]
    assert params + facts["node_params"] + facts["head_params"] == facts["params"]
    shares = sum(edge["share"] for edge in facts["edges"])
    assert shares + (sum(facts["node_macs"].values()) + facts["head_macs"]) / macs == pytest.approx(1)
    assert {edge["source"] for edge in facts["edges"]} - {"image"} <= set(facts["levels"])


def test_explain_names_resampling_and_crop() -> None:
    """The words say how each map travels: pooling with its rounding, up-sampling with its factor, gate, crop."""
    text = run("explain", "unet3+/d4/w64/concat", "--size", "100")
    gated = run("explain", "unet/d2/w8/gated/padding=valid", "--size", "60")

    assert "max-pool 8x8 (ceiling)" in text
    assert "bilinear x16" in text
    assert "X_De^1" in text
    assert "pad to 112x112" in text
    assert "gate (4 wide)" in gated
    assert "crop 32x32" in gated


def test_explain_shows_the_dearest_edge_of_unet_3plus() -> None:
    """The bottleneck's x16 edge into the finest decoder map costs 38,654,705,664 MACs by itself at 256x256."""
    facts = json.loads(run("explain", "unet3+/d4/w64/concat/in_channels=3/classes=1", "--size", "256", "--json"))

    dearest = max(facts["edges"], key=lambda edge: edge["macs"])

    assert (dearest["source"], dearest["target"], dearest["macs"]) == ("x4_0", "x0_4", 38_654_705_664)
    assert round(dearest["macs"] / facts["conv_macs"], 3) == 0.196


@pytest.mark.parametrize(("label", "form"), [("unet3+/d4/w64/concat", "tap-first"), ("unet/d4/w64/concat", "composed")])
def test_explain_shows_both_forms_of_what_can_be_rewritten(label: str, form: str) -> None:
    """The edge's row has the MACs of the form that runs, and of the other in brackets; all of them add up."""
    facts = json.loads(run("explain", label, "--size", "256", "--json"))
    text = run("explain", label, "--size", "256")

    graph = ModelSpec.parse(label).graph()
    saved = sum(each["direct_macs"] - each["tap_macs"] for each in facts["rewritings"] if each["taken"])
    assert facts["conv_macs"] - saved == executed_macs(graph, 256, 256)
    taken = [each for each in facts["rewritings"] if each["taken"]]
    assert {each["form"] for each in taken} == {form}
    for each in facts["rewritings"]:
        low, direct = (figures.text(each[name], "count") for name in ("tap_macs", "direct_macs"))
        assert (f"{low} ({direct})" if each["taken"] else f"{direct} ({low})") in text
    assert f"saves {saved / facts['conv_macs']:.1%} of all MACs" in text
    assert "rewritten" not in run("explain", "unet/d2/w8/sum", "--size", "64")


def test_show_writes_every_column_as_csv_and_json(store: Path) -> None:
    """Programs get the documented columns, in order, with base values."""
    table = list(csv.DictReader(io.StringIO(run("show", str(store), "--format", "csv", "--sort", "params"))))
    rows = json.loads(run("show", str(store), "--format", "json"))

    assert tuple(table[0]) == ("case_id", *COLUMNS)
    assert [row["width"] for row in table] == ["8", "16"]
    assert [row["outcome"] for row in table] == ["timeout: latency_s", "ok"]
    assert {row["latency_s"] for row in rows} == {None, 0.002}


def test_show_filters_by_an_expression(store: Path, run_script: Run) -> None:
    """`--where` keeps the rows for which the expression holds; a bad one names the columns."""
    kept = run("show", str(store), "--where", "width > 8 and variant == 'unet'")
    bad = run_script("show", str(store), "--where", "breadth > 8")

    assert "unet/d4/w16/concat" in kept
    assert "unet/d4/w8/concat" not in kept
    assert bad.returncode == 2
    assert "columns are: variant, depth" in bad.stderr


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A store in which a model was asked for as it was, as it became, and as it was again."""
    path = tmp_path / "own.sqlite"
    with create_store(path) as opened:
        for day, code, params in ((1, "f00", 450), (2, "0ba", 226), (3, "f00", None)):
            number = opened.add_run(f"2026-01-0{day}T00:00:00+00:00", "net", 0, {"fingerprint": "here"})
            case = Case(spec=Factory("net:N", code=code))
            opened.add_case(case, [])
            opened.add_asked(number, [case.case_id])
            if params:
                opened.add_result(number, case.case_id, Result("params", samples=(params,)))
    return path


def test_show_has_one_row_of_an_edited_model(edited: Path) -> None:
    """The state that was asked for last stands alone, whichever was measured last, and the rest is said to be there."""
    result = invoke_cli(["show", str(edited)], catch_exceptions=False)

    assert [line.split() for line in result.stdout.splitlines()[:2]] == [
        ["network", "parameters", "outcome"], ["net:N", "450", "ok"],
    ]  # fmt: skip
    assert "left out: 1 row of models as they were before an edit; --all shows them" in result.output


def test_show_tells_all_states_apart(edited: Path) -> None:
    """`--all` has every state with its code and when it was asked for last."""
    table = list(csv.DictReader(io.StringIO(run("show", str(edited), "--all", "--format", "csv"))))
    text = run("show", str(edited), "--all")

    rows = {row["code"]: (row["params"], row["asked"][:10]) for row in table}
    assert rows == {"f00": ("450", "2026-01-03"), "0ba": ("226", "2026-01-02")}
    assert text.splitlines()[0].split() == ["network", "code", "asked", "parameters", "outcome"]


def test_show_is_readable(store: Path) -> None:
    """The table for people has readable units, a dash where a row has no number, and the outcome."""
    text = run("show", str(store))

    assert "2.00\u00a0ms" in text
    assert "1.00\u00a0GMAC" in text
    assert "timeout: latency_s" in text


def test_show_counts_metrics_where_many_failed() -> None:
    """Nine unsupported metrics are a number in the table for people; one or two keep their names."""
    many = "unsupported: " + ", ".join("abcdefghi")

    assert showing._short(many) == "unsupported: 9 metrics"
    assert showing._short("timeout: latency_s; crash: a, b") == "timeout: latency_s; crash: a, b"
    assert showing._short("ok") == "ok"


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_plan_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Memory for a GPU is predicted anywhere; what fits is only said against a GPU or the sweep's own limit."""
    sweep = tmp_path / "mine.toml"
    sweep.write_text('[[grid]]\ndepth=2\nwidth=4\nsize=64\nmode=["inference", "training"]\n')
    unknown = json.loads(run("plan", str(sweep), "--device", "cuda", "--json"))
    sweep.write_text('[limits]\nmemory="1KiB"\n' + sweep.read_text())
    limited = json.loads(run("plan", str(sweep), "--device", "cuda", "--json"))

    assert all(case["predicted_bytes"] > 0 for case in unknown["cases"])
    assert all(case["will_not_fit"] for case in limited["cases"])
    if not torch.cuda.is_available():
        assert unknown["memory_limit_bytes"] is None
        assert not any(case["will_not_fit"] for case in unknown["cases"])


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_plan_tells_memory_refusals_and_aliases(tmp_path: Path) -> None:
    """`plan` predicts memory, names what arithmetic refuses, what will not fit, and what is the same network."""
    sweep = tmp_path / "mine.toml"
    sweep.write_text(
        '[limits]\nmemory="1MiB"\n[[grid]]\nvariant=["unet", "unet++"]\ndepth=3\nwidth=4\nskip="none"\nsize=[8, 64]\n'
        'mode="training"\n'
    )

    facts = json.loads(run("plan", str(sweep), "--device", "cpu", "--json"))

    refused, fits = facts["cases"]
    assert "would normalise over a single value" in refused["refused"]
    assert fits["aliases"] == ["unet++/d3/w4/none"]
    assert fits["predicted_bytes"] > 2**20
    assert fits["will_not_fit"]
    assert not list(tmp_path.glob("*.sqlite"))


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_doctor_says_what_can_be_measured_here() -> None:
    """`doctor` answers for each ability with yes or the reason."""
    facts = json.loads(run("doctor", "--json"))

    assert facts["can"]["latency on the CPU"] == "yes"
    assert all(answer.startswith(("yes", "no: ")) for answer in facts["can"].values())
    assert facts["environment"]["fingerprint"]
