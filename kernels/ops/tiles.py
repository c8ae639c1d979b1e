"""How a kernel cuts its work: `Tile`, the tile that is shipped for a shape, and the candidates that tuning tries.

A tile that was tuned is a row of `configs/<architecture>.json`, written by `skipcost kernels tune` on a GPU. Where no
row fits, `default_tile` picks by rules that follow from resources: registers and shared memory decide how many blocks
a multiprocessor holds (`skipcost kernels resources`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

FORMS = ("pointer", "tma", "few")
FEW_CHANNELS = 7  # up to here all taps of all channels fit one block of 64 along the reduction
MATRIX_MIN = 16  # the least rows, columns and depth of a tensor-core product


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `pixels` x `channels` outputs, `depth` of the reduction at a time.

    form: "pointer" gathers its input through addresses, "tma" lets the copy engine fetch blocks of rows x columns
    pixels (then pixels = rows * columns), "few" takes all taps of an input of few channels at once.
    warps of 32 threads work on it; `stages` loads are in flight.
    """

    form: str = "pointer"
    pixels: int = 128
    channels: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 3
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        """Refuse what no kernel could run."""
        if self.form not in FORMS:
            message = f"form={self.form!r} is unknown; accepted: {', '.join(FORMS)}"
            raise ValueError(message)
        for name in ("pixels", "channels", "depth"):
            size = getattr(self, name)
            if size < MATRIX_MIN or size & (size - 1):
                message = f"{name}={size} of a tile is not a power of two of {MATRIX_MIN} or more"
                raise ValueError(message)
        if self.form == "tma" and self.rows * self.columns != self.pixels:
            message = f"a tma tile of {self.rows} x {self.columns} has not {self.pixels} pixels"
            raise ValueError(message)

    @property
    def name(self) -> str:
        """One word for tables, e.g. `tma-8x16x64x64-w4-s3`."""
        pixels = f"{self.rows}x{self.columns}" if self.form == "tma" else str(self.pixels)
        return f"{self.form}-{pixels}x{self.channels}x{self.depth}-w{self.warps}-s{self.stages}"


@dataclass(frozen=True, slots=True)
class Need:
    """What decides on a convolution's tile: the op's name and the shape it runs at."""

    op: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    batch: int
    precision: str  # fp32 | tf32 | bf16 | fp16
    taps: int = 9
    sources: int = 1
    divisor: int = 1  # the greatest that the channels of all maps have in common

    @property
    def pixels(self) -> int:
        """Output pixels of the whole batch."""
        return self.batch * self.height * self.width


def up_to(size: int, largest: int) -> int:
    """Return the power of two that holds `size`, from 16 to `largest`."""
    return min(max(1 << (size - 1).bit_length(), MATRIX_MIN), largest)


def default_tile(need: Need, form: str) -> Tile:
    """Return the tile of a shape that nobody has tuned: what leaves room for most warps on a multiprocessor of sm_90.

    Read off binaries that Triton 3.7.1 compiled ahead of time, bf16: at 64 outputs 8 warps take 80 registers where 4
    take 152, and three blocks fit either way. At 128 outputs 128 pixels leave room for one block only (134 registers
    by descriptor, 171 by address), 64 pixels for three. Operands of 4 bytes fill shared memory twice as fast, so their
    depth is halved.
    """
    wide = need.precision in ("fp32", "tf32")
    channels = up_to(
        need.out_channels, 64 if wide or form == "few" or (form == "pointer" and need.sources > 1) else 128
    )
    if form == "few":
        return Tile("few", 128, channels, up_to(need.taps * need.in_channels, 64), 8, 2)
    pixels, warps = (64, 4) if channels > 64 else (128, 8)  # noqa: PLR2004 - see above
    depth = up_to(need.in_channels, 32 if wide else 64)
    if form == "tma":  # a block must not reach beyond the last channel of a map
        depth = min(depth, max(need.divisor & -need.divisor, MATRIX_MIN))
        return Tile("tma", pixels, channels, depth, warps, 3, *_block(pixels, need.height, need.width))
    if need.sources > 1:  # the loop over each source is written out, and its addresses with it
        depth = min(depth, 32)
    return Tile("pointer", pixels, channels, depth, warps, 3)


def _block(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Cut a map into blocks so that the fewest hang over its edges; near-square ones where that is equal."""
    sides = [(8, pixels // 8), (4, pixels // 4), (16, pixels // 16), (2, pixels // 2)]
    return min(sides, key=lambda block: -(-height // block[0]) * -(-width // block[1]))


CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "pointer": (
        Tile("pointer", 128, 64, 64, 4, 3),
        Tile("pointer", 128, 64, 64, 8, 3),
        Tile("pointer", 128, 64, 32, 4, 4),
        Tile("pointer", 128, 64, 32, 8, 3),
        Tile("pointer", 128, 128, 64, 8, 3),
        Tile("pointer", 64, 128, 64, 4, 3),
        Tile("pointer", 64, 64, 64, 4, 4),
        Tile("pointer", 64, 128, 32, 4, 4),
        Tile("pointer", 64, 32, 64, 4, 4),
    ),
    "tma": (
        Tile("tma", 128, 64, 64, 4, 3, 8, 16),
        Tile("tma", 128, 64, 64, 4, 4, 8, 16),
        Tile("tma", 128, 64, 64, 4, 3, 16, 8),
        Tile("tma", 128, 64, 64, 4, 3, 4, 32),
        Tile("tma", 128, 128, 64, 8, 3, 8, 16),
        Tile("tma", 128, 128, 64, 8, 4, 8, 16),
        Tile("tma", 128, 128, 64, 8, 4, 16, 8),
        Tile("tma", 128, 64, 64, 8, 3, 8, 16),
        Tile("tma", 128, 128, 32, 8, 4, 8, 16),
        Tile("tma", 64, 128, 64, 4, 3, 4, 16),
        Tile("tma", 64, 128, 64, 4, 4, 8, 8),
        Tile("tma", 256, 64, 64, 8, 3, 16, 16),
        Tile("tma", 256, 128, 64, 8, 3, 16, 16),
    ),
    "few": (
        Tile("few", 128, 64, 32, 4, 2),
        Tile("few", 128, 64, 32, 8, 2),
        Tile("few", 128, 64, 64, 4, 2),
        Tile("few", 256, 64, 32, 8, 2),
        Tile("few", 64, 64, 32, 4, 2),
    ),
}


def tile_for(need: Need, form: str, architecture: str = "") -> Tile:
    """Return the tuned tile of this shape on this architecture ("sm90"), or the default one."""
    return _tuned(architecture).get(tuning_key(need, form)) or default_tile(need, form)


def tuning_key(need: Need, form: str) -> str:
    """Name what a tuned tile holds for: channels exactly, pixels by powers of four, since many maps share a tile."""
    size = max(need.pixels, 1).bit_length() // 2
    channels = f"{need.in_channels}>{need.out_channels}"
    return f"{need.op} {form} {need.precision} {need.sources}x {channels} k{need.taps} 4^{size}"


def tuned_row(need: Need, form: str, tile: Tile, **origin: Any) -> dict[str, Any]:
    """Return the row that a configuration file keeps of a tuned tile, with what it was measured on."""
    return {"key": tuning_key(need, form), "tile": asdict(tile), **origin}


def tuned_rows(architecture: str) -> list[dict[str, Any]]:
    """Read what was tuned on an architecture ("sm90"): rows of `tuned_row`, none where there is no file.

    Rows whose tile has a field that this version does not know are left out.
    """
    file = resources.files("skipcost.kernels") / "configs" / f"{architecture}.json"
    if not architecture or not file.is_file():
        return []
    known = {each.name for each in fields(Tile)}
    return [row for row in json.loads(file.read_text())["rows"] if set(row["tile"]) <= known]


@cache  # every call of an op asks
def _tuned(architecture: str) -> dict[str, Tile]:
    return {row["key"]: Tile(**row["tile"]) for row in tuned_rows(architecture)}
