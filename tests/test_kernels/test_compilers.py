"""What a compiler is told of a function is what PyTorch would tell it, and costs no import of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from skipcost.kernels.compilers import constant


def test_the_mark_is_pytorchs_own() -> None:
    """Both decorators leave the same function with the same attributes."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    marked = constant(ours)

    assert marked is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_a_compiler_calls_a_marked_function_once() -> None:
    """While it traces; a function without the mark, which no compiler can follow, breaks the graph."""
    calls: list[bytes] = []

    @constant
    def side() -> int:
        calls.append(Path(__file__).read_bytes())  # nothing that Dynamo can follow
        return 2

    compiled = torch.compile(lambda x: x * side(), backend="eager", fullgraph=True)

    results = [compiled(torch.ones(1)).item() for _ in range(3)]

    assert results == [2, 2, 2]
    assert len(calls) == 1


def test_no_process_loads_dynamo_for_what_is_not_compiled() -> None:
    """Not the ops, not the server of a sweep: it would take each of them 2 s."""
    program = (
        "import sys, skipcost.kernels.rewriting.fused, skipcost.kernels.rewriting.low, "
        "skipcost.kernels.rewriting.rewrite, skipcost.bench.measure.server; sys.exit('torch._dynamo' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False)

    assert done.returncode == 0
