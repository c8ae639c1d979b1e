"""Compile a launch ahead of time, for a GPU that need not be here, and read from the binary what the kernel needs.

Triton's own launcher does the compiling, so types, divisibility and constants are those of a launch on such a GPU: a
driver stands in for the machine's and names the target. Nothing is run, and tensors may be on the meta device. The
disassemblers are those inside the Triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skipcost.kernels.ops.launch import Descriptor, Launch, described, device_function, interpreted
from skipcost.kernels.verify.baseline import Resources
from skipcost.kernels.verify.targets import TARGETS, Target, residency

WIDE = 16  # bytes: the most that one thread loads or stores at a time
TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
PRODUCT = re.compile(r"tt\.dot\S* [^\n]*?tensor<(?:\d+x)*(\w+)>[^\n]*")
BLOCK_MOVE = re.compile(r"tt\.descriptor_(?:load|store|gather|scatter|reduce)\b")
SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
SASS_PRODUCT = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
AMDGCN = re.compile(r"^\t((?:[svd]s?|buffer|global|flat|scratch)_\w+)(.*)", re.MULTILINE)


def why_not() -> str:
    """Say in a sentence why this process cannot compile ahead of time; "" where it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'skipcost[gpu]'"
    if interpreted():
        return "TRITON_INTERPRET=1 makes Triton interpret its kernels instead of compiling them: unset it"
    import triton  # noqa: PLC0415 - see above

    missing = [name for name in TOOLS if not (_tools(triton) / name).exists()]
    if missing:
        return f"this triton comes without {', '.join(missing)}: install the wheel from PyPI"
    return ""


def can_run(launch: Launch, target: Target) -> bool:
    """Whether the target has what the launch is written for: the engine behind descriptors, tensor cores, tf32."""
    moves_blocks = _has_descriptor(tuple(launch.arguments.values()))
    precision = launch.constants.get("precision")  # of products; other kernels have none
    multiplies = precision is None or (target.tensor_products and (target.tf32 or precision != "tf32"))
    return (target.copy_engine or not moves_blocks) and multiplies


def compiled(launch: Launch, target: str) -> Any:
    """Compile what `launch.run` would launch on `target`, a key of TARGETS: Triton's own CompiledKernel.

    0.3 to 3 s, or no time if it is in Triton's cache (TRITON_CACHE_DIR). ValueError for an unknown target;
    RuntimeError where nothing can be compiled, as where Triton interprets.
    """
    if target not in TARGETS:
        message = f"target={target!r} is unknown; accepted: {', '.join(TARGETS)}"
        raise ValueError(message)
    if reason := why_not():
        raise RuntimeError(reason)
    with _pretending(TARGETS[target]):
        arguments = {name: described(value) for name, value in launch.arguments.items()}
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        return device_function(launch.kernel).warmup(grid=launch.grid, **arguments, **launch.constants, **options)


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a launch as `compiled` does, and return what the binary needs; disassembling takes 0.3 s."""
    kernel = compiled(launch, target)
    import triton  # noqa: PLC0415 - it is there, since it compiled

    found = TARGETS[target]
    binary = _of_amd(kernel) if found.backend == "hip" else _of_nvidia(kernel, _tools(triton))
    warps, shared, columns = (getattr(kernel.metadata, name, 0) for name in ("num_warps", "shared", "tmem_size"))
    fits = residency(found, warps=warps, registers=binary.registers, shared_bytes=shared, tensor_columns=columns or 0)
    source = kernel.asm["ttir"]
    return Resources(
        kernel=launch.kernel,
        target=target,
        triton=triton.__version__,
        warps=warps,
        registers=binary.registers,
        spilled_bytes=binary.spilled_bytes,
        shared_bytes=shared,
        products=_products(source),
        tensor_core=binary.tensor_core,
        block_moves=len(BLOCK_MOVE.findall(source)),
        copy_engine=binary.copy_engine,
        async_copies=binary.async_copies,
        accesses=binary.accesses,
        wide_accesses=binary.wide_accesses,
        instructions=binary.instructions,
        blocks=fits.blocks,
        occupancy=round(fits.occupancy, 4),
        limit=fits.limit,
    )


class _Absent:
    """As much of a Triton driver as compiling asks for: it says which GPU there is, and has none."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - needs triton

        self._target = GPUTarget(target.backend, target.architecture, target.lanes)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:  # the key under which a kernel keeps what it compiled: one for each target
        return str(self._target)

    def get_current_stream(self, device: str) -> str:
        return device


@contextmanager
def _pretending(target: Target) -> Iterator[None]:
    from triton.runtime.driver import driver  # noqa: PLC0415 - needs triton

    driver.set_active(_Absent(target))
    try:
        yield
    finally:
        driver.set_active(None)  # it finds the machine's own again when it is next asked for


@dataclass(frozen=True, slots=True)
class _Binary:
    registers: int
    spilled_bytes: int
    tensor_core: int
    copy_engine: int
    async_copies: int
    accesses: int
    wide_accesses: int
    instructions: int


def _of_nvidia(kernel: Any, tools: Path) -> _Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", "-ndf", file.name)
    (registers,) = re.findall(r" REG:(\d+) ", usage)
    return _Binary(int(registers), **_count_sass(listing))


def _count_sass(listing: str) -> dict[str, int]:
    """Count what matters of SASS, NVIDIA's machine code."""
    opcodes = [each for each in SASS.findall(listing) if each != "NOP"]
    names = Counter(each.partition(".")[0] for each in opcodes)
    accesses = [_width(each) for each in opcodes if each.startswith(("LDG.", "STG."))]
    return {
        "spilled_bytes": sum(_width(each) for each in opcodes if each.startswith(("LDL", "STL"))),
        "tensor_core": sum(names[each] for each in SASS_PRODUCT),
        "copy_engine": names["UTMALDG"] + names["UTMASTG"],
        "async_copies": names["LDGSTS"],
        "accesses": len(accesses),
        "wide_accesses": accesses.count(WIDE),
        "instructions": len(opcodes),
    }


def _width(opcode: str) -> int:
    """Bytes that a load or store moves: `LDL.LU.64` 8, `STL` 4."""
    widths = {"8": 1, "16": 2, "64": 8, "128": 16}
    return next((widths[part.strip("US")] for part in opcode.split(".")[1:] if part.strip("US") in widths), 4)


def _of_amd(kernel: Any) -> _Binary:
    text = kernel.asm["amdgcn"]
    counts = {name: int(number) for name, number in re.findall(r"^\s*(?:- )?\.(\w+_count): +(\d+)", text, re.MULTILINE)}
    listing = [found for found in AMDGCN.findall(text) if found[0] != "s_nop"]
    direct = [opcode for opcode, rest in listing if "_load_" in opcode and ("lds" in opcode or " lds" in rest)]
    accesses = [each for each, _ in listing if re.match(r"(?:buffer|global|flat)_(?:load|store)_", each)]
    return _Binary(
        registers=counts["vgpr_count"],
        spilled_bytes=4 * counts["vgpr_spill_count"],
        tensor_core=sum(opcode.startswith(("v_mfma", "v_smfmac", "v_wmma")) for opcode, _ in listing),
        copy_engine=0,
        async_copies=len(direct),
        accesses=len(accesses) - len(direct),
        wide_accesses=sum(each.endswith("x4") for each in accesses) - sum(each.endswith("x4") for each in direct),
        instructions=len(listing),
    )


def _products(source: str) -> int:
    """Matrix products that tensor cores can do: in 8 or 16 bits, or in 32 where rounding to tf32 was allowed."""
    found = [(match[0], match[1]) for match in PRODUCT.finditer(source)]
    return sum(kind not in ("f32", "f64") or "inputPrecision" in line for line, kind in found)


def _has_descriptor(value: Any) -> bool:
    return isinstance(value, Descriptor) or (isinstance(value, tuple) and any(map(_has_descriptor, value)))


def _tools(triton: Any) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - Triton's own tools
