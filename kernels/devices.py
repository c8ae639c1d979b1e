"""What a device can do at best: the one table of GPUs, `devices.toml`, looked up by name. No torch, nothing measured.

A CPU has no row, since two of one name differ by their memory: `probe` measures the one that a case runs on and makes
the same record. What a GPU reaches in practice is not here either; `calibration` fits that to measured rows.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from skipcost.unet_models.spec import suggest

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
VALUE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "amp-bf16": 2, "amp-fp16": 2}  # of a map, by precision
FIGURES = ("memory_bytes", "bandwidth_bytes_per_s", "flop_per_s")  # each has a source
COPY_ENGINE = 90  # the first compute capability, times ten, whose descriptors (TMA) are more than a notation
TENSOR_PRODUCTS = 80  # the first for whose tensor cores Triton (3.6 to 3.9) writes instructions; before, multiply-adds


@dataclass(frozen=True, slots=True)
class Device:
    """A device's limits. ValueError for a figure that is not above 0, has no source, or an unknown precision.

    `architecture` is a compute capability ("sm90"), an AMD target ("gfx942") or "cpu". `flop_per_s` has, per precision
    of the operands, the dense rate of products; a precision that the device has no units for is absent. `sources` says
    for each figure where it comes from; `guess`, where the figures are another device's, that they are.
    """

    name: str
    architecture: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flop_per_s: dict[str, float]
    sources: dict[str, str]
    driver_names: tuple[str, ...] = ()
    guess: str = ""

    def __hash__(self) -> int:
        """Equal devices have equal names; dictionaries of figures have no hash."""
        return hash((self.name, self.architecture))

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

    @property
    def names(self) -> tuple[str, ...]:
        """What rows that were measured on the device may call it."""
        return (self.name, *self.driver_names)

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
    content: dict[str, Any] = tomllib.loads((files("skipcost.kernels") / "devices.toml").read_text())
    return MappingProxyType({key: _device(**row) for key, row in content.items()})


def _device(driver_names: list[str], **row: Any) -> Device:
    return Device(driver_names=tuple(driver_names), **row)


def devices() -> dict[str, Device]:
    """Every GPU of the table by its short name, in the table's order."""
    return dict(_table())


def device_named(text: str) -> Device:
    """Find a GPU by its short name, by what its driver calls it, or by whole words of its name that no other has.

    Case does not matter. An L40 is no L4, an H20 no H200: a word counts only as a whole, and a driver's name has all of
    its words. ValueError with the accepted names.
    """
    wanted = text.strip().casefold()
    table = devices()
    if wanted in table:
        return table[wanted]
    by_driver = [each for each in table.values() if wanted in (name.casefold() for name in each.driver_names)]
    by_words = [each for each in table.values() if wanted and {*wanted.split()} <= {*each.name.casefold().split()}]
    found = by_driver or by_words
    if len(found) == 1:
        return found[0]
    if found:
        message = f"{text!r} is part of several names: {', '.join(each.name for each in found)}; write one of them"
        raise ValueError(message)
    raise ValueError(suggest("GPU", text, table))


def device_or_guess(name: str, architecture: str = "") -> Device:
    """Find a GPU; one that is not in the table gets the figures of the nearest one that is, and `guess` says so.

    Nearest: the first of the same compute capability, else of the newest below it, else of the oldest; without a
    capability the first of all. For choices that a wrong figure makes slower and never wrong.
    """
    try:
        return device_named(name)
    except ValueError:
        near = _nearest(capability(architecture))
    guess = f"not known: taken as {near.name}, which is a guess"
    return replace(
        near, name=name, architecture=architecture or near.architecture, driver_names=(), guess=guess,
        sources=dict.fromkeys(FIGURES, guess),
    )  # fmt: skip


def _nearest(wanted: int) -> Device:
    table = list(devices().values())
    if not wanted:
        return table[0]
    known = {capability(each.architecture) for each in table}
    taken = max((each for each in known if each <= wanted), default=min(known))
    return next(each for each in table if capability(each.architecture) == taken)


def capability(architecture: str) -> int:
    """The compute capability times ten, as a number: 120 of "sm120", which is more than 90; 0 where there is none."""
    digits = architecture.removeprefix("sm").removeprefix("_")
    return int(digits) if architecture.startswith("sm") and digits.isdecimal() else 0


def has_copy_engine(architecture: str) -> bool:
    """Whether the GPU fetches blocks by descriptor."""
    return capability(architecture) >= COPY_ENGINE


def has_tensor_products(architecture: str) -> bool:
    """Whether Triton's products run on the GPU's tensor cores, or on what AMD has of the kind."""
    return not 0 < capability(architecture) < TENSOR_PRODUCTS
