"""What the interpreter checks of all kernels share: maps amid canaries, comparison by bits, and a pytest to run them.

Whether Triton interprets is decided when it is first imported, for the whole process. The tests of a suite share one
process, and other tests need the compiler; so the functions named `check_*` of a test file run in a second pytest with
TRITON_INTERPRET=1, and a test in the first reports what they say.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
MARGIN = 97  # canaries on each side of a dense map: odd, so that maps do not start at a multiple of 16 bytes


def amid(values: Tensor, layout: str, canary: float) -> Tensor:
    """Copy (N, C, H, W) into the middle of a storage full of canaries, with the strides of `layout`."""
    n, c, h, w = values.shape
    if layout == "sliced":
        around = torch.full((n + 2, c + 2, 2 * h + 3, w + 2), canary, dtype=values.dtype)
        view = around[1 : n + 1, 1 : c + 1, 1 : 2 * h + 1 : 2, 1 : w + 1]
    elif layout == "expanded":
        return amid(values[:, :1], "contiguous", canary).expand(-1, c, -1, -1) if c else values
    else:
        order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "transposed": (0, 1, 3, 2)}[layout]
        around = torch.full((values.numel() + 2 * MARGIN,), canary, dtype=values.dtype)
        dense = around[MARGIN : MARGIN + values.numel()].view([values.shape[axis] for axis in order])
        view = dense.permute([order.index(axis) for axis in range(4)])
    view.copy_(values)
    return view


def bits(x: Tensor) -> Tensor:
    """The bytes of a map: NaN equals itself, and -0.0 is not 0.0."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare shape, type and every bit."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(actual), bits(expected))


def run_checks(file: Path, folder: Path) -> dict[str, list[str]]:
    """Run the checks of `file` in the interpreter; per check, what each of its cases complains about, "" for nothing.

    folder: where the second pytest may leave its report.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, so its interpreter did not run: pip install 'skipcost[gpu]'")
    report = folder / "report.xml"
    options = ["-q", "-o", "python_functions=check_*", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():  # a write far beside its target can end the process
        pytest.fail(
            f"the interpreter's pytest ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False
        )
    found: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by the pytest above
        found.setdefault(case.attrib["name"].partition("[")[0], []).extend(_complaints(case))
    return found


def _complaints(case: ET.Element) -> Iterator[str]:
    yield "\n".join(f"{case.attrib['name']}: {child.tag}\n{child.text}" for child in case if child.tag != "properties")
