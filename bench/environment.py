"""What machine, what software, what code: everything that could change a number and is not part of a case."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import skipcost.bench
import skipcost.kernels
import skipcost.unet_models
from skipcost.bench.gpu import describe_gpus

PACKAGES = ("skipcost", "torch", "triton", "fvcore", "numpy", "nvidia-ml-py")
FLAGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET")


def describe() -> dict[str, Any]:
    """Return the environment as JSON values; `fingerprint` is the hash of all that can change a number."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": describe_gpus(),
        "cuda": _cuda(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "code": code_hash(),
    }
    facts["fingerprint"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return facts | {"host": platform.node(), **_git()}


def _cuda() -> bool:
    """Whether torch sees a CUDA device, asked through the driver so that CUDA itself is not initialised."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch  # noqa: PLC0415 - only the server describes, and it has torch

    return torch.cuda.is_available()


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def code_hash() -> str:
    """Hash of the suite's own code that makes numbers: a change of it is another environment, committed or not."""
    digest = hashlib.sha256()
    for package in (skipcost.unet_models, skipcost.kernels, skipcost.bench):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _git() -> dict[str, Any]:
    """The suite's commit and whether its tree was changed; "unknown" for an installed copy."""
    folder = Path(skipcost.bench.__path__[0])

    def ask(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", folder, *words],  # noqa: S607
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
        return done.stdout.strip()

    try:
        tracked = ask("ls-files", "cases.py")
        return {
            "commit": ask("rev-parse", "HEAD") if tracked else "unknown",
            "dirty": bool(ask("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": False}
