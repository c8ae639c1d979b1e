"""What a device can do at best: the table of GPUs in `devices.toml`, looked up by name. No torch, nothing measured.

A CPU has no row, since two of one name differ by their memory: `probe` measures the one that a case runs on and makes
the same record. What a GPU reaches in practice is not here either; `calibration` fits that to measured rows.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from skipcost.bench.errors import BenchError
from skipcost.unet_models.spec import suggest

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
FIGURES = ("memory_bytes", "bandwidth_bytes_per_s", "flop_per_s")  # each has a source


@dataclass(frozen=True, slots=True)
class Device:
    """A device's limits. ValueError for a figure that is not above 0, has no source, or an unknown precision.

    `architecture` is a compute capability ("sm90") or "cpu". `flop_per_s` has, per precision of the operands, the dense
    rate of products; a precision that the device has no units for is absent. `sources` says for each figure where it
    comes from.
    """

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flop_per_s: dict[str, float]
    sources: dict[str, str]
    driver_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would make every figure that rests on the device wrong."""
        for precision in self.flop_per_s:
            if precision not in PRECISIONS:
                raise ValueError(suggest(f"precision of {self.name}", precision, PRECISIONS))
        rates = {f"flop_per_s of {precision}": rate for precision, rate in self.flop_per_s.items()}
        plain = {"memory_bytes": self.memory_bytes, "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s}
        for figure, value in (plain | rates).items():
            if not value > 0:
                message = f"{self.name}: {figure} is {value!r}, not a number above 0"
                raise ValueError(message)
        for figure in FIGURES:
            if not self.sources.get(figure):
                message = f"{self.name}: {figure} has no source; name the document, or what measured it"
                raise ValueError(message)

    def rate(self, precision: str) -> float:
        """FLOP/s of dense products of a case's precision; mixed precision multiplies its 16-bit operands.

        ValueError where the device has no units for it.
        """
        operands = precision.removeprefix("amp-")
        if operands not in self.flop_per_s:
            message = (
                f"{self.name} ({self.architecture}) has no rate for {operands}; it has {', '.join(self.flop_per_s)}"
            )
            raise ValueError(message)
        return self.flop_per_s[operands]


@lru_cache(maxsize=1)  # a file of the package, read once
def _table() -> MappingProxyType[str, Device]:
    content: dict[str, Any] = tomllib.loads((files("skipcost.bench") / "devices.toml").read_text())
    return MappingProxyType({key: _device(**row) for key, row in content.items()})


def _device(driver_names: list[str], **row: Any) -> Device:
    return Device(driver_names=tuple(driver_names), **row)


def devices() -> dict[str, Device]:
    """Every GPU of the table by its short name, in the table's order."""
    return dict(_table())


def device_named(text: str) -> Device:
    """Find a GPU by its short name, by what its driver calls it, or by a part of its name that no other has.

    Case does not matter. A driver's name must be the whole one: an L40 is no L4. BenchError with the accepted names.
    """
    wanted = text.strip().casefold()
    table = devices()
    if wanted in table:
        return table[wanted]
    by_driver = [each for each in table.values() if wanted in (name.casefold() for name in each.driver_names)]
    by_part = [each for each in table.values() if wanted and wanted in each.name.casefold()]
    found = by_driver or by_part
    if len(found) == 1:
        return found[0]
    if found:
        message = f"{text!r} is part of several names: {', '.join(each.name for each in found)}; write one of them"
        raise BenchError(message)
    raise BenchError(suggest("GPU", text, table))
