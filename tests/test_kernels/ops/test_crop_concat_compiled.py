"""The kernel of `crop_concat`, compiled for GPUs that this machine need not have, and what each binary asks of them.

Compiling needs a process in which Triton does not interpret: this file, run as a program. It prints what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from skipcost.kernels.ops.crop_concat import centred, launches
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.verify.compiling import compile_launch, why_not

TARGETS = ("sm_80", "sm_90")
U_NET_SKIP = ((64, 568, 568), (64, 392, 392))  # the first skip of the 2015 network


def _forwards(batch: int, sizes: tuple[tuple[int, int, int], ...], *, back: bool = False, **options: Any) -> Launch:
    maps = [_map(batch, *size, **options) for size in sizes]
    out = _map(batch, sum(size[0] for size in sizes), *sizes[-1][1:], **options)
    pairs = zip(maps, out.split([size[0] for size in sizes], 1), strict=True)
    (launch,) = launches([centred(*(reversed(pair) if back else pair)) for pair in pairs])
    return launch


def _map(*shape: int, memory_format: torch.memory_format = torch.channels_last, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


CASES: dict[str, Launch] = {
    "one skip": _forwards(8, U_NET_SKIP, dtype=torch.bfloat16),
    "its gradients": _forwards(8, U_NET_SKIP, back=True, dtype=torch.bfloat16),
    "six maps": _forwards(8, ((64, 40, 40),) * 5 + ((64, 37, 37),), dtype=torch.float32),
    "contiguous": _forwards(8, U_NET_SKIP, dtype=torch.bfloat16, memory_format=torch.contiguous_format),
    "sizes of one": _forwards(1, ((1, 1, 1), (1, 1, 1)), dtype=torch.float32),
    "64-bit offsets": _forwards(16, ((512, 640, 640), (512, 512, 512)), back=True, dtype=torch.int8),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, Any]]]:
    """What the program below prints: for each case and target, the fields of `Resources`."""
    if reason := why_not():
        pytest.skip(f"nothing was compiled: {reason}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"compiling ended with {done.returncode}\n{done.stderr}", pytrace=False)
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_no_register_is_spilled(case: str, target: str, compiled: dict[str, dict[str, dict[str, Any]]]) -> None:
    """It compiles, keeps everything in registers, and leaves room for 16 warps per multiprocessor."""
    needs = compiled[case][target]

    assert needs["spilled_bytes"] == 0
    assert needs["registers"] <= 128
    assert needs["blocks"] * needs["warps"] >= 16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ["one skip", "its gradients", "six maps"])
def test_channels_last_maps_move_16_bytes_at_a_time(
    case: str, target: str, compiled: dict[str, dict[str, dict[str, Any]]]
) -> None:
    """Where 16 divides the channels, every access is as wide as the hardware has them."""
    needs = compiled[case][target]

    assert needs["accesses"] == needs["wide_accesses"] > 0


def test_a_case_has_64_bit_offsets() -> None:
    """One of the compiled cases is beyond 31 bits, the others are not."""
    assert [case for case, launch in CASES.items() if launch.constants["wide"]] == ["64-bit offsets"]


if __name__ == "__main__":
    found = {name: {each: asdict(compile_launch(launch, each)) for each in TARGETS} for name, launch in CASES.items()}
    sys.stdout.write(json.dumps(found))
