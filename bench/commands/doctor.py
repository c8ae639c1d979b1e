"""`skipcost doctor`: what this machine can measure, and what would make its numbers doubtful."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from skipcost.bench import figures
from skipcost.bench.console import Screen, bold
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.probe import known_cpu, probed_cpu, slow_words
from skipcost.kernels.devices import device_named

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def examine(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment, what can be measured in it, the limits of its devices, and the doubts, as JSON values."""
    return {
        "environment": environment,
        "can": _abilities(environment),
        "limits": _limits(environment),
        "doubts": _doubts(environment),
    }


def _limits(environment: dict[str, Any]) -> dict[str, dict[str, Any] | str]:
    """What reference lines go by: the CPU's figures by a probe, each GPU's by the table, or why there are none."""
    limits: dict[str, dict[str, Any] | str] = {}
    looked_up = {gpu["name"]: partial(device_named, gpu["name"]) for gpu in environment["gpus"]}
    for name, look_up in {environment["cpu"]: partial(probed_cpu, environment["cpus"]), **looked_up}.items():
        try:
            device = look_up()
        except (BenchError, ValueError) as error:
            limits[name] = f"unknown: {error}"
        else:
            figures_of = {name: getattr(device, name) for name in ("bandwidth_bytes_per_s", "flop_per_s")}
            limits[name] = figures_of | {"source": device.sources["bandwidth_bytes_per_s"]}
    return limits


def _abilities(environment: dict[str, Any]) -> dict[str, str]:
    """Each ability with "yes", or the reason why not and what to do."""
    gpu = "yes" if environment["cuda"] else "no: torch sees no CUDA device; only the CPU is measured"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    fvcore = importlib.util.find_spec("fvcore")
    triton = importlib.util.find_spec("triton")
    return {
        "latency on the CPU": "yes",
        "latency and memory on a GPU": gpu,
        "predicted memory": "yes",
        "fvcore's count": "yes" if fvcore else "no: pip install skipcost[fvcore]",
        "backend=compile on the CPU": "yes" if compiler else "no: torch.compile needs a C++ compiler; install g++",
        "backend=fused": ("yes" if triton else "no: pip install skipcost[gpu]") if environment["cuda"] else gpu,
        "GPU clocks, power and process memory": "yes" if environment["gpus"] else "no: no NVIDIA driver answers",
    }


def _doubts(environment: dict[str, Any]) -> list[str]:
    doubts = []
    load = os.getloadavg()[0]
    if load > 0.5 * environment["cpus"]:
        doubts.append(
            f"the load is {load:.1f} on {environment['cpus']} CPUs: something else is running; stop it, or expect noise"
        )
    cpu = known_cpu(environment["cpus"])  # probed for its limits
    doubts += filter(None, (slow_words(cpu, operands) for operands in ("bf16", "fp16"))) if cpu else ()
    if GOVERNOR.exists() and GOVERNOR.read_text().strip() != "performance":
        doubts.append(
            f"the CPU's clock follows its load (governor {GOVERNOR.read_text().strip()}); set it to performance"
        )
    if environment["dirty"]:
        doubts.append(
            "the suite's own tree has uncommitted changes: the commit recorded with the results is not their code"
        )
    flags = [f"{name}={value}" for name, value in environment["flags"].items() if name != "CUDA_VISIBLE_DEVICES"]
    if flags:
        doubts.append(f"set in the environment, and recorded: {', '.join(flags)}")
    if not Path("/sys/devices/system/cpu/cpu0/cpufreq").exists():
        doubts.append(
            "the CPU's clock cannot be seen, as in a virtual machine: latencies may drift; compare within one run"
        )
    return doubts


def print_findings(facts: dict[str, Any], console: Screen) -> None:
    """The findings for people."""
    environment = facts["environment"]
    console.print(
        f"{environment['cpu']}, {environment['cpus']} CPUs, {figures.text(environment['memory_bytes'], 'bytes')}"
    )
    for gpu in environment["gpus"]:
        console.print(f"{gpu['name']}, {figures.text(gpu['memory_bytes'], 'bytes')}, driver {gpu['driver']}")
    console.print(", ".join(f"{name} {version}" for name, version in environment["versions"].items()))
    console.print()
    console.print(bold("can be measured here"))
    for name, answer in facts["can"].items():
        console.print(f"  {name}: {answer}")
    console.print()
    console.print(bold("limits that reference lines go by"))
    for name, found in facts["limits"].items():
        console.print(f"  {name}: {found if isinstance(found, str) else _words(found)}")
    console.print()
    console.print(bold("what makes numbers doubtful here"))
    for doubt in facts["doubts"] or ["nothing was found"]:
        console.print(f"  {doubt}")


def _words(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in found["flop_per_s"].items())
    return f"memory {figures.text(found['bandwidth_bytes_per_s'], 'bytes')}/s, {rates} ({found['source']})"
