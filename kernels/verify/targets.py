"""What the GPUs that kernels are compiled for can hold: `TARGETS`, and how many blocks of a kernel fit at a time.

Arithmetic on published numbers, no measurement. Importing this needs neither torch nor triton.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipcost.kernels.devices import has_copy_engine, has_tensor_products

PARTITIONS = 4  # of a multiprocessor: schedulers (NVIDIA) or SIMDs (AMD), each with its own registers
LANE_REGISTERS = 512  # 32-bit registers of one lane of a partition, which its warps share: 16384 / 32 = 32768 / 64
REGISTER_STEP = 8  # a warp is given registers in eights per lane: 256 per warp of 32


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture, and what one of its multiprocessors (AMD: compute units) holds.

    backend, architecture, lanes: what Triton wants to know; lanes are the threads of a warp (AMD: of a wave).
    warps, blocks: at most resident. shared_bytes: per multiprocessor, of which the system takes reserved_bytes for each
    block; shared_step: it is given out in multiples of this.
    tensor_columns: of the memory that tensor cores accumulate in, 0 where that is the registers.
    copy_engine: whether descriptors (TMA) are executed as such. tensor_products: whether Triton multiplies matrices on
    tensor cores there. tf32: whether 32-bit products can be rounded to tf32.
    """

    backend: str
    architecture: int | str
    lanes: int
    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024
    shared_step: int = 128
    tensor_columns: int = 0
    tf32: bool = True

    @property
    def copy_engine(self) -> bool:
        """As dispatch has it."""
        return has_copy_engine(self.name)

    @property
    def tensor_products(self) -> bool:
        """As dispatch has it."""
        return has_tensor_products(self.name)

    @property
    def name(self) -> str:
        """The architecture as devices and configurations are filed under: "sm90", "gfx942"."""
        return f"sm{self.architecture}" if self.backend == "cuda" else str(self.architecture)

    @property
    def block_shared_bytes(self) -> int:
        """What one block may ask for, if it is alone on its multiprocessor."""
        return self.shared_bytes - self.reserved_bytes


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and for the reserved KiB the
# tuning guides of Ampere to Blackwell; Turing reserves none and gives out 256 bytes at a time (CUDA's occupancy data).
# Tensor memory: PTX ISA, "Tensor Memory", 512 columns of 128 lanes.
# AMD: LLVM, AMDGPUBaseInfo.cpp: 8 waves per SIMD; 16 groups of several waves, for want of barriers; local memory of
# 64 KiB in steps of 512 bytes (gfx942) or 160 KiB in steps of 1280 (gfx950), none of it reserved.
TARGETS: dict[str, Target] = {
    "sm_75": Target("cuda", 75, 32, 32, 16, 64 << 10, 0, 256, tf32=False),  # T4, RTX 20
    "sm_80": Target("cuda", 80, 32, 64, 32, 164 << 10),  # A100
    "sm_86": Target("cuda", 86, 32, 48, 16, 100 << 10),  # A10, RTX 30
    "sm_89": Target("cuda", 89, 32, 48, 24, 100 << 10),  # L4, RTX 40
    "sm_90": Target("cuda", 90, 32, 64, 32, 228 << 10),  # H100, H200
    "sm_100": Target("cuda", 100, 32, 64, 32, 228 << 10, tensor_columns=512),  # B200
    "sm_120": Target("cuda", 120, 32, 48, 24, 100 << 10),  # RTX 50
    "gfx942": Target("hip", "gfx942", 64, 32, 16, 64 << 10, 0, shared_step=512),  # MI300
    "gfx950": Target("hip", "gfx950", 64, 32, 16, 160 << 10, 0, shared_step=1280, tf32=False),  # MI350
}


@dataclass(frozen=True, slots=True)
class Residency:
    """How much of a kernel runs at a time on one multiprocessor.

    blocks: of the kernel; 0 where not even one fits. occupancy: their warps as a share of the most that could be.
    limit: what there would have to be more of for another block, joined by "+" where several things are short.
    """

    blocks: int
    occupancy: float
    limit: str


def residency(target: Target, *, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> Residency:
    """Say how many blocks fit: each of `warps` warps, and `registers` per thread, and `shared_bytes` in all."""
    per_lane = max(_round_up(registers, REGISTER_STEP), REGISTER_STEP)
    shared = _round_up(shared_bytes + target.reserved_bytes, target.shared_step)
    fits = {
        "registers": LANE_REGISTERS // per_lane * PARTITIONS // warps,
        "shared": target.shared_bytes // shared if shared else target.blocks,
        "warps": target.warps // warps,
        "blocks": target.blocks,
    }
    if tensor_columns:
        fits["tensor memory"] = target.tensor_columns // tensor_columns
    blocks = min(fits.values())
    return Residency(blocks, blocks * warps / target.warps, "+".join(name for name in fits if fits[name] == blocks))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
