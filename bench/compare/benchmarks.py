"""pytest-benchmark as a front end of the exact gate: what its JSON holds; `ab` runs benchmarks in turns (`pairs`).

It is never the judge. Its stored samples were taken at other times, so nothing is concluded from them; its
`extra_info` holds exact numbers by the names of METRICS, and a benchmark that is missing or new is a verdict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipcost.bench.compare.baseline import FIGURES, Baseline, Entry
from skipcost.bench.decoding import check_fields, check_members, is_finite, parse_json
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS

KINDS = {"fullname": str, "extra_info": dict, "median": float}  # of what is read of a benchmark
PRESENT = "benchmark"  # the number that every benchmark has: 1, so that one without extra_info is missed, too


def is_benchmarks(path: Path) -> bool:
    """Whether a file is taken for pytest-benchmark's JSON rather than a store."""
    return path.suffix == ".json"


def read_benchmarks(path: Path) -> Baseline:
    """Read the JSON of `pytest --benchmark-json`; BenchError in one sentence where it is no such thing."""
    remedy = f"`pytest --benchmark-only --benchmark-json={path}` writes it"
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        check_members("benchmarks", content["benchmarks"], dict)
        found = [(each["fullname"], each["extra_info"], each["stats"]["median"]) for each in content["benchmarks"]]
        for name, extra, median in found:
            check_fields({"fullname": name, "extra_info": extra, "median": median}, KINDS)
    except FileNotFoundError:
        message = f"there is no file {path}: {remedy}"
        raise BenchError(message) from None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        message = f"{path} is not pytest-benchmark's JSON ({type(error).__name__}: {error}): {remedy}"
        raise BenchError(message) from None
    if not found:
        message = f"{path} holds no benchmark: was any run? {remedy}"
        raise BenchError(message)
    entries: dict[str, Entry] = {}
    for name, extra, median in found:
        key = json.dumps({PRESENT: name}, sort_keys=True, separators=(",", ":"))
        if key in entries:
            message = f"{path} holds the benchmark {name} twice"
            raise BenchError(message)
        entries[key] = Entry(name, {PRESENT: 1, **_exact(path, name, extra)}, {"latency_s": _rounded(median)})
    return Baseline(path.stem, {}, entries)


def _rounded(median: float) -> float:
    return float(f"{median:.{FIGURES}g}")


def _exact(path: Path, name: str, extra: dict[str, Any]) -> dict[str, float | str]:
    """The entries of extra_info that are exact metrics by name; other keys are the benchmark's own affair."""
    exact: dict[str, float | str] = {}
    for key, value in extra.items():
        if key in METRICS and METRICS[key].exact:
            if not is_finite(value) or value < 0:
                message = f"{path}: {key}={value!r} of {name} is no cost: a number of 0 or more is accepted"
                raise BenchError(message)
            exact[key] = value
    return exact
