"""The reference line for time: the sum of passes at a device's limits, the probe of a CPU, the times of layers."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.errors import MachineError
from skipcost.bench.measure import here, probe, server
from skipcost.bench.measure import run as timing_layers
from skipcost.bench.measure.here import device_of, reference_line
from skipcost.bench.measure.metrics import METRICS, PREDICTED
from skipcost.bench.measure.timing import Budget
from skipcost.bench.time.passes import passes
from skipcost.bench.time.roofline import bound
from skipcost.kernels.devices import Device, device_named, devices
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case(spec=ModelSpec(depth=2, width=8), height=64, width=64)
H100 = device_named("h100")
CELLS = [f"{variant}/d2/w8/{skip}" for variant in VARIANTS for skip in SKIPS]


def device(bandwidth: float, rate: float) -> Device:
    """A device with these two limits."""
    return replace(H100, bandwidth_bytes_per_s=bandwidth, flop_per_s={"fp32": rate})


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("label", CELLS)
def test_the_line_is_the_sum_of_its_layers(label: str, mode: str) -> None:
    """Each layer is a pass at the slower of its two limits, and says which."""
    case = replace(CASE, spec=ModelSpec.parse(label), mode=mode)

    line = bound(case, H100)

    assert line.seconds == pytest.approx(sum(layer.seconds for layer in line.layers))
    for layer, each in zip(line.layers, passes(case), strict=True):
        compute, traffic = 2 * each.macs / H100.rate("fp32"), each.bytes / H100.bandwidth_bytes_per_s
        assert (layer.name, layer.macs, layer.bytes) == (each.name, each.macs, each.bytes)
        assert layer.seconds == pytest.approx(max(compute, traffic))
        assert layer.limited_by == ("MACs" if compute >= traffic else "bytes")


def test_without_a_limit_on_bytes_the_line_is_the_macs() -> None:
    """Two FLOP a MAC at the device's rate, and the rest costs nothing."""
    line = bound(CASE, device(1e30, 1e12))

    assert line.seconds == pytest.approx(2 * CASE.graph().conv_macs(64, 64) / 1e12)
    assert line.fused_s == pytest.approx(line.seconds)


def test_without_a_limit_on_macs_the_line_is_the_traffic() -> None:
    """Every byte of every pass once; the lower line has those of the convolutions alone."""
    line = bound(CASE, device(1e9, 1e30))

    moved = {each.macs > 0: 0 for each in passes(CASE)}
    for each in passes(CASE):
        moved[each.macs > 0] += each.bytes
    assert line.seconds == pytest.approx(sum(moved.values()) / 1e9)
    assert line.fused_s == pytest.approx(moved[True] / 1e9)


@pytest.mark.parametrize("key", devices())
def test_training_takes_longer_and_fewer_bits_less(key: str) -> None:
    """On every device of the table, in every precision that it has."""
    each = devices()[key]

    fp32, fp16 = (bound(replace(CASE, precision=name), each) for name in ("fp32", "fp16"))
    training = bound(replace(CASE, mode="training"), each)

    assert fp16.seconds < fp32.seconds < training.seconds
    assert fp32.fused_s < fp32.seconds


@pytest.mark.parametrize("backend", CHOICES["backend"])
def test_every_backend_has_the_line_of_the_eager_program(backend: str) -> None:
    """What another backend gains shows as a smaller multiple of one and the same line."""
    assert bound(replace(CASE, backend=backend), H100) == bound(CASE, H100)


def test_the_metric_says_which_limits_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and detail; the device of a case on the CPU is probed for its threads."""
    cpu = replace(device(1e10, 1e11), name="a CPU")
    monkeypatch.setattr(here, "probed_cpu", lambda threads: replace(cpu, name=f"{cpu.name}, {threads} threads"))

    result = METRICS["roofline_s"].measure(replace(CASE, threads=3), Budget())[0]

    line = bound(CASE, cpu)
    assert METRICS["roofline_s"].origin == PREDICTED
    assert result.samples == (line.seconds,)
    assert result.detail["device"] == "a CPU, 3 threads"
    assert result.detail["bandwidth_bytes_per_s"] == 1e10
    assert result.detail["flop_per_s"] == 1e11
    assert result.detail["fused_s"] == line.fused_s
    assert result.detail["sources"] == cpu.sources


@pytest.mark.parametrize(
    ("gpus", "outcome", "note"),
    [
        ([], "unsupported", "no NVIDIA driver answers"),
        ([{"name": "NVIDIA L40"}], "unsupported", "unknown GPU 'NVIDIA L40'.* accepted: h200"),
        ([{"name": "Tesla T4"}], "unsupported", "NVIDIA T4 .* has no rate for bf16"),
        ([{"name": "NVIDIA L4"}], "ok", ""),
    ],
)
def test_a_gpu_is_looked_up_by_its_drivers_name(
    gpus: list[dict[str, Any]], outcome: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown cards and missing units are a row with the reason."""
    monkeypatch.setattr(here, "describe_gpus", lambda: gpus)

    result = reference_line(replace(CASE, device="cuda", precision="bf16"))

    assert result.outcome == outcome
    assert re.search(note, result.note)


def test_a_probe_finds_limits_that_this_cpu_keeps() -> None:
    """Memory and products have a rate in every precision that a CPU has, and tf32 none."""
    found = probe.probed_cpu(1)

    assert found is probe.probed_cpu(1)  # measured once per process
    assert 1e8 < found.bandwidth_bytes_per_s < 1e12
    assert set(found.flop_per_s) == {"fp32", "bf16", "fp16"}
    assert all(1e8 < rate < 1e14 for rate in found.flop_per_s.values())
    assert "measured by a probe on 1 thread" in found.sources["flop_per_s"]
    assert device_of(CASE) is found


def test_a_probe_that_fails_says_how_to_see_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is at fault, not the input; the case's row has the sentence."""

    def broken(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired(str(probe), 1)

    probe.probed_cpu.cache_clear()
    monkeypatch.setattr(subprocess, "run", broken)

    with pytest.raises(MachineError, match=r"the CPU could not be probed .* to see why"):
        probe.probed_cpu(1)
    assert reference_line(CASE).outcome == "unsupported"


@pytest.mark.parametrize(
    ("metrics", "changes", "asked"),
    [
        (["params"], {}, []),
        (["roofline_s"], {}, ["probe 2"]),
        (["latency_s"], {}, ["probe 2"]),
        (["roofline_s"], {"device": "cuda"}, []),
        (["params", "operators"], {}, ["rehearse"]),
        (["latency_s"], {"mode": "training"}, ["rehearse", "probe 2"]),
        (["params"], {"spec": Factory("m:f")}, ["rehearse"]),
    ],
)
def test_the_server_does_ahead_of_the_forks_what_they_need(
    metrics: list[str], changes: dict[str, Any], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks inherit the answer: a sweep probes once, and one without lines, and latencies beside them, never."""
    done: list[str] = []
    monkeypatch.setattr(server, "probed_cpu", lambda threads: done.append(f"probe {threads}"))
    monkeypatch.setattr(server, "rehearse", lambda: done.append("rehearse"))
    case = json.loads(replace(CASE, threads=2, **changes).to_json())

    server.prepare({"case": case, "metrics": metrics})

    assert done == asked


@pytest.mark.parametrize("label", [*CELLS, "unet3+/d2/w8/gated/head=guided/classes=1", "unet/d2/w8/concat/norm=group"])
def test_every_layer_of_a_step_has_a_time(label: str) -> None:
    """The operators that run are the passes of the reference line, one for one; a sample is their sum."""
    case = replace(CASE, spec=ModelSpec.parse(label), outputs="all")

    result = timing_layers.layer_times(case, Budget(seconds=0.01))

    layers = result.detail["layers"]
    assert result.outcome == "ok"
    assert list(layers) == [each.name for each in passes(case)]
    assert all(seconds > 0 for seconds in layers.values())
    assert len(result.samples) >= timing_layers.LEAST


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"precision": "amp-bf16"}, "autocast adds an operator for every cast"),
        ({"mode": "training"}, "a backward pass joins two convolutions in one operator"),
        ({"backend": "compile"}, "backend=compile joins passes"),
        ({"backend": "fused"}, "backend=fused joins passes"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_told_apart_have_no_times(change: dict[str, str], why: str) -> None:
    """Where operators are not the passes one for one, the row says why and what to use."""
    result = timing_layers.layer_times(replace(CASE, **change), Budget(seconds=0.01))

    assert result.outcome == "unsupported"
    assert why in result.note
    assert "layers are timed with" in result.note
