"""`skipcost ab` says whether a revision is slower than another, and `--self-test` how far that is to be trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from skipcost.bench import self_test as testing
from skipcost.bench import verdicts as telling
from skipcost.bench.ab import Journal, Rules, Subject, compare
from skipcost.bench.arenas import benchmarks_arena, benchmarks_of, cases_arena
from skipcost.bench.benchmarks import is_benchmarks
from skipcost.bench.cases import CHOICES, Case
from skipcost.bench.console import ERR, JSON, OUT, SET, settings_of
from skipcost.bench.environment import code_hash, cpus
from skipcost.bench.errors import BenchError
from skipcost.bench.plan import load_plan
from skipcost.bench.revisions import WORKING_TREE, checked_out, dirty, own_repository, repository_here, resolve
from skipcost.bench.verdicts import Verdict
from skipcost.bench.worker import refusal_of
from skipcost.unet_models.spec import suggest

TITLE = "skipcost ab"
INCONCLUSIVE, INTERRUPTED = 3, 130
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
    effect: Annotated[float, typer.Option(help="the relative change that has to be seen")] = DEFAULT.effect,
    pairs: Annotated[int, typer.Option(help="of fresh processes, per case", min=3)] = DEFAULT.pairs,
    seconds: Annotated[float, typer.Option(help="of turns, per case and pair", min=0.01)] = DEFAULT.seconds,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 3 where a case is inconclusive")] = False,  # noqa: FBT002
    self_test: Annotated[bool, typer.Option("--self-test", help="measure false alarms and power instead")] = False,  # noqa: FBT002
    runs: Annotated[int, typer.Option(help="of the self-test, per slowdown", min=1)] = 5,
    junit: Annotated[Path | None, typer.Option(help="write JUnit XML here, too")] = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Time two revisions in turns and judge every case: 0 no case is slower, 1 one is, 3 undecided with --strict."""
    if effect <= DEFAULT.floor:
        message = f"--effect {effect:g} is not above {DEFAULT.floor:g}, which is the change that is too small to matter"
        raise BenchError(message)
    rules = Rules(pairs=pairs, seconds=seconds, effect=effect)
    if self_test:
        _self_test(_cases(sweep, settings, device), rules, runs, as_json=as_json)
        return
    if base is None or is_benchmarks(Path(base)):
        stored = f"{base} has stored samples, taken at another time: they cannot give a paired verdict; "
        message = f"{stored if base else ''}name the revision to compare with, e.g. `skipcost ab main`"
        raise BenchError(message)
    root = repository_here() if benchmarks else None
    cases = [] if benchmarks else _cases(sweep, settings, device)
    if head == WORKING_TREE and dirty(root):
        ERR.print("the working tree is compared as it is, uncommitted changes included")
    verdicts = []
    for name in (base, *([release] if release else [])):
        found = _benchmarks(name, head, benchmarks, root, rules) if root else _compare(name, head, cases, rules, sweep)
        if not as_json:
            OUT.print(f"{head} against {name}", highlight=False)
            telling.print_verdicts(found, OUT)
        verdicts += found
    if as_json:
        telling.write_json(verdicts, OUT)
    _end(verdicts, junit, strict=strict)


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


def _compare(base: str, head: str, cases: list[Case], rules: Rules, sweep: str) -> list[Verdict]:
    commit = resolve(base)
    now = WORKING_TREE if head == WORKING_TREE else resolve(head)
    code = code_hash() if now == WORKING_TREE else now
    header = {"base": commit, "now": code, "pairs": rules.pairs, "seconds": rules.seconds}
    path = Path("results") / f"ab-{Path(sweep).stem}-{commit[:8]}-{code[:8]}.jsonl"
    subjects = [Subject(case.name, case.to_json()) for case in cases]
    with checked_out(commit) as first, checked_out(now) as second, _bar() as bar:
        arena = cases_arena(first, second, rules)
        try:
            return compare(subjects, arena, rules, Journal(path, header), bar(f"against {base}"))
        except KeyboardInterrupt:
            ERR.print(f"skipcost: stopped; what was measured is kept in {path}, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None


def _benchmarks(base: str, head: str, names: list[str] | None, root: Path, rules: Rules) -> list[Verdict]:
    commit, now = resolve(base, root), head if head == WORKING_TREE else resolve(head, root)
    foreign = None if root == own_repository() else root  # the suite's own folders are imported under another name
    with checked_out(commit, foreign) as first, checked_out(now, foreign) as second, _bar() as bar:
        subjects = [Subject(name, name) for name in benchmarks_of(names or [], first, second)]
        if not subjects:
            message = f"{' '.join(names or [])} names no benchmark: there is nothing to time"
            raise BenchError(message)
        arena = benchmarks_arena(names or [], first, second)
        return compare(subjects, arena, rules, Journal(None, {}), bar(f"against {base}"))


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str], Callable[[int, str], None]]]:
    """A bar whose total may shrink, because settled cases are left alone, or grow by what has to be confirmed."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=ERR) as progress:

        def start(what: str) -> Callable[[int, str], None]:
            task = progress.add_task(what, total=None)
            done = -1

            def tell(left: int, name: str) -> None:
                nonlocal done
                done += 1
                progress.update(task, total=done + left, completed=done, description=f"{what}: {name}")

            return tell

        yield start


def _self_test(cases: list[Case], rules: Rules, runs: int, *, as_json: bool) -> None:
    folder = Path("results") / f"self-test-{code_hash()}"
    with checked_out(WORKING_TREE) as here, _bar() as bar:
        tellers: dict[str, Callable[[int, str], None]] = {}

        def tell(what: str, left: int, name: str) -> None:
            if what not in tellers:
                tellers[what] = bar(what)
            tellers[what](left, name)

        try:
            findings = testing.self_test(cases, here, rules, runs, folder, tell)
        except KeyboardInterrupt:
            ERR.print(f"skipcost: stopped; what was measured is kept in {folder}, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        OUT.print_json(data=testing.to_json(findings, cases, rules))
    else:
        testing.print_findings(findings, OUT)


def _end(verdicts: list[Verdict], junit: Path | None, *, strict: bool) -> None:
    """Tell CI, and leave with the exit code that the verdicts ask for."""
    telling.tell_ci(verdicts, TITLE, ERR)
    if junit:
        telling.write_junit(verdicts, TITLE, junit)
    if any(each.fails for each in verdicts):
        raise typer.Exit(1)
    undecided = sum(each.verdict == "inconclusive" for each in verdicts)
    if undecided:
        ERR.print(f"skipcost: {undecided} of {len(verdicts)} cases are inconclusive: more --pairs or --seconds decide")
        if strict:
            raise typer.Exit(INCONCLUSIVE)
