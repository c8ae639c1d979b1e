"""The exact gate fails closed: no way of having nothing to say is a pass."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import invoke_cli

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory, code_of, sources_of
from skipcost.bench.cases.opened import digests
from skipcost.bench.cases.record import OUTCOMES, Result
from skipcost.bench.commands import gate as gate_command
from skipcost.bench.compare.baseline import FORMAT, SCHEMA, Baseline, Entry, baseline_of, read_baseline
from skipcost.bench.compare.gate import compared, judge
from skipcost.bench.compare.verdicts import PASSING, VERDICTS, Verdict, read_json
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.store.store import create_store, open_store
from skipcost.unet_models import ModelSpec

CASES = tuple(Case(spec=ModelSpec(width=width), threads=1) for width in (8, 16))
EXACT = tuple(name for name, metric in METRICS.items() if metric.exact)
CODE = "this code"
VERSIONS = {"torch": "2.13.0+cpu", "fvcore": "0.1.5"}


def fill(path: Path, value: float = 100, sweep: str = "ci", **changes: Result) -> Path:
    """A store in which every exact metric of two cases is `value`; `changes` replaces results of the first case."""
    facts = {"fingerprint": "here", "code": CODE, "versions": VERSIONS}
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", sweep, 0, facts)
        for case in CASES:
            store.add_case(case, [])
            for name in EXACT:
                result = changes.get(name) if case is CASES[0] else None
                store.add_result(run, case.case_id, result or Result(name, samples=(value,)))
    return path


@pytest.fixture(autouse=True)
def _code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the gate take the stores of these tests for its own code's."""
    monkeypatch.setattr(gate_command, "code_hash", lambda: CODE)
    monkeypatch.setattr(gate_command, "version_of", VERSIONS.__getitem__)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The baseline of a store as `fill` makes it."""
    with open_store(fill(tmp_path / "base.sqlite")) as opened:
        text = baseline_of(opened).text
    path = tmp_path / "ci.jsonl"
    path.write_text(text)
    return path


def gate(store: Path, file: Path, *words: str) -> tuple[int, str]:
    """Run the command and return its exit code and everything that it said."""
    result = invoke_cli(["gate", str(store), "--baseline", str(file), *words])
    if isinstance(result.exception, BenchError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_equal_numbers_pass(tmp_path: Path, file: Path) -> None:
    """Both cases, every exact metric, nothing changed: exit code 0, and the count of what was compared."""
    code, told = gate(fill(tmp_path / "now.sqlite"), file)

    assert code == 0
    assert f"{2 * len(EXACT)} numbers of 2 cases: {2 * len(EXACT)} unchanged" in told


@pytest.mark.parametrize("metric", EXACT)
@pytest.mark.parametrize("change", [-1, 1])
def test_any_change_of_an_exact_number_fails(tmp_path: Path, file: Path, metric: str, change: int) -> None:
    """One more or one less is a verdict, better or worse, and the command that updates the baseline is printed."""
    store = fill(tmp_path / "now.sqlite", **{metric: Result(metric, samples=(100 + change,))})

    code, told = gate(store, file, "--json")

    verdicts = [each for each in json.loads(told[: told.rindex("]") + 1]) if each["verdict"] != "unchanged"]
    expected = "improved" if (change > 0) == METRICS[metric].more_is_better else "regressed"
    assert code == 1
    assert [(each["metric"], each["verdict"], each["now"]) for each in verdicts] == [(metric, expected, 100 + change)]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_number_that_is_no_more_there_fails(tmp_path: Path, file: Path, outcome: str) -> None:
    """Whatever outcome takes a number's place, a crash above all, the gate stops and says which."""
    broken = Result("params", outcome, (), "it broke")

    code, told = gate(fill(tmp_path / "now.sqlite", params=broken), file)

    assert code == 1
    assert ("not_comparable" if outcome == "unsupported" else "missing") in told
    assert "it broke" in told or outcome in ("ok", "unsupported")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_cannot_be_a_cost_is_missing(tmp_path: Path, file: Path, value: float) -> None:
    """NaN compares unequal to itself and infinity equal: neither, nor a negative count, is a number to pass with."""
    code, told = gate(fill(tmp_path / "now.sqlite", params=Result("params", samples=(value,))), file)

    assert code == 1
    assert "missing" in told


def _renamed(text: str) -> str:
    return text.replace("unet/d4/w8/concat", "unet/d4/w24/concat")


def _without_a_case(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if "unet/d4/w8/concat" not in line)


def _with_a_number_more(text: str) -> str:
    return text.replace('"params": 100', '"params": 100, "weights": 7', 1)


@pytest.mark.parametrize(
    ("edit", "verdicts"),
    [
        pytest.param(_renamed, {"missing", "new"}, id="renamed case"),
        pytest.param(_without_a_case, {"new"}, id="case only here"),
        pytest.param(_with_a_number_more, {"missing"}, id="metric that is no more"),
        pytest.param(lambda text: text.replace('"params": 100, ', "", 1), {"new"}, id="metric only here"),
    ],
)
def test_what_only_one_side_has_fails(
    tmp_path: Path, file: Path, edit: Callable[[str], str], verdicts: set[str]
) -> None:
    """A renamed benchmark is the classic way of passing unseen."""
    file.write_text(edit(file.read_text()))

    code, told = gate(fill(tmp_path / "now.sqlite"), file)

    assert code == 1
    assert all(verdict in told for verdict in verdicts)


def _header(**changes: Any) -> str:
    return json.dumps({"format": FORMAT, "schema": SCHEMA, "sweep": "ci", "versions": {}} | changes) + "\n"


ROW = '{"name": "a", "case": {"label": "unet/d4/w8/concat"}, "exact": {"params": 1}}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "it is empty", id="empty"),
        pytest.param("\x00\x01", "line 1 is not JSON", id="binary"),
        pytest.param("[1]\n", "line 1 is not a JSON object", id="other JSON"),
        pytest.param('{"triton": "3.7.1"}\n' + ROW, "its first line does not say", id="foreign"),
        pytest.param(_header(schema=SCHEMA + 1) + ROW, f"this version of skipcost reads {SCHEMA}", id="other schema"),
        pytest.param('{"format": "skipcost baseline", "schema": 1}\n' + ROW, "line 1 has no sweep", id="half a header"),
        pytest.param(_header(versions=[]) + ROW, "line 1 has no versions", id="versions that are none"),
        pytest.param(_header(), "it holds no number", id="no case"),
        pytest.param(_header() + ROW.replace('"params": 1', ""), "it holds no number", id="no number"),
        pytest.param(_header() + ROW.replace("1}}", '"unsupported"}}'), "it holds no number", id="unsupported alone"),
        pytest.param(
            _header() + ROW.replace('{"params": 1}', "[1]"), "line 2 has no exact", id="numbers without names"
        ),
        pytest.param(_header() + ROW.replace("1}}", "Infinity}}"), "line 2 holds Infinity", id="infinite"),
        pytest.param(_header() + ROW.replace("1}}", "1e999}}"), "line 2 has params=inf", id="too large"),
        pytest.param(_header() + ROW + ROW, "line 3 holds a case that an earlier line holds", id="duplicate"),
        pytest.param(_header() + ROW.replace("1}}", "NaN}}"), "line 2 holds NaN", id="NaN"),
        pytest.param(_header() + ROW.replace("1}}", "-1}}"), "line 2 has params=-1", id="negative"),
        pytest.param(_header() + ROW.replace("1}}", "true}}"), "line 2 has params=True", id="truth value"),
        pytest.param(_header() + ROW.replace("1}}", '"crash"}}'), "line 2 has params='crash'", id="failure"),
        pytest.param(_header() + '{"name": "a"}\n', "line 2 has no case", id="half a row"),
        pytest.param(_header() + ROW[:40], "line 2 is not JSON", id="cut off"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A baseline that cannot be read in full stops the gate with the reason and the command that writes one."""
    file = tmp_path / "ci.jsonl"
    file.write_text(text)

    code, told = gate(fill(tmp_path / "now.sqlite"), file)

    assert code == 2
    assert said in told
    assert "skipcost baseline" in told


def test_a_missing_baseline_or_store_is_refused(tmp_path: Path, file: Path) -> None:
    """Neither a file that is not there nor a folder is nothing to compare with."""
    store = fill(tmp_path / "now.sqlite")

    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b"\xe9" + file.read_bytes())

    assert gate(store, tmp_path / "none.jsonl")[0] == 2
    assert gate(store, tmp_path)[0] == 2
    assert gate(store, latin)[0] == 2
    assert gate(tmp_path / "none.sqlite", file)[0] == 2
    assert gate(file, file)[0] == 2


def test_zero_compared_numbers_fail(tmp_path: Path) -> None:
    """A store and a baseline of other cases alone have nothing in common."""
    file = tmp_path / "ci.jsonl"
    file.write_text(_header() + ROW.replace("w8", "w32"))

    code, told = gate(fill(tmp_path / "now.sqlite"), file)

    assert code == 1
    assert "nothing could be compared" in told


def test_what_neither_side_supports_is_no_comparison() -> None:
    """A metric that is unsupported on both sides is unchanged, but no number that was compared: the gate fails."""
    base = Baseline("ci", {}, {"k": Entry("k", {"params": "unsupported"})})

    verdicts = judge(base, base)

    assert [each.verdict for each in verdicts] == ["unchanged"]
    assert compared(verdicts) == 0
    for part in (verdicts, []):
        with pytest.raises(typer.Exit) as ended:
            gate_command._end([("", [Verdict("a", "params", "unchanged", 1, 1)]), ("", part)])
        assert ended.value.exit_code == 1


@pytest.mark.parametrize("outcome", [each for each in OUTCOMES if each not in ("ok", "unsupported")])
def test_a_number_that_never_was_fails_where_it_was_tried(tmp_path: Path, file: Path, outcome: str) -> None:
    """A new metric or case that breaks from the start is in no baseline: it must not pass for being absent there."""
    base = read_baseline(file)
    del base.entries[CASES[0].key].exact["params"]
    file.write_text(base.text)

    store = fill(tmp_path / "now.sqlite", params=Result("params", outcome, (), "it broke"))
    code, told = gate(store, file, "--json")

    (found,) = [each for each in json.loads(told[: told.rindex("]") + 1]) if each["verdict"] != "unchanged"]
    assert code == 1
    assert (found["metric"], found["verdict"]) == ("params", "not_comparable")
    assert found["why"] == f"neither side has it; here {outcome}: it broke"


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_only_the_machine_that_measured_last_is_compared(tmp_path: Path, file: Path, measured: int) -> None:
    """Results of another machine in the same store do not stand in for what the last one has not measured yet."""
    path = fill(tmp_path / "now.sqlite")
    facts = {"fingerprint": "other machine", "code": CODE, "versions": VERSIONS}
    with create_store(path) as store:
        run = store.add_run("2026-01-02T00:00:00+00:00", "ci", 0, facts)
        for case in CASES[:measured]:
            for name in EXACT:
                store.add_result(run, case.case_id, Result(name, samples=(100,)))

    code, told = gate(path, file)

    assert code == (0 if measured == len(CASES) else 1)
    assert ("nothing could be compared" in told) == (measured == 0)
    assert ("missing" in told) == (measured < len(CASES))


def test_a_store_without_a_run_is_refused(tmp_path: Path, file: Path) -> None:
    """An empty store holds nothing to compare."""
    with create_store(tmp_path / "empty.sqlite"):
        pass

    code, told = gate(tmp_path / "empty.sqlite", file)

    assert code == 2
    assert "the store holds no run yet" in told


def test_a_store_of_other_code_is_refused(tmp_path: Path, file: Path) -> None:
    """Yesterday's numbers would pass whatever was changed today."""
    path = tmp_path / "old.sqlite"
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "ci", 0, {"fingerprint": "x", "code": "0", "versions": {}})
        store.add_case(CASES[0], [])
        store.add_result(run, CASES[0].case_id, Result("params", samples=(100,)))

    code, told = gate(path, file)

    assert code == 2
    assert "was measured with other code than this: run `skipcost sweep ci" in told


@pytest.mark.parametrize(("there", "code"), [("2.12.1", 2), ("2.13.0", 0), ("2.13.0+cu130", 0)])
def test_a_store_of_other_packages_is_refused(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, there: str, code: int
) -> None:
    """What is installed now made none of its numbers; another build of one version counts alike."""
    monkeypatch.setitem(VERSIONS, "torch", there)
    store = fill(tmp_path / "now.sqlite")
    monkeypatch.setitem(VERSIONS, "torch", "2.13.0+cpu")

    ended, told = gate(store, file)

    assert ended == code
    refusal = f"was measured with torch {there}, here is 2.13.0+cpu: run `skipcost sweep ci -o {store}` again"
    assert (refusal in told) == bool(code)


@pytest.mark.parametrize("metric", [name for name in EXACT if METRICS[name].rests_on])
def test_another_version_of_a_package_is_not_comparable(tmp_path: Path, file: Path, metric: str) -> None:
    """A number that rests on a package and changed with its version is no regression of ours, and no pass."""
    package = METRICS[metric].rests_on[0]
    file.write_text(file.read_text().replace(f'"{package}": "', f'"{package}": "0.', 1))

    same = gate(fill(tmp_path / "same.sqlite"), file)
    changed = gate(fill(tmp_path / "now.sqlite", **{metric: Result(metric, samples=(7,))}), file)

    assert same[0] == 0
    assert changed[0] == 1
    assert "not_comparable" in changed[1]


def test_exactly_one_thing_to_compare_with_is_asked_for(tmp_path: Path, file: Path) -> None:
    """Neither none nor two baselines."""
    store = str(fill(tmp_path / "now.sqlite"))

    for words in ([], ["--baseline", str(file), "--against", "HEAD"]):
        result = invoke_cli(["gate", store, *words])

        assert isinstance(result.exception, BenchError)
        assert "either --baseline FILE or --against REV" in str(result.exception)


@pytest.mark.sources
def test_a_sweep_of_ones_own_has_no_revisions(tmp_path: Path) -> None:
    """`--against` runs a sweep by its name on both sides; one that no revision holds is refused before it runs."""
    store = fill(tmp_path / "now.sqlite", sweep="mine")

    result = invoke_cli(["gate", str(store), "--against", "HEAD"])

    assert isinstance(result.exception, BenchError)
    assert "has the cases of `mine`, which is no sweep that ships" in str(result.exception)


def model(params: int) -> None:
    """Write the sources of a model of one's own that has so many parameters into the current folder."""
    Path("ownmodel.py").write_text(f"PARAMS = {params}\n")


def fill_own(path: Path, params: int, read: str = "", measured: bool = True) -> Path:  # noqa: FBT001, FBT002
    """Add a run that asks for the model as it is in the current folder, and measures it where that is `measured`."""
    case = Case(spec=Factory("ownmodel:net", code=code_of("ownmodel:net"), read=read), threads=1)
    facts = {"fingerprint": "here", "code": CODE, "versions": VERSIONS}
    with create_store(path) as store:
        run = store.add_run("2026-01-01T00:00:00+00:00", "net", 0, facts)
        store.add_case(case, [])
        store.add_asked(run, [case.case_id])
        if measured:
            store.add_result(run, case.case_id, Result("params", samples=(params,)))
    return path


def baseline_at(store: Path, file: Path) -> Path:
    """Have the command write the baseline of a store."""
    result = invoke_cli(["baseline", str(store), "-o", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return file


def test_a_model_is_compared_as_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B, A, B again, of which nothing was missing: B is held against A, with a sweep at the end or without."""
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "own.sqlite"
    for params in (450, 226):
        model(params)
        fill_own(store, params)
    file = baseline_at(store, tmp_path / "a.jsonl")
    assert gate(store, file)[0] == 0
    model(450)

    without = gate(store, file)
    fill_own(store, 450, measured=False)
    with_one = gate(store, file)

    assert without == with_one
    assert without[0] == 1
    assert "params   226  450  +99.12%  regressed" in without[1]


def test_a_model_that_was_edited_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yesterday's numbers of it are in no baseline and in no comparison; the sentence says what to run."""
    monkeypatch.chdir(tmp_path)
    model(226)
    store = fill_own(tmp_path / "own.sqlite", 226)
    file = baseline_at(store, tmp_path / "a.jsonl")
    model(450)

    code, told = gate(store, file)
    made = invoke_cli(["baseline", str(store), "-o", str(file)])

    assert code == 2
    assert "has no numbers of ownmodel:net as it is here (its code was another one): run the sweep that made" in told
    assert str(made.exception) == told


def test_a_model_whose_sources_are_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would give cannot be known then."""
    monkeypatch.chdir(tmp_path)
    model(226)
    store = fill_own(tmp_path / "own.sqlite", 226)
    file = baseline_at(store, tmp_path / "a.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    code, told = gate(store, file)

    assert code == 2
    assert "(its sources are not found from " in told


def test_a_model_that_reads_something_else_now_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was read belongs to a model like its code; one that is put back is known again."""
    monkeypatch.chdir(tmp_path)
    model(226)
    Path("net.yaml").write_text("width: 8\n")
    read = json.dumps(digests(["net.yaml"], sources_of("ownmodel:net")))
    store = fill_own(tmp_path / "own.sqlite", 226, read)
    file = baseline_at(store, tmp_path / "a.jsonl")

    Path("net.yaml").write_text("width: 16\n")
    changed = gate(store, file)
    Path("net.yaml").unlink()
    gone = gate(store, file)
    Path("net.yaml").write_text("width: 8\n")

    assert changed[0] == gone[0] == 2
    assert "(it reads net.yaml, which changed)" in changed[1]
    assert gate(store, file)[0] == 0


@pytest.mark.sources
def test_a_model_of_one_s_own_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--against` would compare the sweep without it, which is no comparison of this store, whatever its name."""
    monkeypatch.chdir(tmp_path)
    model(226)
    store = fill_own(fill(tmp_path / "own.sqlite"), 226)
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("UPDATE runs SET sweep = 'ci'")

    result = invoke_cli(["gate", str(store), "--against", "HEAD"])

    assert isinstance(result.exception, BenchError)
    assert "has models of your own (ownmodel:net), which no revision of skipcost has" in str(result.exception)


def test_a_baseline_comes_back_as_it_went_out(file: Path) -> None:
    """Reading and writing again gives the same bytes, sorted by name."""
    text = file.read_text()

    again = read_baseline(file)

    assert again.text == text
    names = [json.loads(line)["name"] for line in text.splitlines()[1:]]
    assert names == sorted(names)


def test_a_baseline_is_not_made_of_failures(tmp_path: Path) -> None:
    """What crashed is no number to hold others against: the command refuses, with the first failure."""
    store = fill(tmp_path / "x.sqlite", params=Result("params", "crash", note="boom"))

    result = invoke_cli(["baseline", str(store), "-o", str(tmp_path / "b.jsonl")])

    assert isinstance(result.exception, BenchError)
    assert "params of unet/d4/w8/concat" in str(result.exception)
    assert "boom" in str(result.exception)
    assert not (tmp_path / "b.jsonl").exists()


def test_noisy_numbers_are_written_for_the_reader_and_never_judged(tmp_path: Path) -> None:
    """Latencies are rounded to two figures, so that a diff shows changes and not noise; judging ignores them."""
    path = fill(tmp_path / "x.sqlite")
    with create_store(path) as store:
        store.add_result(1, CASES[0].case_id, Result("latency_s", samples=(0.012345, 0.012399, 0.5)))
    with open_store(path) as opened:
        made = baseline_of(opened)

    slower = {key: replace(entry, noisy={"latency_s": 9.0}) for key, entry in made.entries.items()}
    verdicts = judge(made, Baseline("ci", made.versions, slower))

    assert made.entries[CASES[0].to_json()].noisy == {"latency_s": 0.012}
    assert {each.verdict for each in verdicts} == {"unchanged"}
    assert "latency_s" not in {each.metric for each in verdicts}


def test_junit_and_github_get_every_failure(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JUnit counts the failures; on GitHub the summary gains the table and each failure is an annotation."""
    summary, junit = tmp_path / "summary.md", tmp_path / "junit.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    store = fill(tmp_path / "now.sqlite", params=Result("params", samples=(101,)))

    code, told = gate(store, file, "--junit", str(junit))

    assert code == 1
    assert f'tests="{2 * len(EXACT)}" failures="1"' in junit.read_text()
    assert "| params | 100 | 101 | +1.00% | regressed |" in summary.read_text()
    assert told.count("::error title=skipcost gate::") == 1


def test_the_verdicts_are_kept_for_the_report(tmp_path: Path, file: Path) -> None:
    """The file that `skipcost report --verdicts` reads holds every verdict, and the folder is made for it."""
    kept = tmp_path / "results" / "gate.json"

    code, _ = gate(fill(tmp_path / "now.sqlite"), file, "--verdicts", str(kept))

    assert code == 0
    assert len(read_json(kept)) == 2 * len(EXACT)


@pytest.mark.parametrize("option", ["--junit", "--verdicts"])
def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, file: Path, option: str) -> None:
    """A folder in the file's place: the option to change is named."""
    code, told = gate(fill(tmp_path / "now.sqlite"), file, option, str(tmp_path))

    assert code == 2
    assert f"name another file with {option}" in told


def test_every_verdict_has_a_meaning_and_few_pass() -> None:
    """Only two words let a gate pass; a word outside the table cannot be said."""
    assert set(PASSING) == {"unchanged", "inconclusive"}
    assert all(VERDICTS.values())
