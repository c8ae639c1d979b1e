"""Which implementation runs a call, and why: rules, break-even, measurements, and the command that explains it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.kernels.explain import explain, main
from skipcost.kernels.devices import Device, device_named, device_or_guess, devices
from skipcost.kernels.dispatch import winners
from skipcost.kernels.dispatch.call import OPS, Call
from skipcost.kernels.dispatch.choose import IMPLEMENTATIONS, choose, extra_bytes, predict, why_not
from skipcost.kernels.dispatch.network_calls import network_calls
from skipcost.unet_models import VARIANTS, ModelSpec

CARDS = list(devices().values())
H200, A100, T4 = (device_named(name) for name in ("h200", "a100", "t4"))
B200, RTX_5090 = (device_or_guess(name, sm) for name, sm in (("NVIDIA B200", "sm100"), ("RTX 5090", "sm120")))
PLAIN = Call("conv_bn_relu", 8, ((256, 64, 64),), 256)
FULL = Call("concat_conv_bn_relu", 8, ((64, 512, 512), (64, 512, 512)), 64)
ALL = [call for variant in VARIANTS for _, call in network_calls(ModelSpec(variant), 1, 512, 512, "inference", "bf16")]


@pytest.fixture(autouse=True)
def _no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No machine's own rows, and none that are published, decide a test."""
    monkeypatch.setenv(winners.FOLDER, str(tmp_path))
    monkeypatch.setattr(winners, "published", lambda: iter(()))
    _forget()
    yield
    _forget()


def _forget() -> None:
    winners.table.cache_clear()
    choose.cache_clear()


def _measure(call: Call, seconds: dict[str, float], more: dict[str, Any] | None = None) -> None:
    row = {"call": call.key, "outcome": "ok", "cache": "hot", "device": {"name": H200.name}}
    rows = [{**row, "implementation": name, "seconds": [value] * 3, **(more or {})} for name, value in seconds.items()]
    winners.own_file().parent.mkdir(exist_ok=True)
    winners.own_file().write_text("".join(json.dumps(each) + "\n" for each in rows))
    _forget()


def test_every_op_has_implementations() -> None:
    """Dispatch knows every op that a network asks for, and PyTorch's own is what a kernel is judged against."""
    assert set(IMPLEMENTATIONS) == set(OPS)
    assert all(names[0] in ("cudnn", "reference") for names in IMPLEMENTATIONS.values())


def test_without_a_gpu_the_reference_runs() -> None:
    """And says so."""
    choice = choose(PLAIN, None)

    assert (choice.implementation, choice.origin) == ("reference", "rule")
    assert choice.why == "no GPU: the PyTorch reference runs"


@pytest.mark.parametrize("card", [card for card in CARDS if card is not T4], ids=lambda card: card.name)
def test_a_plain_convolution_is_left_to_cudnn(card: Device) -> None:
    """Folding saves the same passes there, and its product is faster."""
    choice = choose(PLAIN, card)

    assert choice.implementation == "cudnn"
    assert choice.origin == "predicted"
    assert "no pass over memory to save" in choice.why


def test_a_concatenation_at_full_resolution_is_worth_a_slower_product() -> None:
    """The copy of both maps takes longer than what the product loses: 64 channels at 512x512 on an H200."""
    choice = choose(FULL, H200)

    assert choice.implementation == "tma"
    assert choice.why.startswith("saves 1.07e+03 MB of traffic: ")
    assert choice.seconds["tma"] < choice.seconds["cudnn"]


def test_a_deep_concatenation_is_not() -> None:
    """The deeper, the more products per byte: the same node at 64x64 stays with cuDNN, and the break-even says why."""
    deep = Call("concat_conv_bn_relu", 8, ((512, 64, 64), (512, 64, 64)), 512)

    choice = choose(deep, H200)

    assert choice.implementation == "cudnn"
    assert "wins from 9" in choice.why


@pytest.mark.parametrize("call", ALL, ids=lambda call: call.key)
def test_every_call_of_the_family_has_a_reason(call: Call) -> None:
    """One sentence, never a silent choice, and one that can run there."""
    for card in CARDS:
        choice = choose(call, card)

        assert choice.why
        assert not why_not(call, choice.implementation, card)
        assert choice.seconds[choice.implementation] == min(choice.seconds.values()) or "x of" in choice.why


@pytest.mark.parametrize(
    ("call", "name", "card", "reason"),
    [
        (PLAIN, "tma", A100, "sm80 has no copy engine"),
        (PLAIN, "tma", B200, ""),
        (PLAIN, "tma", RTX_5090, ""),
        (PLAIN, "tma", T4, "on sm75 Triton multiplies without tensor cores"),
        (PLAIN, "triton", T4, "without tensor cores"),
        (replace(PLAIN, op="up_conv", kernel=2), "triton", T4, "without tensor cores"),
        (replace(PLAIN, op="up_conv", kernel=2), "triton", A100, ""),
        (replace(PLAIN, op="conv_bn_relu_train", mode="training"), "triton", T4, "without tensor cores"),
        (Call("crop_concat", 1, ((16, 9, 9), (16, 7, 7)), 0), "triton", T4, ""),
        (PLAIN, "triton", device_or_guess("AMD Instinct MI300X", "gfx942"), ""),
        (PLAIN, "tma", device_or_guess("AMD Instinct MI300X", "gfx942"), "gfx942 has no copy engine"),
        (PLAIN, "triton", A100, ""),
        (PLAIN, "cudnn", A100, ""),
        (replace(PLAIN, precision="fp32"), "triton", H200, "without tensor cores"),
        (replace(PLAIN, precision="tf32"), "tma", H200, ""),
        (replace(PLAIN, sources=((24, 64, 64),)), "triton", H200, "16 does not divide"),
        (replace(PLAIN, sources=((3, 64, 64),)), "triton", H200, ""),
        (replace(PLAIN, sources=((3, 64, 64),)), "tma", H200, "16 does not divide"),
        (Call("crop_concat", 1, ((5, 9, 9), (3, 7, 7)), 0), "triton", H200, ""),
        (Call("tap_first", 1, ((5, 9, 9),), 3, precision="fp32", factor=2), "triton", H200, ""),
    ],
)
def test_what_cannot_run_says_why(call: Call, name: str, card: Device, reason: str) -> None:
    """Alignment, generation and precision rule kernels out, in words."""
    assert reason in why_not(call, name, card)
    assert bool(reason) == bool(why_not(call, name, card))


def test_measurements_decide_where_there_are_any() -> None:
    """Even against the prediction, losses included; and the reason holds every number."""
    _measure(PLAIN, {"cudnn": 2e-5, "triton": 1e-5, "tma": 3e-5})

    choice = choose(PLAIN, H200)

    assert (choice.implementation, choice.origin) == ("triton", "measured")
    assert choice.why == "measured 10.0 us (cudnn 20.0 us, tma 30.0 us)"


@pytest.mark.parametrize("more", [{"cache": "cold"}, {"outcome": "wrong", "seconds": []}, {"device": {"name": "L4"}}])
def test_what_is_no_comparison_is_passed_over(more: dict[str, Any]) -> None:
    """Cold caches, failed configurations and other cards do not decide."""
    _measure(PLAIN, {"cudnn": 2e-5, "triton": 1e-5}, more)

    assert choose(PLAIN, H200).origin == "predicted"


def test_one_measurement_alone_decides_nothing() -> None:
    """There is nothing to compare it with."""
    _measure(PLAIN, {"triton": 1e-9})

    assert choose(PLAIN, H200).implementation == "cudnn"


def test_a_machines_own_rows_win() -> None:
    """Over published ones of the same card."""
    published = winners.Timing(PLAIN.key, "triton", H200.name, 1e-9, "published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winners, "published", lambda: iter((published,)))
        _measure(PLAIN, {"cudnn": 2e-5, "triton": 3e-5})
        choice = choose(PLAIN, H200)

    assert choice.implementation == "cudnn"


def test_a_torn_last_line_is_passed_over_and_another_is_not() -> None:
    """A benchmark that was killed leaves its rows readable; a broken file is said to be one."""
    whole = json.dumps({"call": "x"})

    assert list(winners.read_rows(f"{whole}\n{whole[:5]}")) == [{"call": "x"}]
    with pytest.raises(ValueError, match="line 1 of the rows is no JSON"):
        list(winners.read_rows(f"{whole[:5]}\n{whole}\n"))


def test_a_prediction_counts_every_pass_once() -> None:
    """Both maps are copied for cuDNN, eager adds batch norm and ReLU; a kernel of ours moves what it must."""
    maps, out = 2 * 8 * 64 * 512 * 512 * 2, 8 * 64 * 512 * 512 * 2

    assert extra_bytes(FULL, "cudnn") == 2 * maps
    assert extra_bytes(FULL, "reference") == 2 * maps + 4 * out
    assert extra_bytes(PLAIN, "cudnn") == 0
    product = max(2 * PLAIN.macs / (H200.flop_per_s["bf16"] * 0.65), PLAIN.bytes / H200.bandwidth_bytes_per_s)
    assert predict(PLAIN, "cudnn", H200) == product


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_explain_adds_up(variant: str, mode: str) -> None:
    """Every call is there once, and what is chosen is never predicted slower than folding everything into cuDNN."""
    label = f"{variant}/d3/w32/concat"

    facts = explain(label, 2, (256, 256), mode, "bf16", H200)

    assert len(facts["calls"]) == len(network_calls(ModelSpec.parse(label), 2, 256, 256, mode, "bf16"))
    assert sum(row["seconds"] for row in facts["calls"]) == pytest.approx(facts["seconds"]["chosen"])
    assert facts["seconds"]["chosen"] <= facts["seconds"]["cudnn"] <= facts["seconds"]["reference"]


def test_the_command_prints_a_line_per_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Where, what, on what, and why; and what card this is about."""
    assert main(["unet/d1/w64/concat", "--size", "64x96", "--card", "h200"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "unet/d1/w64/concat, inference, batch 1, 64x96, bf16"
    assert lines[1] == "on NVIDIA H200 (data sheet)"
    calls = network_calls(ModelSpec.parse("unet/d1/w64/concat"), 1, 64, 96, "inference", "bf16")
    assert [line.split("  ")[0] for line in lines[4 : 4 + len(calls)]] == [where for where, _ in calls]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs: every fact of the table."""
    assert main(["unet3+/d1/w8/concat", "--json", "--card", "L4"]) == 0

    assert json.loads(capsys.readouterr().out)["card"] == "NVIDIA L4"


def test_a_size_that_is_none_is_refused() -> None:
    """One sentence says how sizes are written."""
    with pytest.raises(BenchError, match="size='5a' is not an image size: write 512, or 480x640"):
        main(["unet/d1/w8/concat", "--size", "5a"])


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_convolutions_of_enlarged_maps_gain_more_the_larger_the_factor(precision: str) -> None:
    """UNet 3+'s edges to 512x512: 320 channels, x2 to x8; of few channels, the tap maps are more than they save."""
    edges = [Call("tap_first", 1, ((320, 512 // f, 512 // f),), 64, precision=precision, factor=f) for f in (2, 4, 8)]

    gains = [predict(each, "reference", H200) / predict(each, "triton", H200) for each in edges]
    few = choose(Call("tap_first", 1, ((4, 256, 256),), 64, precision=precision, factor=2), H200)

    assert 1 < gains[0] < gains[1] < gains[2]
    assert choose(edges[2], H200).why.startswith("multiplies channels on a map of 1/64 of the pixels: ")
    assert few.implementation == "reference"
    assert few.why.endswith("x of reference: tap maps in fp32, written and read")


def test_tap_maps_are_counted_twice_beside_the_compulsory_bytes() -> None:
    """Where sums and products are nothing beside the bytes, these alone are the prediction."""
    call = Call("tap_first", 2, ((4, 64, 64),), 8, factor=2)
    card = replace(H200, flop_per_s={"fp32": 1e30, "bf16": 1e30})

    seconds = predict(call, "triton", card)

    assert seconds * card.bandwidth_bytes_per_s == pytest.approx(call.bytes + 2 * 2 * 64 * 64 * 9 * 8 * 4)
