"""How a command ends that a signal or a closed pipe stops."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PIPE_CLOSED = 128 + signal.SIGPIPE  # as shells report whom a closed pipe ended, such as that to `head`
TIDYING_S = 10.0  # after a signal, in which another one does nothing: `timeout` and impatient people send several


class Stopped(BaseException):
    """A signal asked this process to end. What is lost or kept by that is in its notes, in words."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells report the signal."""
        return 128 + self.number

    @property
    def sentence(self) -> str:
        """What is told of it."""
        by = "" if self.number == signal.SIGINT else f" by {self}"
        return "; ".join((f"stopped{by}", *getattr(self, "__notes__", ())))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and SIGHUP raise `Stopped` in the block; one that was ignored stays ignored, as by nohup."""
    last: float | None = None

    def stop(number: int, _frame: object) -> None:
        nonlocal last
        if last is None or time.monotonic() - last >= TIDYING_S:
            last = time.monotonic()
            raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, stop) for each in STOPPING if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items() if last is None else ():  # else another one may come until the very end
            signal.signal(number, handler)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Have all of stdout written at the end of the block, or fail as a write does, once: the interpreter flushes later.

    BrokenPipeError where its reader is gone, also where click or rich have noticed, which leave with 1.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError:
        _drop_stdout()
        raise
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):
            _drop_stdout()
            raise BrokenPipeError from None
        raise


def _drop_stdout() -> None:
    """Let what is left in the buffer go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
