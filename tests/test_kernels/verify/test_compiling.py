"""Compiling a launch for a GPU that is not here: the kernel that would be launched, and read aright.

What compiles does so in processes of their own, in which Triton does not interpret.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_compiler import python, skip_without_compiler

from skipcost.kernels.ops.launch import Descriptor, described, device_function
from skipcost.kernels.verify.compiling import _count_sass, _products, compiled
from skipcost.kernels.verify.gated import GATED
from skipcost.kernels.verify.targets import TARGETS


def test_sass_is_counted_by_what_it_does() -> None:
    """Predicates and suffixes do not hide an instruction, bytes of spills are summed, no-ops are nothing."""
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/             @UP1  UTMALDG.4D [UR8], [UR4] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/              @P1  STL.64 [R1+0x8], R4 ;
        /*0060*/                   LDL.LU R4, [R1] ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   NOP ;
    """

    assert _count_sass(listing) == {
        "spilled_bytes": 12,
        "tensor_core": 1,
        "copy_engine": 1,
        "async_copies": 1,
        "accesses": 3,
        "wide_accesses": 2,
        "instructions": 9,
    }


def test_products_are_those_that_tensor_cores_can_do() -> None:
    """16 bits always; 32 bits where they may be rounded; exact 32 bits and 64 bits never."""
    line = "%t = tt.dot %a, %b, %c{} : tensor<128x64x{}> * tensor<64x64x{}> -> tensor<128x64xf32>\n"
    exact, rounded = line.format("", "f32", "f32"), line.format(", inputPrecision = tf32", "f32", "f32")

    assert _products(line.format("", "bf16", "bf16") + exact + line.format("", "f64", "f64") + rounded) == 2


@pytest.mark.slow
def test_meta_tensors_compile_to_the_kernels_of_real_ones() -> None:
    """The cache key of Triton's launcher is the same for meta tensors and real ones, whatever it specialises on.

    It tells alignment, channels of 16, 17 and 1, and absent arguments apart; but not heights and widths of 5, 16 and
    1, which the kernel does not specialise on.
    """
    skip_without_compiler()

    done = python("""
import torch
from skipcost.kernels.verify.compiling import compiled
from skipcost.kernels.ops.conv import conv_launch
from skipcost.kernels.ops.tiles import Tile

def key(device, channels=16, size=5, offset=0, shift=True, dtype=torch.float16):
    def tensor(*shape):
        count = torch.Size(shape).numel()
        return torch.zeros(count + offset, dtype=dtype, device=device)[offset:].view(shape)
    x, out = (tensor(1, size, size, channels).permute(0, 3, 1, 2) for _ in range(2))
    vector = torch.zeros(channels, device=device) if shift else None
    tile = Tile("pointer", 16, 16, 16, 4, 2)
    launch = conv_launch([x], tensor(channels, 3, 3, channels), out, padding=1, shift=vector, tile=tile)
    return compiled(launch, "sm_80").hash

for options in ({}, {"offset": 1}, {"offset": 8}, {"channels": 17}, {"channels": 1}, {"shift": False}):
    print(key("meta", **options), key("cpu", **options))
print(key("meta", size=16), key("meta", size=1))
""")

    assert done.returncode == 0, done.stderr
    *pairs, resized = [line.split() for line in done.stdout.splitlines()]
    assert all(meta == real for meta, real in pairs)
    assert len({meta for meta, _ in pairs}) == len(pairs) - 1  # 8 elements of 2 bytes are 16: aligned again
    assert pairs[2] == pairs[0]
    assert {*resized} == {pairs[0][0]}


@pytest.mark.slow
def test_occupancy_by_registers_is_llvms() -> None:
    """LLVM writes into its listing how many waves an AMD SIMD holds; a block of four waves has one on each of four."""
    skip_without_compiler()

    done = python("""
import re
from skipcost.kernels.verify.compiling import compile_launch, compiled
from skipcost.kernels.verify.gated import GATED
from skipcost.kernels.verify.targets import TARGETS, residency
for name in ("conv/pointer/64>64@512", "conv/few/3>64@512", "batch_norm/normalize", "up_conv/128>64@512"):
    launch = GATED[f"{name}/bf16"]()
    (waves,) = re.findall(r"; Occupancy: (\\d+)", compiled(launch, "gfx942").asm["amdgcn"])
    registers = compile_launch(launch, "gfx942").registers
    print(waves, residency(TARGETS["gfx942"], warps=4, registers=registers, shared_bytes=0).blocks)
""")

    assert done.returncode == 0, done.stderr
    pairs = [line.split() for line in done.stdout.splitlines()]
    assert len(pairs) == 4
    assert all(waves == blocks for waves, blocks in pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [each for each in GATED if each.endswith("/bf16") and "wide" not in each])
def test_a_gpu_compiles_the_same(name: str) -> None:
    """What Triton's launcher compiles for real tensors on this card is the kernel that is gated."""
    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    if target not in TARGETS:
        pytest.skip(f"the table of targets has no {target}")
    launch = GATED[name]()

    expected = compiled(launch, target).hash

    arguments = {key: described(_on_the_gpu(value)) for key, value in launch.arguments.items()}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = device_function(launch.kernel).warmup(grid=launch.grid, **arguments, **launch.constants, **options)
    assert kernel.hash == expected


def _on_the_gpu(value: Any) -> Any:
    """Allocate what a launch on meta tensors speaks of."""
    if isinstance(value, torch.Tensor):
        storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8, device="cuda")
        return storage.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, Descriptor):
        return replace(value, tensor=_on_the_gpu(value.tensor))
    return tuple(_on_the_gpu(each) for each in value) if isinstance(value, tuple) else value
