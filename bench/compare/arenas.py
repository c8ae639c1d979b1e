"""Where two revisions meet: at the suite's cases, in two warm processes, or at anybody's pytest benchmarks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from skipcost.bench.cases.case import Case
from skipcost.bench.compare.ab import Arena, Rules
from skipcost.bench.compare.benchmarks import run_benchmarks
from skipcost.bench.compare.duel import Bout, SideError, bout, facing
from skipcost.bench.compare.revisions import Revision

ORDER = (0, 1, 1, 0)


def cases_arena(base: Revision, now: Revision, rules: Rules, slowdown: float = 0.0) -> Arena:
    """Cases, in two processes that take turns; `slowdown` is a share of each call's time, added to the second side."""

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str, bool], Bout]]:
        with facing(base, now) as sides:

            def measure(key: str, profiled: bool) -> Bout:  # noqa: FBT001 - the arena's own form
                return bout(Case.from_json(key), sides, rules.seconds, slowdown, profiled=profiled)

            yield measure

    return Arena(base.commit, now.commit, opened)


def benchmarks_arena(names: Sequence[str], base: Revision, now: Revision) -> Arena:
    """Benchmarks by their pytest names: a pair is two runs of pytest on either side, A B B A, all names in each."""

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str, bool], Bout]]:
        times: list[list[dict[str, float]]] = [[], []]
        for at in ORDER:
            side = (base, now)[at]
            times[at].append(run_benchmarks(names, side.tree, side.environment()))

        def measure(key: str, _profiled: bool) -> Bout:  # noqa: FBT001 - the arena's own form
            lacking = {
                side.commit: f"there is no benchmark {key}"
                for side, runs in zip((base, now), times, strict=True)
                if any(key not in run for run in runs)
            }
            if lacking:
                raise SideError(lacking)
            base_s, now_s = (math.exp(sum(math.log(run[key]) for run in runs) / len(runs)) for runs in times)
            return Bout((math.log(now_s / base_s),), base_s, now_s)

        yield measure

    return Arena(base.commit, now.commit, opened)


def benchmarks_of(names: Sequence[str], *sides: Revision) -> list[str]:
    """The full names of all benchmarks that the names stand for, on any side; each is run once for it."""
    found: dict[str, None] = {}
    for side in sides:
        found |= dict.fromkeys(run_benchmarks(names, Path(side.tree), side.environment()))
    return list(found)
