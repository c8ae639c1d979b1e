"""`skipcost kernels`, or `python -m skipcost.bench.kernels`: check, time, tune and explain the kernels.

0 fine, 1 a failed check, 2 bad usage, 4 the environment. A command's module is imported when the command is chosen.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from skipcost.bench.errors import BenchError
from skipcost.bench.streams import steady_streams, tell
from skipcost.kernels.errors import PIPE_CLOSED, Stopped, flushed, stoppable

BAD_USAGE = BenchError.exit_code
COMMANDS = {
    "check": "every configuration at real shapes against float64, on a GPU; tiny shapes in Triton's interpreter",
    "bench": "time every call and every network, ours and PyTorch's ways, on a GPU",
    "tune": "find the fastest tile of each shape on a GPU",
    "resources": "compile ahead of time, without a GPU: registers, spills, shared memory, occupancy",
    "explain": "which implementation runs each layer of a network, and why",
}


def usage() -> str:
    """Return the help: a line for each command."""
    lines = [f"  {name:10} {title}" for name, title in COMMANDS.items()]
    head = "Usage: skipcost kernels COMMAND [OPTIONS]\n\nCheck, time, tune and explain the fused kernels.\n\n"
    return head + "\n".join(lines) + "\n\nskipcost kernels COMMAND --help has the options of each.\n"


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code; what it raises becomes one sentence on stderr."""
    steady_streams()
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(usage())
        return 0 if argv else BAD_USAGE
    command, *rest = argv
    if command not in COMMANDS:
        tell(f"unknown command {command!r}; accepted: {', '.join(COMMANDS)}")
        return BAD_USAGE
    try:
        with stoppable(), flushed():
            code: int = importlib.import_module(f"skipcost.bench.kernels.{command}").main(rest)
    except (ValueError, BenchError) as error:
        tell(str(error))
        return error.exit_code if isinstance(error, BenchError) else BAD_USAGE
    except BrokenPipeError:
        return PIPE_CLOSED
    except Stopped as stop:
        stop.add_note("rows that were made are kept, and the same command goes on")
        tell(stop.sentence)
        return stop.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
