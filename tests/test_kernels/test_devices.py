"""The table of devices: complete, with sources, and found by the names that people and drivers use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipcost.bench.cases.case import CHOICES
from skipcost.kernels.devices import (
    FIGURES,
    PRECISIONS,
    capability,
    device_named,
    device_or_guess,
    devices,
    has_copy_engine,
    has_tensor_products,
)

TABLE = devices()
T4 = TABLE["t4"]


@pytest.mark.parametrize("key", TABLE)
def test_every_figure_of_a_device_names_its_source(key: str) -> None:
    """Memory, bandwidth and rates each say which document they are from."""
    device = TABLE[key]

    assert set(device.sources) == set(FIGURES)
    assert all(device.sources.values())


@pytest.mark.parametrize("key", TABLE)
def test_fewer_bits_are_never_slower(key: str) -> None:
    """16-bit rates are equal and the highest; fp32 without tensor cores is the lowest."""
    rates = TABLE[key].flop_per_s

    order = [rates[name] for name in PRECISIONS if name in rates]
    assert order == sorted(order)
    assert rates.get("bf16", rates["fp16"]) == rates["fp16"]


@pytest.mark.parametrize("key", TABLE)
def test_a_device_is_found_by_its_short_name_and_its_driver_names(key: str) -> None:
    """Case and blanks around a name do not matter."""
    device = TABLE[key]

    assert device_named(f" {key.upper()} ") is device
    assert all(device_named(name.lower()) is device for name in (device.name, *device.driver_names))


@pytest.mark.parametrize(("part", "key"), [("4090", "rtx4090"), ("h200", "h200"), ("H100 pcie", "h100-pcie")])
def test_a_part_of_a_name_is_enough_where_no_other_has_it(part: str, key: str) -> None:
    """Nobody has to type a whole name."""
    assert device_named(part) is TABLE[key]


RELATIVES = {  # what a driver calls it, its architecture, and the device of the table that it is nearest to
    "NVIDIA A10": ("sm86", "a100"),
    "NVIDIA A1000": ("sm86", "a100"),
    "NVIDIA RTX A1000": ("sm86", "a100"),
    "NVIDIA A100-SXM4-40GB": ("sm80", "a100"),
    "NVIDIA H20": ("sm90", "h200"),
    "NVIDIA H100 NVL": ("sm90", "h200"),
    "NVIDIA L40": ("sm89", "l4"),
    "NVIDIA L40S": ("sm89", "l4"),
    "NVIDIA GeForce RTX 4090 D": ("sm89", "l4"),
    "NVIDIA GeForce RTX 4090 Laptop GPU": ("sm89", "l4"),
    "NVIDIA GeForce RTX 2080 Ti": ("sm75", "t4"),
    "Tesla V100-SXM2-16GB": ("sm70", "t4"),
    "NVIDIA B200": ("sm100", "h200"),
    "NVIDIA GeForce RTX 5090": ("sm120", "h200"),
    "AMD Instinct MI300X": ("gfx942", "h200"),
    "H2": ("", "h200"),
}


@pytest.mark.parametrize("relative", [*RELATIVES, "NVIDIA", "A10", "L40S", ""])
def test_a_relative_is_not_taken_for_a_device_of_the_table(relative: str) -> None:
    """Another memory or clock is another device: the refusal lists what is known."""
    with pytest.raises(ValueError, match=r"unknown GPU .* accepted: h200, h100, .*rtx4090|'NVIDIA' is part of several"):
        device_named(relative)


def test_a_part_of_several_names_is_refused_with_all_of_them() -> None:
    """Nothing is picked silently."""
    with pytest.raises(ValueError, match="'nvidia h100' is part of several names: NVIDIA H100 SXM, NVIDIA H100 PCIe"):
        device_named("nvidia h100")


@pytest.mark.parametrize("precision", CHOICES["precision"])
def test_mixed_precision_multiplies_16_bit_operands(precision: str) -> None:
    """Every precision of a case has a rate on a recent GPU, amp-bf16 that of bf16."""
    device = TABLE["h100"]

    assert device.rate(precision) == device.flop_per_s[precision.removeprefix("amp-")]


@pytest.mark.parametrize("precision", ["bf16", "tf32", "amp-bf16"])
def test_a_precision_without_units_is_refused(precision: str) -> None:
    """Turing knows fp32 and fp16 alone, and the sentence says so."""
    with pytest.raises(ValueError, match=r"NVIDIA T4 \(sm75\) has no rate for .*; it has fp32, fp16"):
        T4.rate(precision)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"memory_bytes": 0}, "memory_bytes is 0, not a number above 0"),
        ({"bandwidth_bytes_per_s": float("nan")}, "bandwidth_bytes_per_s is nan"),
        ({"flop_per_s": {"fp32": -1.0}}, "flop_per_s of fp32 is -1.0"),
        ({"flop_per_s": {"fp8": 1.0}}, "unknown precision of NVIDIA T4 'fp8'"),
        ({"sources": {}}, "memory_bytes has no source"),
    ],
)
def test_a_device_that_would_spoil_every_figure_is_refused(change: dict[str, object], why: str) -> None:
    """Values are checked when the device is made."""
    with pytest.raises(ValueError, match=why):
        replace(T4, **change)


@pytest.mark.parametrize("relative", RELATIVES)
def test_a_guess_has_the_nearest_ones_figures_its_own_name_and_says_that_it_is_one(relative: str) -> None:
    """By compute capability as a number: a new generation is nearest to the newest that is known, not to the oldest."""
    architecture, key = RELATIVES[relative]

    guessed = device_or_guess(relative, architecture)

    assert (guessed.name, guessed.architecture) == (relative, architecture or TABLE[key].architecture)
    assert guessed.names == (relative,)
    assert (guessed.flop_per_s, guessed.bandwidth_bytes_per_s) == (
        TABLE[key].flop_per_s,
        TABLE[key].bandwidth_bytes_per_s,
    )
    assert guessed.guess == f"not known: taken as {TABLE[key].name}, which is a guess"
    assert set(guessed.sources.values()) == {guessed.guess}


@pytest.mark.parametrize("key", TABLE)
def test_what_the_table_has_is_never_guessed(key: str) -> None:
    """By any of its names, whatever the driver says of its generation."""
    assert all(device_or_guess(name, "sm1") is TABLE[key] for name in (key, *TABLE[key].names))
    assert not TABLE[key].guess


@pytest.mark.parametrize(
    ("architecture", "number", "copies", "multiplies"),
    [
        ("sm70", 70, False, False),
        ("sm75", 75, False, False),
        ("sm80", 80, False, True),
        ("sm89", 89, False, True),
        ("sm90", 90, True, True),
        ("sm100", 100, True, True),
        ("sm120", 120, True, True),
        ("sm_120", 120, True, True),
        ("gfx942", 0, False, True),
        ("cpu", 0, False, True),
        ("", 0, False, True),
    ],
)
def test_generations_are_compared_as_numbers(architecture: str, number: int, copies: bool, multiplies: bool) -> None:  # noqa: FBT001 - parameters of the test
    """As texts, sm100 and sm120 come before sm90."""
    assert capability(architecture) == number
    assert has_copy_engine(architecture) == copies
    assert has_tensor_products(architecture) == multiplies
