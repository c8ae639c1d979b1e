"""The fork server's protocol: whatever a model does to its process, each answer is its own, or a row says why not."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.record import Result
from skipcost.bench.measure import server as serving
from skipcost.bench.measure.server import CLOSED, ENDED, GONE, LATE, SECOND
from skipcost.bench.sweeps.driver import Request, Server

SHORT = {"seconds": 0.02, "noise": 0.1, "least": 3, "warmup_seconds": 0.02}
HOSTILE = """
import os, sys, threading, time
from torch import nn

def net():
    return nn.Conv2d(1, 2, 3)

def forks_and_returns():
    os.fork()
    return net()

def returns_in_the_child():
    if os.fork():
        os._exit(0)
    return net()

def leaves_a_child():
    if not os.fork():
        time.sleep(60)
        os._exit(0)
    return net()

def dies_and_leaves_a_child():
    if os.fork():
        os._exit(7)
    time.sleep(60)
    os._exit(0)

def prints_no_text():
    os.write(1, bytes(range(256)) * 100)
    os.write(2, b"\\xff\\xfe\\n")
    return net()

def closes_its_streams():
    sys.stdout.close()
    sys.stdin.close()
    os.closerange(0, 3)
    return net()

def replaces_stdout():
    sys.stdout = sys.stderr = None
    return net()

def reads_stdin():
    return input() or net()

def changes_folder():
    os.chdir("/")
    return net()

def starts_threads():
    threading.Thread(target=time.sleep, args=(60,)).start()
    return net()

def leaves():
    os._exit(7)

def exits():
    sys.exit(5)

def raises_half_a_letter():
    raise ValueError("half\\udcff")

class ImportsLate(nn.Module):
    def forward(self, image):
        import beside
        return beside.layer(image)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A fork server where the models lie."""
    here = tmp_path_factory.mktemp("hostile")
    (here / "hostile.py").write_text(HOSTILE)
    (here / "beside.py").write_text("from torch import nn\nlayer = nn.Conv2d(1, 2, 3)\n")
    (here / "json.py").write_text("raise SystemExit(9)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        with Server() as running:
            yield running


def ask(server: Server, name: str, *metrics: str) -> list[Result]:
    """Run one of the models."""
    case = Case(spec=Factory(f"hostile:{name}"), height=16, width=16)
    return list(server.run(Request(case, metrics, SHORT, 120.0, None)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outcome", "said"),
    [
        ("forks_and_returns", "crash", "two processes answered: the model forks"),
        (
            "returns_in_the_child",
            "crash",
            "process",
        ),  # the end of the one or the answer of the other, whichever is first
        ("leaves_a_child", "ok", ""),
        ("prints_no_text", "ok", ""),
        ("closes_its_streams", "ok", ""),
        ("replaces_stdout", "ok", ""),
        ("reads_stdin", "crash", "EOFError"),
        ("changes_folder", "ok", ""),
        ("starts_threads", "ok", ""),
        ("leaves", "crash", "the process ended with exit code 7"),
        ("dies_and_leaves_a_child", "crash", "the process ended with exit code 7"),
        ("exits", "unsupported", "leaves the program"),
        ("raises_half_a_letter", "crash", "ValueError: half\\udcff"),
    ],
)
def test_what_a_factory_does_to_its_process_is_its_own_row(server: Server, name: str, outcome: str, said: str) -> None:
    """It costs its own numbers at most; the next case of the same server has its own, soon."""
    started = time.monotonic()
    results = ask(server, name, "params", "conv_macs")
    (after,) = ask(server, "net", "params")

    assert [(each.metric, each.outcome) for each in results] == [("params", outcome), ("conv_macs", outcome)]
    assert all(said in each.note for each in results)
    assert list(after.samples) == [20]
    assert time.monotonic() - started < 50


@pytest.mark.slow
def test_a_model_may_import_when_it_runs(server: Server) -> None:
    """What lies beside it is reached in the forward pass as when it was made."""
    (result,) = ask(server, "ImportsLate", "conv_macs")

    assert result.outcome == "ok", result.note


def relay(written: bytes, *, closed: bool = True, driver: bool = True, seconds: float = 5.0) -> tuple[str, list[str]]:
    """What becomes of what a fork of number 7 wrote: how it ended, and the lines that were passed on."""
    (results, writer), (requests, asking) = os.pipe(), os.pipe()
    os.write(writer, written)
    told = io.StringIO()
    if closed:
        os.close(writer)
    if not driver:
        os.close(asking)
    with os.fdopen(requests) as stream:
        ended = serving._relay(7, results, stream, told, time.monotonic() + seconds)
    for number in (results, *([] if closed else [writer]), *([asking] if driver else [])):
        os.close(number)
    return ended, told.getvalue().splitlines()


@pytest.mark.parametrize(
    ("written", "ended", "passed"),
    [
        (b'7 {"a": 1}\n7 {"b": 2}\n7\n', ENDED, ['{"a": 1}', '{"b": 2}']),
        (b'7 {"a": 1}\n7 {"b": ', CLOSED, ['{"a": 1}']),
        (b'7 {"a": 1}\n8 {"a": 1}\n7\n', SECOND, ['{"a": 1}']),
        (b'8\n7 {"a": 1}\n', SECOND, []),
        (b'noise\n\xff\xfe\n7 {"a": 1}\n7\n', ENDED, ['{"a": 1}']),
        (b'7 {"a": [1, 27 {"b"}\n7\n', ENDED, []),
        (b'{"a": 1}\n7\n', ENDED, []),
        (b"7\n" + b'7 {"late": 1}\n', ENDED, []),
    ],
)
def test_only_whole_lines_of_the_fork_itself_are_passed_on(written: bytes, ended: str, passed: list[str]) -> None:
    """Half lines, noise and mixed lines are nobody's answer; another process's line ends it all."""
    assert relay(written) == (ended, passed)


def test_the_end_of_the_driver_and_of_the_time_are_told() -> None:
    """A fork that says nothing is waited for as long as there is time, and somebody who asks."""
    assert relay(b"", closed=False, driver=False) == (GONE, [])
    assert relay(b"", closed=False, seconds=0.01) == (LATE, [])


def test_a_fork_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has closed its pipe and left its group; one that ends in time keeps its status."""
    monkeypatch.setattr(serving, "POLL_S", 0.001)

    def forked(seconds: float) -> int:
        child = os.fork()
        if not child:
            time.sleep(seconds)
            os._exit(3)
        return child

    assert serving._finish(forked(60.0), time.monotonic() + 0.05) == (-9, True)
    assert serving._finish(forked(0.0), time.monotonic() + 30.0) == (3, False)


def test_a_result_that_comes_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is the row; the second, and one that was not asked for, are nobody's."""
    request = Request(replace(Case(), height=16), ("params",), SHORT, 1.0, None)
    replies = [Result("params", samples=(1,)), Result("params", samples=(2,)), Result("conv_macs", samples=(3,))]
    monkeypatch.setattr(Server, "_ask", lambda _self, _request: iter(replies))

    assert list(Server.run(Server.__new__(Server), request)) == replies[:1]
