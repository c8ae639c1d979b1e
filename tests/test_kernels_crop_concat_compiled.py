"""The kernel of `crop_concat`, compiled for GPUs that this machine need not have, and what each binary asks of them.

Compiling needs a process in which Triton does not interpret: this file, run as a program. It prints what it found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipcost.kernels.crop_concat import Move, _centred, plan

ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}
U_NET_SKIP = ((64, 568, 568), (64, 392, 392))  # the first skip of the 2015 network


def _forwards(batch: int, sizes: tuple[tuple[int, int, int], ...], **options: Any) -> list[Move]:
    maps = [_map(batch, *size, **options) for size in sizes]
    out = _map(batch, sum(size[0] for size in sizes), *sizes[-1][1:], **options)
    return [_centred(*pair) for pair in zip(maps, out.split([size[0] for size in sizes], 1), strict=True)]


def _backwards(batch: int, sizes: tuple[tuple[int, int, int], ...], **options: Any) -> list[Move]:
    return [_centred(move.target, move.source) for move in _forwards(batch, sizes, **options)]


def _map(*shape: int, memory_format: torch.memory_format = torch.channels_last, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


CASES: dict[str, list[Move]] = {
    "one skip": _forwards(8, U_NET_SKIP, dtype=torch.bfloat16),
    "its gradients": _backwards(8, U_NET_SKIP, dtype=torch.bfloat16),
    "six maps": _forwards(8, ((64, 40, 40),) * 5 + ((64, 37, 37),), dtype=torch.float32),
    "contiguous": _forwards(8, U_NET_SKIP, dtype=torch.bfloat16, memory_format=torch.contiguous_format),
    "sizes of one": _forwards(1, ((1, 1, 1), (1, 1, 1)), dtype=torch.float32),
    "64-bit offsets": _backwards(16, ((512, 640, 640), (512, 512, 512)), dtype=torch.int8),
}


def _compile(moves: list[Move], architecture: str) -> dict[str, int]:
    """Compile `place` for the moves as a launch would, and return what the binary needs and how it moves data."""
    import triton  # noqa: PLC0415 - only the process without the interpreter may import it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from skipcost.kernels.crop_concat_triton import place  # noqa: PLC0415

    _, arguments, constants = plan(moves)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    values: dict[tuple[int, ...], object] = {}
    signature = {
        name: _specialize(value, (index,), attributes, values)
        for index, (name, value) in enumerate(zip(place.arg_names, arguments, strict=False))
    }
    for name, value in constants.items():
        signature[name] = "constexpr"
        values[place.arg_names.index(name),] = value
    source = ASTSource(fn=place, signature=signature, constexprs=values, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32))
    return _resources(kernel.asm["ptx"], architecture)


def _specialize(value: Any, path: tuple[int, ...], attributes: dict[Any, Any], values: dict[Any, Any]) -> Any:
    """Type an argument as Triton's launcher would: 1 is a constant, and what 16 divides is known to be so."""
    if isinstance(value, tuple):
        return tuple(_specialize(each, (*path, index), attributes, values) for index, each in enumerate(value))
    if isinstance(value, Tensor):
        if value.storage_offset() * value.itemsize % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value == 1:
        values[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(ptx: str, architecture: str) -> dict[str, int]:
    """Let ptxas say how many registers the kernel takes and what it spills; count the 16-byte accesses."""
    from triton.backends.nvidia.compiler import get_ptxas  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(ARCHITECTURES[architecture]).path, "-v", f"--gpu-name={architecture}", path]
        done = subprocess.run([*command, "-o", path.with_suffix(".cubin")], capture_output=True, text=True, check=True)
    ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    return {
        "spilled_bytes": int(stored) + int(loaded),
        "registers": int(registers),
        "wide_loads": ptx.count("ld.global.v4.b32"),
        "wide_stores": ptx.count("st.global.v4.b32"),
        "accesses": ptx.count("ld.global") + ptx.count("st.global"),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    """What the program below prints, with an empty cache, so that everything is compiled."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton is not installed, so nothing was compiled: pip install 'skipcost[gpu]'")
    if not Path(spec.origin).with_name("backends").joinpath("nvidia", "bin", "ptxas").exists():
        pytest.skip("this triton has no ptxas, so nothing was compiled: install the wheel from PyPI")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"compiling ended with {done.returncode}\n{done.stderr}", pytrace=False)
    found: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_no_register_is_spilled(case: str, architecture: str, compiled: dict[str, dict[str, dict[str, int]]]) -> None:
    """It compiles, keeps everything in registers, and leaves room for 16 warps per multiprocessor."""
    needs = compiled[case][architecture]

    assert needs["spilled_bytes"] == 0
    assert needs["registers"] <= 128


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ["one skip", "its gradients", "six maps"])
def test_channels_last_maps_move_16_bytes_at_a_time(
    case: str, architecture: str, compiled: dict[str, dict[str, dict[str, int]]]
) -> None:
    """Where 16 divides the channels, every access is as wide as the hardware has them."""
    needs = compiled[case][architecture]

    assert needs["accesses"] == needs["wide_loads"] + needs["wide_stores"] > 0


def test_a_case_has_64_bit_offsets() -> None:
    """One of the compiled cases is beyond 31 bits, the others are not."""
    assert [case for case, moves in CASES.items() if plan(moves)[2]["wide"]] == ["64-bit offsets"]


if __name__ == "__main__":
    found = {name: {each: _compile(moves, each) for each in ARCHITECTURES} for name, moves in CASES.items()}
    sys.stdout.write(json.dumps(found))
