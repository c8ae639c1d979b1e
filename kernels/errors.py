"""What ends a command of `skipcost kernels` beside a failed check; bad input is a ValueError, as everywhere."""

from __future__ import annotations


class MachineError(RuntimeError):
    """The machine or its installation cannot do what was asked: one sentence, exit code 4."""
