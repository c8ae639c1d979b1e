"""How many blocks of a kernel a multiprocessor holds, against numbers known from elsewhere."""

from __future__ import annotations

import pytest

from skipcost.kernels.verify.targets import TARGETS, residency


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        # sm_90 with Triton 3.6.0, as measured when the kernels were prototypes
        ("sm_90", 4, 168, 73728, (3, 0.1875, "registers+shared")),
        ("sm_90", 8, 84, 73728, (2, 0.25, "registers")),
        ("sm_90", 8, 148, 98304, (1, 0.125, "registers")),
        ("sm_90", 8, 128, 98304, (2, 0.25, "registers+shared")),
        ("sm_90", 4, 122, 57392, (3, 0.1875, "shared")),
        ("sm_90", 4, 122, 81976, (2, 0.125, "shared")),
        ("sm_90", 8, 107, 114744, (2, 0.25, "registers+shared")),  # from 128 registers on,
        ("sm_90", 8, 134, 114744, (1, 0.125, "registers")),  # there is one block only
        ("sm_90", 4, 255, 163840, (1, 0.0625, "shared")),
        ("sm_90", 4, 120, 12288, (4, 0.25, "registers")),
        ("sm_90", 4, 36, 0, (12, 0.75, "registers")),
        ("sm_90", 1, 24, 0, (32, 0.5, "blocks")),
        ("sm_90", 4, 24, 0, (16, 1.0, "warps")),
        # one byte more than a block may have: cannot be launched
        ("sm_90", 4, 24, (227 << 10) + 1, (0, 0.0, "shared")),
        ("sm_86", 4, 100, 163840, (0, 0.0, "shared")),
        # 100 KiB hold two blocks of 48 KiB, each with the system's KiB, and 48 warps are all
        ("sm_89", 4, 128, 49152, (2, 8 / 48, "shared")),
        # AMD: what LLVM's own listing says of 144 and 110 registers, 3 and 4 waves per SIMD; 64 KiB of local memory
        ("gfx942", 4, 144, 0, (3, 0.375, "registers")),
        ("gfx942", 4, 110, 0, (4, 0.5, "registers")),
        ("gfx942", 4, 64, 49152, (1, 0.125, "shared")),
        ("gfx950", 4, 64, 49152, (3, 0.375, "shared")),
        ("gfx950", 4, 64, 32768, (4, 0.5, "shared")),  # not five: 160 KiB are given out in steps of 1280 bytes
    ],
)
def test_residency_is_the_hardwares(
    target: str, warps: int, registers: int, shared: int, expected: tuple[int, float, str]
) -> None:
    """Blocks, occupancy and what is short agree with numbers known from elsewhere, at each kind of limit."""
    found = residency(TARGETS[target], warps=warps, registers=registers, shared_bytes=shared)

    assert (found.blocks, found.occupancy, found.limit) == expected


def test_tensor_memory_limits_blocks_where_it_exists() -> None:
    """Of 512 columns, two blocks of 256 fit, whatever else would."""
    found = residency(TARGETS["sm_100"], warps=4, registers=64, shared_bytes=1024, tensor_columns=256)

    assert (found.blocks, found.limit) == (2, "tensor memory")


def test_a_block_may_have_what_the_guides_say() -> None:
    """CUDA's table gives the most shared memory of a block beside that of a multiprocessor: the system's KiB less."""
    expected = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}

    assert {name: TARGETS[name].block_shared_bytes >> 10 for name in expected} == expected
    assert [TARGETS[name].block_shared_bytes >> 10 for name in ("gfx942", "gfx950")] == [64, 160]
