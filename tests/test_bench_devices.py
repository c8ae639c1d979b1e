"""The table of devices: complete, with sources, and found by the names that people and drivers use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipcost.bench.cases import CHOICES
from skipcost.bench.devices import FIGURES, PRECISIONS, Device, device_named, devices
from skipcost.bench.errors import BenchError
from skipcost.kernels.dispatch import CARDS, Card

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


@pytest.mark.parametrize("relative", ["NVIDIA L40", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 NVL", "RTX 4090 D", ""])
def test_a_relative_is_not_taken_for_a_device_of_the_table(relative: str) -> None:
    """Another memory or clock is another device: the refusal lists what is known."""
    with pytest.raises(BenchError, match=r"unknown GPU .* accepted: h200, h100, .*rtx4090"):
        device_named(relative)


def test_a_part_of_several_names_is_refused_with_all_of_them() -> None:
    """Nothing is picked silently."""
    with pytest.raises(BenchError, match="'h10' is part of several names: NVIDIA H100 SXM, NVIDIA H100 PCIe"):
        device_named("h10")


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


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_dispatch_and_the_table_know_the_same_cards(card: Card) -> None:
    """Kernels cannot import this table: theirs agrees with it to the three figures that it has."""
    device: Device = next(
        each
        for each in TABLE.values()
        if card.name in (each.name, *each.driver_names) or each.name.startswith(card.name)
    )

    assert card.architecture == device.architecture
    assert card.copy_bytes_per_s == pytest.approx(device.bandwidth_bytes_per_s, rel=2e-3)
    assert card.matrix_flop_per_s == pytest.approx(device.flop_per_s["bf16"], rel=2e-3)
    assert card.plain_flop_per_s == pytest.approx(device.flop_per_s["fp32"], rel=2e-3)
