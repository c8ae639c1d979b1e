"""`python -m skipcost.kernels`, which is `skipcost kernels`: check, time, tune and explain the kernels.

0 fine, 1 a failed check, 2 bad usage, 4 the environment. A command's module is imported when the command is chosen.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from skipcost.kernels.console import steady_streams, tell
from skipcost.kernels.errors import MachineError

BAD_USAGE, ENVIRONMENT, INTERRUPTED = 2, 4, 130  # the last is 128 + SIGINT, as shells report it
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
        code: int = importlib.import_module(f"skipcost.kernels.{command}").main(rest)
    except ValueError as error:
        tell(str(error))
        return BAD_USAGE
    except MachineError as error:
        tell(str(error))
        return ENVIRONMENT
    except KeyboardInterrupt:
        tell("stopped; rows that were made are kept, and the same command goes on")
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
