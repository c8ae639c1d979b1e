"""Tests of kernels in Triton's interpreter are ordinary tests: pytest finds, selects and counts them like all others.

Whether Triton interprets is decided when it is first imported, for the whole process, and other tests need the
compiler. So what is collected from a file named `*_interpreted.py` runs in a second pytest with TRITON_INTERPRET=1: one
for a file, a fork of a process that has imported torch and triton, with exactly what was selected of it; each outcome
is reported here. A skip is a failure, since the interpreter needs no GPU that could be missing. Within a process that
interprets, nothing of this happens.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

NAMED = "_interpreted.py"
TOLD = "SKIPCOST_TESTS_TOLD"  # the file that the second pytest tells its outcomes in
NOT_RUN = "the interpreter's pytest ended with {code} before this test had\n{output}"


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report what the second pytest said of a test, in place of running it; None for all other tests."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not item.path.name.endswith(NAMED):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(report=_report(item))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the second pytest: tell the outcome of each phase as a line."""
    if told := os.environ.get(TOLD):
        line = {"id": report.nodeid, "when": report.when, "outcome": report.outcome, "text": report.longreprtext}
        with Path(told).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _report(item: pytest.Item) -> pytest.TestReport:
    if importlib.util.find_spec("triton") is None:
        where = (str(item.path), item.location[1], "triton is not installed: pip install 'skipcost[gpu]'")
        return pytest.TestReport(item.nodeid, item.location, {}, "skipped", where, "setup")
    selected = tuple(each.nodeid for each in item.session.items if each.path == item.path)
    phases, output = _run(selected, item.config.rootpath)
    lines = phases.get(item.nodeid, [])
    ended = any(line["when"] == "teardown" for line in lines)  # else the process died under it, or before
    wrong = not ended or any(line["outcome"] != "passed" for line in lines)
    text = "\n".join([*(line["text"] for line in lines if line["outcome"] != "passed"), *([] if ended else [output])])
    outcome: Any = "failed" if wrong else "passed"
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, text or None, "call")


@functools.cache
def _run(selected: tuple[str, ...], root: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Run tests in a second pytest: what it told of each, by its id; and how it ended, for those it says nothing of."""
    with tempfile.TemporaryDirectory() as folder:
        names, told, said = (Path(folder) / name for name in ("selected", "told", "said"))
        names.write_text("\n".join(selected), encoding="utf-8")
        for empty in (told, said):
            empty.touch()
        code = _asked(_forking(root), [str(each) for each in (names, told, said)])
        phases: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in map(json.loads, told.read_text(encoding="utf-8").splitlines()):
            phases[line["id"]].append(line)
        return phases, NOT_RUN.format(code=code, output=said.read_text(encoding="utf-8", errors="replace")[-4000:])


@functools.cache
def _forking(root: Path) -> subprocess.Popen[str]:
    """The process that interprets: it imports Triton, and torch if this one has; each file's pytest is its fork."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, str(Path(__file__).resolve()), "triton", *({"torch"} & sys.modules.keys())]
    made = subprocess.Popen(
        command, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(made.communicate)  # ends it by the end of what it reads
    return made


def _asked(process: subprocess.Popen[str], paths: list[str]) -> str:
    """Have a fork run a file's tests; how its pytest ended."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(paths) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    sys.path[0] = ""  # as `python -m pytest` has it
    for line in sys.stdin:
        names, told, said = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ[TOLD] = told
                for stream, path in enumerate((os.devnull, said, said)):
                    os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), stream)
                code = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"@{names}"]))
                sys.stdout.flush()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - to the one who asked


if __name__ == "__main__":
    _serve()
