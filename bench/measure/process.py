"""The two ends of a process that works: `Process`, who asks, and `serve`, who answers, a line of JSON for each message.

A kernel that hangs, or breaks its process, is ended from here. What is to be done with whom and for how long is not
known here, see `jobs`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

PYTHON = (sys.executable, "-P")  # of every process that is started: without the current folder on its path
GRACE_S = 5.0  # for a process that is asked to end
Row = dict[str, Any]
Work = Callable[[dict[str, Any], Sequence[dict[str, Any]]], Iterator[Row]]


class LostDeviceError(RuntimeError):
    """The device of this process is of no use any more."""


def resolve(function: str) -> Work:
    """Import the function that "module:function" names."""
    module, _, name = function.partition(":")
    work: Work = getattr(importlib.import_module(module), name)
    return work


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


class Process:
    """`python -m skipcost.bench.measure.process FUNCTION`: jobs in, a line each; rows out, a line each."""

    def __init__(self, function: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.buffer = b""
        command = [*PYTHON, "-m", "skipcost.bench.measure.process", function]
        self.process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True
        )

    def ask(self, what: dict[str, Any], parts: Sequence[dict[str, Any]], until: float) -> None:
        """Hand a job over; parts that are not begun at `until`, a time.time(), are left."""
        assert self.process.stdin is not None
        text = json.dumps({"what": what, "parts": parts, "until": until}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # the epitaph will say why
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()

    def read(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message; None where there is none within `seconds`, or the process has ended."""
        assert self.process.stdout is not None
        end = time.monotonic() + max(seconds, 0.0)
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0.0))
            chunk = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk:
                if ready:
                    self.process.wait()
                return None
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def epitaph(self) -> str:
        """Say how the process ended: by which signal or code, and its last words."""
        code = self.process.wait()
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if line.strip()]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}" + (f": {said[-1]}" if said else "")

    def end(self) -> None:
        """End the process and those that it started, such as compilers: they are a group of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and let go of what it was spoken to through."""
        self.end()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def serve(function: str, lines: IO[str], out: IO[str]) -> None:
    """Answer jobs until there are no more: the other end of `Process`."""

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    work = resolve(function)
    for line in lines:
        asked = json.loads(line)
        try:
            rows = work(asked["what"], asked["parts"])
            for _ in asked["parts"]:
                if time.time() >= asked["until"]:
                    say({"ending": "time"})
                    break
                say({"row": next(rows)})
            else:
                say({"ending": None})
        except LostDeviceError:
            say({"ending": "lost"})
            return


if __name__ == "__main__":
    # What is printed by others must not get between the rows. Who asked may be gone: then there is nobody to tell.
    rows_out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from skipcost.bench.measure import (
        process as serving,  # `LostDeviceError` of this module run as a script would be another class
    )

    try:
        serving.serve(sys.argv[1], sys.stdin, rows_out)
    except BrokenPipeError:
        os._exit(0)  # without writing what is left in the buffer
