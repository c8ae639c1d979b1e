"""`skipcost baseline` and `skipcost gate`: write down what a sweep's cases cost, and stop what changes it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.opened import Present
from skipcost.bench.cases.record import Result
from skipcost.bench.compare import kernel_resources
from skipcost.bench.compare import verdicts as telling
from skipcost.bench.compare.attribution import attribute
from skipcost.bench.compare.baseline import Baseline, baseline_of, failures_of, read_baseline
from skipcost.bench.compare.benchmarks import is_benchmarks, read_benchmarks
from skipcost.bench.compare.gate import compared, judge
from skipcost.bench.compare.revisions import Revision, checked_out, merge_base
from skipcost.bench.compare.verdicts import Verdict
from skipcost.bench.console import ERR, JSON, JUNIT, KEPT, OUT, check_outputs, going_on, write_file
from skipcost.bench.errors import BenchError, MachineError, StoreError
from skipcost.bench.measure.environment import code_hash, version_of
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.process import PYTHON, finished
from skipcost.bench.store.store import Run, Store, open_store
from skipcost.bench.sweeps.plan import shipped_sweeps

TITLE = "skipcost gate"

DB = Annotated[Path, typer.Argument(help="a store of `skipcost sweep`, or the .json of pytest-benchmark")]


def baseline(
    store: DB, output: Annotated[Path, typer.Option("-o", help="the file, e.g. bench/baselines/ci.jsonl")]
) -> None:
    """Write down what the cases of a store cost, one a line, for `skipcost gate` and for reviewers."""
    check_outputs({"-o": output}, [store])
    made = read_benchmarks(store) if is_benchmarks(store) else _of_store(store)
    count = sum(isinstance(value, int | float) for entry in made.entries.values() for value in entry.exact.values())
    if not count:
        message = f"{store} holds no exact number: a baseline of it would compare nothing"
        raise BenchError(message)
    write_file(output, made.text, [store], kept=f"{len(made.entries)} cases are kept in {store}")
    ERR.print(f"{count} exact numbers of {len(made.entries)} cases in {output}")


def _of_store(store: Path) -> Baseline:
    with open_store(store) as opened:
        chosen = _present(opened, store)
        if failed := failures_of(opened, chosen):
            case, result = failed[0]
            message = (
                f"{len(failed)} exact metrics of {store} have no number, so it cannot be a baseline; the first: "
                f"{result.metric} of {case.name}: {result.outcome} {result.note}"
            )
            raise BenchError(message)
        return baseline_of(opened, chosen)


def gate(
    store: DB,
    baseline: Annotated[Path | None, typer.Option(help="a file that `skipcost baseline` wrote")] = None,
    against: Annotated[
        str | None, typer.Option(help="a revision: both sides are computed, at the merge base and in the working tree")
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="compile the kernels, and compare what they need")] = False,  # noqa: FBT002
    junit: JUNIT = None,
    kept: KEPT = None,
    as_json: JSON = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Compare every exact number with a baseline's, and fail on any change: 0 unchanged, 1 changed, 2 no comparison."""
    if (baseline is None) == (against is None):
        message = "give either --baseline FILE or --against REV: without one there is nothing to compare with"
        raise BenchError(message)
    if against is not None and is_benchmarks(store):
        message = f"--against takes a store; {store} has samples of one side: `skipcost ab --benchmarks` runs both"
        raise BenchError(message)
    taken = [store, *([baseline] if baseline else [])]
    check_outputs({"--junit": junit, "--verdicts": kept}, taken)
    if baseline is not None:
        parts = [(f"skipcost baseline {store} -o {baseline}", _against_file(store, baseline))]
        parts += [(kernel_resources.UPDATE, _kernels(None))] if kernels else []
    else:
        with checked_out(merge_base(str(against))) as base:
            parts = [("", _against_revision(store, base))]
            parts += [("", _kernels(base))] if kernels else []
    verdicts = [verdict for _, part in parts for verdict in part]
    telling.write_json(verdicts, OUT) if as_json else telling.print_verdicts(verdicts, OUT)
    telling.pass_on(verdicts, TITLE, ERR, junit, kept, taken)
    _end(parts)


def _end(parts: list[tuple[str, list[Verdict]]]) -> None:
    """Leave with 1 where a part has a verdict that fails or nothing that was compared; a part comes with its update."""
    failing = [update for update, part in parts if not compared(part) or any(each.fails for each in part)]
    if not all(compared(part) for _, part in parts):
        ERR.print("skipcost: nothing could be compared: that is no pass")
    for update in filter(None, failing):
        ERR.print(f"If the change is meant, update the baseline and commit it: {update}")
    if failing:
        raise typer.Exit(1)


def _kernels(base: Revision | None) -> list[Verdict]:
    """Judge what the kernels of this tree need by those of a revision, or by the baseline that ships."""
    now, problems = kernel_resources.compiled(None)
    if base:
        return judge(kernel_resources.compiled(base)[0], now, problems)
    return judge(kernel_resources.reviewed(now.versions["triton"]), now, problems)


def _against_file(path: Path, file: Path) -> list[Verdict]:
    base = read_baseline(file)
    if is_benchmarks(path):
        return judge(base, read_benchmarks(path))
    with open_store(path) as opened:
        _check_fresh(opened, path)
        chosen = _present(opened, path)
        return judge(base, baseline_of(opened, chosen), _reasons(opened, chosen))


def _check_fresh(store: Store, path: Path) -> None:
    """Refuse a store of other code or packages: a gate over yesterday's numbers passes whatever was changed today."""
    run = store.newest()
    if run.environment.get("code") != code_hash():
        message = (
            f"{path} was measured with other code than this: run {_sweep_again(run, path)} again, "
            "which measures what this code does"
        )
        raise BenchError(message)
    for package in sorted({each for metric in METRICS.values() for each in metric.rests_on}):
        then, now = run.environment.get("versions", {}).get(package, "unknown"), version_of(package)
        if then.partition("+")[0] != now.partition("+")[0]:
            message = f"{path} was measured with {package} {then}, here is {now}: run {_sweep_again(run, path)} again"
            raise BenchError(message)


def _sweep_again(run: Run, path: Path) -> str:
    """The command that measured, as far as its run tells: only sweeps that ship are known by their names."""
    return f"`skipcost sweep {run.sweep} -o {path}`" if run.sweep in shipped_sweeps() else "the sweep that made it"


def _present(store: Store, path: Path) -> set[str]:
    """The cases whose numbers are those of what is here now: of each user's own model the state that it has here.

    BenchError where the store has no such rows of a model: what others say of it would pass for it.
    """
    run, present = store.newest(), Present()
    chosen: set[str] = set()
    for states in store.states(run.fingerprint).values():
        factories = [(each, each.factory) for each in reversed(states)]
        here = next((case for case, factory in factories if factory is None or present.has(factory)), None)
        if here is None:
            raise BenchError(_no_rows_of(states[-1], present, run, path))
        chosen.add(here.case_id)
    return chosen


def _no_rows_of(case: Case, present: Present, run: Run, path: Path) -> str:
    """Say that a store holds nothing of a user's own model as it is here, what differs, and what to do."""
    assert case.factory is not None
    why = present.differs(case.factory)
    return (
        f"{path} has no numbers of {case.spec.label} as it is here ({why}): run {_sweep_again(run, path)} again into "
        "this store; if it is asked for no longer, sweep into a new file"
    )


def _reasons(store: Store, chosen: Collection[str] | None = None) -> dict[tuple[str, str], str]:
    """Why there is no number, for the metrics that were tried."""
    failed = failures_of(store, chosen)
    return {(case.key, result.metric): f"{result.outcome}: {result.note}".strip(": ") for case, result in failed}


def _against_revision(path: Path, base: Revision) -> list[Verdict]:
    """Compute both sides: the working tree's cases into the store, the merge base's into one that is thrown away."""
    with open_store(path) as opened:
        sweep, cases = opened.newest().sweep, opened.cases()
        own = sorted({case.spec.label for each in _asked_last(opened) if (case := cases[each][0]).factory})
    if own:
        message = f"{path} has models of your own ({', '.join(own)}), which no revision of skipcost has: use --baseline"
        raise BenchError(message)
    if sweep not in shipped_sweeps():
        message = (
            f"{path} has the cases of `{sweep}`, which is no sweep that ships, so no revision has it: compare with "
            f"--baseline FILE, or sweep one of {', '.join(shipped_sweeps())}"
        )
        raise BenchError(message)
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "base.sqlite"
        with going_on(f"measuring `{sweep}` at the merge base, and here"):
            _sweep(base, sweep, other)
            _sweep(None, sweep, path)
        then, before = _side(other, base)
        now, after = _side(path, None)
        with open_store(path) as opened:
            verdicts = judge(then, now, _reasons(opened, _asked_last(opened)))
        return attribute(verdicts, (before, after), base)


def _asked_last(store: Store) -> set[str]:
    """The cases of the newest run: of a sweep that was just run, all of it and nothing that the store held before."""
    newest = store.newest().run_id
    return {case_id for run_id, case_id in store.asked() if run_id == newest}


def _sweep(revision: Revision | None, sweep: str, store: Path) -> None:
    """Run a sweep's cases with a revision's code, or with this one's."""
    words = ("sweep", sweep, "-o", str(store.resolve()))
    command = revision.command("skipcost.bench", *words) if revision else [*PYTHON, "-m", "skipcost.bench", *words]
    done = finished(command, env=revision.environment() if revision else None)
    if done.returncode:
        where = f"revision {revision.commit[:12]}" if revision else "the working tree"
        message = f"`skipcost sweep {sweep}` fails at {where}: {' '.join(done.stderr.split())[-400:]}"
        raise MachineError(message)


def _side(path: Path, revision: Revision | None) -> tuple[Baseline, dict[tuple[str, str], Result]]:
    """Numbers, and results by (canonical JSON, metric), of one side."""
    try:
        with open_store(path) as opened:
            keys = {case_id: case.key for case_id, (case, _) in opened.cases().items()}
            chosen = _asked_last(opened)
            found = opened.results(opened.newest().fingerprint, chosen)
            numbers = baseline_of(opened, chosen)
    except (ValueError, StoreError) as error:
        where = f"revision {revision.commit[:12]}" if revision else path
        message = f"the cases of {where} cannot be read by this version ({error}): compare with --baseline FILE"
        raise BenchError(message) from None
    return numbers, {(keys[case_id], name): each for case_id, row in found.items() for name, each in row.items()}
