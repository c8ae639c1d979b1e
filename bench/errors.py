"""What can go wrong with a user's input or machine: one sentence each, turned into an exit code by the CLI alone."""

from __future__ import annotations


class BenchError(Exception):
    """Bad usage or input; exit code 2."""

    exit_code = 2


class StoreError(BenchError):
    """A store that cannot be read or written as it is."""


class SweepError(BenchError):
    """A sweep file that says something that cannot be run."""


class MachineError(BenchError):
    """The machine or its installation cannot do what was asked; exit code 4."""

    exit_code = 4


class UnsupportedError(ValueError):
    """What cannot be done with a model as it is: the outcome of a row is then unsupported, and this is its note."""


class LostDeviceError(RuntimeError):
    """The device of this process is of no use any more: another process has to go on."""
