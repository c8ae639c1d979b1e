"""A small store made by hand, which tests of reports read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.store.store import create_store
from skipcost.bench.sweeps.plan import load_plan

SWEEP = """
[[grid]]
variant = ["unet", "unet++", "unet3+"]
depth = [2, 3]
width = [8, 12, 16]
skip = ["concat", "sum", "none"]
size = 64
metrics = ["params"]

[[grid]]
variant = ["unet", "unet++", "unet3+"]
depth = [2, 3]
width = [8, 12, 16]
skip = ["concat", "sum", "none"]
size = 64
mode = "training"
batch = 8
metrics = ["params"]
"""
FAILED = "unet3+/d3/w16/sum"
DOUBTFUL = "unet/d2/w8/concat"
EVIL = "<script>alert('note')</script>"
ENVIRONMENT = {
    "python": "3.11.7",
    "system": "Linux",
    "cpu": "A processor",
    "cpus": 2,
    "memory_bytes": 8 << 30,
    "gpus": [],
    "cuda": False,
    "versions": {"torch": "2.13.0"},
    "flags": {},
    "fingerprint": "here",
    "commit": "0123456789abcdef",
    "dirty": True,
}


def _results(case: Case) -> list[Result]:
    """Counts as they are, latency and memory made up from them: 1 ms and a nanosecond a MAC, 100 MACs a byte."""
    graph = case.graph()
    macs = case.batch * graph.conv_macs(case.height, case.width)
    exact = {"params": graph.params(), "conv_macs": macs, "receptive_field": graph.receptive_field()}
    found = [Result(name, samples=(value,)) for name, value in exact.items()]
    found.append(Result("peak_memory_predicted_bytes", samples=(macs // 100,)))
    if case.mode == "training":
        return found
    missed = {"by_operator": {"conv": macs}, "not_counted": {"aten::max_pool2d": case.spec.depth}}
    found.append(Result("fvcore_flops", samples=(macs * 1.5,), detail=missed))
    second = 1e-3 + macs * 1e-9
    latency = Result("latency_s", samples=(second, second * 1.02, second * 0.98))
    if case.spec.label == FAILED:
        latency = Result("latency_s", "out_of_memory", note=EVIL)
    if case.spec.label == DOUBTFUL:
        latency = replace(latency, samples=(1e3,), note="noisy: the median is known to 40% only")
    return [*found, latency]


def make_store(path: Path) -> Path:
    """Write the store: an older environment with one row, then the one that is reported."""
    sweep = path.with_suffix(".toml")
    sweep.write_text(SWEEP)
    plan = load_plan(str(sweep), {}, "cpu", 1)
    with create_store(path) as store:
        old = store.add_run("2026-01-01T00:00:00+00:00", "tiny", 0, {**ENVIRONMENT, "fingerprint": "elsewhere"})
        run = store.add_run("2026-01-02T03:04:05+00:00", "tiny", 7, ENVIRONMENT)
        for planned in plan.cases:
            store.add_case(planned.case, list(planned.aliases))
            for result in _results(planned.case):
                store.add_result(run, planned.case.case_id, result)
        store.add_result(old, plan.cases[0].case.case_id, Result("params", samples=(1,)))
    return path
