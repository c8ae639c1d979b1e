"""How a command is ended from outside: by a signal, or by a pipe that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from skipcost.kernels.errors import STOPPING, Stopped, flushed, stoppable


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back what a test leaves of signal handlers."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "stopped; rows are kept"),
        (signal.SIGTERM, 143, "stopped by SIGTERM; rows are kept"),
        (signal.SIGHUP, 129, "stopped by SIGHUP; rows are kept"),
    ],
)
def test_a_signal_is_an_exception(number: signal.Signals, code: int, sentence: str) -> None:
    """It leaves every block on its way, passes by whoever catches errors, and has its code and its sentence."""
    tidied = []
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background has it ignored

    def command() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception:  # noqa: BLE001 - what is tested
            tidied.append("caught by the way")
        finally:
            tidied.append("tidied")

    with pytest.raises(Stopped) as ended, stoppable():
        command()

    signal.signal(number, before)
    ended.value.add_note("rows are kept")
    assert tidied == ["tidied"]
    assert (ended.value.exit_code, ended.value.sentence) == (code, sentence)


def test_a_second_signal_does_not_disturb_the_tidying() -> None:
    """`timeout` sends two at once, and impatient people more; that holds until the process has left."""
    tidied = []

    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            tidied.append("tidied")

    with pytest.raises(Stopped) as ended, stoppable():
        command()
    os.kill(os.getpid(), signal.SIGINT)

    assert tidied == ["tidied"]
    assert str(ended.value) == "SIGTERM"


def test_what_was_ignored_stays_ignored() -> None:
    """A command under nohup outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with stoppable():
        os.kill(os.getpid(), signal.SIGHUP)

        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_are_those_of_before_where_nothing_came() -> None:
    """A command that is called from somebody's program leaves no handler in it."""
    before = [signal.getsignal(number) for number in STOPPING]

    with stoppable():
        pass

    assert [signal.getsignal(number) for number in STOPPING] == before


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Have a stdout whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield


def _printing(*, flush: bool) -> None:
    print("text", flush=flush)  # noqa: T201 - what is tested


def _as_rich_does() -> None:
    try:
        _printing(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@pytest.mark.parametrize("command", [partial(_printing, flush=False), partial(_printing, flush=True), _as_rich_does])
def test_a_pipe_that_nobody_reads_is_one_error(command: Callable[[], None]) -> None:
    """Whether it is noticed when the buffer is written at last, at once, or by a library that then leaves with 1."""
    with unread(), pytest.raises(BrokenPipeError), flushed():
        command()


def test_other_exits_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A verdict's exit code is its own."""

    def command() -> None:
        _printing(flush=False)
        sys.exit(1)

    with pytest.raises(SystemExit) as ended, flushed():
        command()

    assert ended.value.code == 1
    assert capsys.readouterr().out == "text\n"
