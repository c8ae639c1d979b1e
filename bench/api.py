"""The suite from Python: a sweep and its table, what a GPU would report of a case, and what fits.

The same as the commands of these names, with values in place of texts on a screen. All are names of `skipcost.bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.fitting.answer import answer
from skipcost.bench.fitting.question import ask
from skipcost.bench.memory import on_gpu
from skipcost.bench.store import tables
from skipcost.bench.store.store import create_store
from skipcost.bench.sweeps import driver
from skipcost.bench.sweeps.plan import Plan, PlannedCase
from skipcost.kernels.devices import device_named

Tell = Callable[[PlannedCase, list[Result]], None]


def sweep(plan: Plan, store: str | Path, *, seed: int = 0, tell: Tell = lambda _case, _results: None) -> pd.DataFrame:
    """Measure what a store lacks of a plan (`load_plan`), and return the table of what the plan asks for.

    What is arithmetic is worked out first. Then each case runs in a process of its own, and each result is stored
    before the next case starts: stop it at any time, and the same call goes on.
    seed: of the order. tell: hears of each case when it is done.
    Returns `wide_table`'s columns, rows of this environment. BenchError where the store or the machine will not do.
    """
    with driver.Server() as server, create_store(Path(store)) as opened:
        driver.sweep(plan, opened, server, seed, tell)
        known = driver.recognised(plan, opened)
        chosen = {planned.case.case_id for planned in known.cases}
        return tables.wide_table(opened, server.environment["fingerprint"], chosen)


def predict(case: Case, device: str) -> on_gpu.GpuMemory:
    """What a GPU would report of a case's memory, in bytes: likely figures with low and high ends; no GPU is needed.

    device: a name of the table, such as "h100" or "rtx4090". ValueError for another name, a size that cannot work, or
    a backend without arithmetic (eager and rewritten have it).
    """
    return on_gpu.predict(case, device_named(device))


def fit(
    device: str | None = None,
    *,
    limits: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
    batch: int | None = None,
    top: int = 10,
    **case: str,
) -> list[dict[str, Any]]:
    """The largest networks within limits, best first, each with its figures and what is just too much.

    device: a GPU, whose memory is a limit of its own, or None for this machine. limits: texts by "memory" (24GiB),
    "latency" (15ms), "macs" (50G), "params" (31M). settings: what to choose from, as `--set` has it ("depth=3,4").
    batch: images a step; None for the largest that fits. case: size, mode, precision, optimizer.
    BenchError where a text is not understood, or nothing fits.
    """
    texts: dict[str, str | None] = dict.fromkeys(("params", "macs", "memory", "latency"))
    question = ask(texts | dict(limits or {}), dict(case), batch, device, list(settings))
    rows: list[dict[str, Any]] = answer(question, None, top)["rows"]
    return rows
