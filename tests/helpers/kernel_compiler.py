"""What tests that compile kernels share: a process in which Triton compiles, and what to do where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skipcost.kernels.verify.compiling import why_not


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process in which Triton compiles, unless the environment says otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)


def skip_without_compiler() -> None:
    """Skip where there is none, and say why."""
    if reason := why_not():
        pytest.skip(f"nothing was compiled: {reason}")
