"""The two ends of a process that is asked and answers, JSON in lines: `Process` and, in its `__main__`, `answers`.

What hangs, or breaks its process, is ended from here. What is asked of whom, and for how long, is not known here: see
`driver`, `pairs` and `jobs`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

PYTHON = (sys.executable, "-P")  # of every process that is started: without the current folder on its path
GRACE_S = 5.0  # for a process that is asked to end
MOST_WORDS = 350  # characters of last words: a note has room for 400
SIGNALS = {each.value: each.name for each in signal.Signals}


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process whose output is captured as text. Where the block ends before it, so does the process, in order.

    It leads a session of its own: a signal that reaches this process alone, or both, is this one's to pass on.
    """
    process = subprocess.Popen(  # noqa: S603 - our own commands
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        start_new_session=True, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def finished(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `started`."""
    with started(command, **options) as process:
        said, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def how_ended(code: int, said: str = "") -> str:
    """Say by which signal or with which exit code a process ended, and its last words."""
    how = f"exit code {code}" if code >= 0 else f"signal {-code} ({SIGNALS.get(-code, 'without a name')})"
    return f"ended with {how}{': ' * bool(said)}{said}"


def last_words(log: IO[bytes]) -> str:
    """The last lines of what was printed, as text whatever it is."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    return " ".join(log.read().decode(errors="replace").strip().splitlines()[-3:])[-MOST_WORDS:]


class Process:
    """A process that is asked, and answers. It leads a session of its own, as those of `started`."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """Start it; options are of `Popen`. Where `stderr` is one of them, it leaves no last words."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.buffer = b""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.popen = subprocess.Popen(command, start_new_session=True, **(pipes | options))  # noqa: S603 - our own

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; whether anybody hears it, `read` finds out."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(message).encode() + b"\n")
            self.popen.stdin.flush()

    def read(self, seconds: float = math.inf) -> dict[str, Any] | None:
        """Return the next message; None where there is none within `seconds`, or the process has ended."""
        assert self.popen.stdout is not None
        end = time.monotonic() + max(seconds, 0.0)
        while b"\n" not in self.buffer:
            left = None if seconds == math.inf else max(end - time.monotonic(), 0.0)
            ready, _, _ = select.select([self.popen.stdout], [], [], left)
            chunk = os.read(self.popen.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk:
                if ready:  # it has closed its end: there is nothing more to come
                    self._wait(GRACE_S)
                return None
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.popen.poll() is None

    def ended(self) -> str:
        """Wait for the end of the process, and say how it ended."""
        return how_ended(self.popen.wait(), last_words(self.log))

    def end(self) -> None:
        """End the process and those that it started, such as compilers: they are a group of their own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self, grace_s: float = 0.0) -> None:
        """End the process, and let go of it. grace_s: seconds in which it may end by itself, asked nothing more."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self.popen.stdout.close()  # or one that answers at length would wait for a reader
        self._wait(grace_s)
        self.log.close()

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        self.end()
        self.popen.wait()


def say(out: IO[str], message: dict[str, Any]) -> None:
    """Write a message to whoever asked."""
    out.write(json.dumps(message) + "\n")
    out.flush()


@contextlib.contextmanager
def answers() -> Iterator[IO[str]]:
    """What a `__main__` writes its answers to; what anything else prints goes to stderr, and not among them.

    Who asked may be gone: then there is nobody to tell.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield out
    except BrokenPipeError:
        os._exit(0)  # without writing what is left in the buffer
