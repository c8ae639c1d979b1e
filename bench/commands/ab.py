"""`skipcost ab` says whether a revision is slower than another, and `--self-test` how far that is to be trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.compare import self_test as testing
from skipcost.bench.compare import verdicts as telling
from skipcost.bench.compare.ab import Journal, Rules, Subject, compare
from skipcost.bench.compare.benchmarks import is_benchmarks
from skipcost.bench.compare.pairs import Pairs, benchmark_pairs, benchmarks_of, case_pairs
from skipcost.bench.compare.revisions import (
    WORKING_TREE,
    checked_out,
    dirty,
    own_repository,
    repository_here,
    resolve,
    state,
)
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.console import ERR, JSON, JUNIT, KEPT, OUT, SET, check_outputs, number, progress_bar, settings_of
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.environment import code_hash, cpus
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.sweeps.plan import load_plan
from skipcost.kernels.errors import Stopped
from skipcost.unet_models.spec import suggest

TITLE = "skipcost ab"
INCONCLUSIVE = 3
RESULTS = Path("results")  # where journals are kept
DEFAULT = Rules()


def ab(
    base: Annotated[str | None, typer.Argument(help="the revision to compare with: a branch, tag or commit")] = None,
    head: Annotated[str, typer.Argument(help="the revision to judge")] = WORKING_TREE,
    sweep: Annotated[str, typer.Option(help="whose cases are timed: a sweep's name or the path of a TOML file")] = "ab",
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(help="time pytest benchmarks of this folder's repository instead, by their pytest names"),
    ] = None,
    settings: SET = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    release: Annotated[str | None, typer.Option(help="compare with this revision too: small steps add up")] = None,
    effect: Annotated[float, number("the relative change that has to be seen", 0, 10, float)] = DEFAULT.effect,
    pairs: Annotated[int, number("of fresh processes, per case", 3, 1000)] = DEFAULT.pairs,
    seconds: Annotated[float, number("of turns, per case and pair", 0.01, 3600, float)] = DEFAULT.seconds,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 3 where a case is inconclusive")] = False,  # noqa: FBT002
    self_test: Annotated[bool, typer.Option("--self-test", help="measure false alarms and power instead")] = False,  # noqa: FBT002
    runs: Annotated[int, number("of the self-test, per slowdown", 1, 1000)] = 5,
    slowdown: Annotated[
        list[float] | None,
        number("of the self-test, as a share of the measured call; may be repeated", 0, 1, float),
    ] = None,
    junit: JUNIT = None,
    kept: KEPT = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Time two revisions in turns and judge every case: 0 no case is slower, 1 one is, 3 undecided with --strict."""
    if effect <= DEFAULT.floor:
        message = f"--effect {effect:g} is not above {DEFAULT.floor:g}, which is the change that is too small to matter"
        raise BenchError(message)
    rules = Rules(pairs=pairs, seconds=seconds, effect=effect)
    taken = [Path(sweep), *(Path(each.partition("::")[0]) for each in benchmarks or ())]
    check_outputs({"--junit": junit, "--verdicts": kept}, taken)
    if not self_test and (not base or is_benchmarks(Path(base))):
        stored = f"{base} has stored samples, taken at another time: they cannot give a paired verdict; "
        message = f"{stored if base else ''}name the revision to compare with, e.g. `skipcost ab main`"
        raise BenchError(message)
    with _resumable():
        if self_test:
            sizes = sorted(set(slowdown or testing.SLOWDOWNS))
            _self_test(_cases(sweep, settings, device), rules, runs, sizes, as_json=as_json)
            return
        if head == WORKING_TREE and dirty(repository_here() if benchmarks else None):
            ERR.print("the working tree is compared as it is, uncommitted changes included")
        compared: Callable[[str], list[Verdict]] = (
            partial(_benchmarks, head, benchmarks, rules)
            if benchmarks
            else partial(_compare, head, _cases(sweep, settings, device), rules, sweep)
        )
        verdicts = []
        for name in (each for each in (base, release) if each is not None):
            found = compared(name)
            if not as_json:
                OUT.print(f"{head} against {name}")
                telling.print_verdicts(found, OUT)
            verdicts += found
    if as_json:
        telling.write_json(verdicts, OUT)
    telling.pass_on(verdicts, TITLE, ERR, junit, kept, taken)
    _end(verdicts, strict=strict)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Where what was measured is kept: a signal ends the command with a sentence, and the same one goes on."""
    try:
        yield
    except Stopped as stop:
        stop.add_note(f"what was measured is kept in {RESULTS}/, the same command goes on")
        raise


def _cases(sweep: str, settings: list[str] | None, device: str) -> list[Case]:
    """The cases of a sweep that can run here."""
    if device not in CHOICES["device"]:
        raise BenchError(suggest("device", device, CHOICES["device"]))
    planned = load_plan(sweep, settings_of(settings), device, cpus()).cases
    cases = [each.case for each in planned if not refusal_of(each.case)]
    if not cases:
        message = f"no case of the sweep {sweep} can run: there is nothing to time"
        raise BenchError(message)
    return cases


def _compare(head: str, cases: list[Case], rules: Rules, sweep: str, base: str) -> list[Verdict]:
    commit = resolve(base)
    now = WORKING_TREE if head == WORKING_TREE else resolve(head)
    code = code_hash() if now == WORKING_TREE else now
    subjects = [Subject(case.name, case.to_json()) for case in cases]
    with checked_out(commit) as first, checked_out(now) as second:
        return _kept(Path(sweep).stem, (base, code), subjects, case_pairs(first, second, rules.seconds), rules)


def _benchmarks(head: str, names: list[str], rules: Rules, base: str) -> list[Verdict]:
    root = repository_here()
    commit, now = resolve(base, root), head if head == WORKING_TREE else resolve(head, root)
    code = state(root) if now == WORKING_TREE else now
    foreign = None if root == own_repository() else root  # the suite's own folders are imported under another name
    with checked_out(commit, foreign) as first, checked_out(now, foreign) as second:
        subjects = [Subject(name, name) for name in benchmarks_of(names, first, second)]
        if not subjects:
            message = f"{' '.join(names)} names no benchmark: there is nothing to time"
            raise BenchError(message)
        return _kept("benchmarks", (base, code), subjects, benchmark_pairs(names, first, second), rules)


def _kept(what: str, sides: tuple[str, str], subjects: list[Subject], pairs: Pairs, rules: Rules) -> list[Verdict]:
    """Compare, and keep what was measured in a journal; sides: the base as it was named, and the state of the code."""
    base, code = sides
    header = {"base": pairs.base, "now": code, "pairs": rules.pairs, "seconds": rules.seconds}
    path = RESULTS / f"ab-{what}-{pairs.base[:8]}-{code[:8]}.jsonl"
    with _bar() as bar:
        return compare(subjects, pairs, rules, Journal(path, header), bar(f"against {base}"))


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[int, str], None]]]:
    """A bar whose total may shrink, because settled cases are left alone, or grow by what has to be confirmed."""
    with progress_bar(BarColumn(), TaskProgressColumn()) as progress:

        def start(what: str) -> Callable[[int, str], None]:
            task = progress.add_task(what, total=None)
            done = -1

            def tell(left: int, name: str) -> None:
                nonlocal done
                done += 1
                progress.update(task, total=done + left, completed=done, description=f"{what}: {name}")

            return tell

        yield start


def _self_test(cases: list[Case], rules: Rules, runs: int, slowdowns: list[float], *, as_json: bool) -> None:
    folder = RESULTS / f"self-test-{code_hash()}"
    with checked_out(WORKING_TREE) as here, _bar() as bar:
        tellers: dict[str, Callable[[int, str], None]] = {}

        def tell(what: str, left: int, name: str) -> None:
            if what not in tellers:
                tellers[what] = bar(what)
            tellers[what](left, name)

        findings = testing.self_test(cases, here, rules, runs, folder, tell, slowdowns)
    if as_json:
        OUT.print_json(data=testing.to_json(findings, cases, rules))
    else:
        testing.print_findings(findings, OUT)


def _end(verdicts: list[Verdict], *, strict: bool) -> None:
    """Leave with the exit code that the verdicts ask for."""
    if any(each.fails for each in verdicts):
        raise typer.Exit(1)
    undecided = sum(each.verdict == "inconclusive" for each in verdicts)
    if undecided:
        ERR.print(f"skipcost: {undecided} of {len(verdicts)} cases are inconclusive: more --pairs or --seconds decide")
        if strict:
            raise typer.Exit(INCONCLUSIVE)
