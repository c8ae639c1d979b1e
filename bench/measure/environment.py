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
from skipcost.bench.measure import journal
from skipcost.bench.measure.gpu import describe_gpus

PACKAGES = (
    "skipcost", "torch", "triton", "fvcore", "numpy", "nvidia-ml-py",
    *(f"nvidia-{library}{cuda}" for library in ("cudnn", "cublas") for cuda in ("-cu12", "-cu13", "")),
)  # fmt: skip
FLAGS = (  # environment variables that change a number: what is multiplied how, where, in which memory, by whom
    # threads, and where they run and wait
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY",
    "OMP_DYNAMIC", "OMP_SCHEDULE", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "MKL_DYNAMIC",
    # which instructions of the CPU are used, and how exactly it multiplies
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "OPENBLAS_CORETYPE", "TORCH_MKLDNN_MATMUL_MIN_DIM",
    # the memory of the CPU
    "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE",
    # the memory of the GPU; with several of these set, the one with CUDA in its name wins
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "CUDA_MODULE_LOADING",
    # which GPU, and how it multiplies and launches
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT", "CUDNN_CONV_WSCAP_DBG", "CUDA_LAUNCH_BLOCKING",
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_FORCE_PTX_JIT", "MIOPEN_FIND_MODE", "HSA_OVERRIDE_GFX_VERSION",
    # compilers
    "TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHINDUCTOR_FREEZING", "TORCHINDUCTOR_CPP_WRAPPER", "CXX",
    # Python, and what this suite measured itself
    "PYTHONMALLOC", "PYTHONOPTIMIZE", "SKIPCOST_KERNELS",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Return the environment as JSON values; `fingerprint` is the hash of all that can change a number."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": _cpu_capability(),
        "cpus": cpus(),
        "cpu_quota": _cpu_quota(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": describe_gpus(),
        "cuda": _cuda(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "flags": flags(),
        "code": code_hash(),
    }
    return facts | {"fingerprint": fingerprint(facts), "host": platform.node(), **_git()}


def fingerprint(facts: dict[str, Any]) -> str:
    """Hash what can change a number; results of two fingerprints are never compared."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def flags() -> dict[str, str]:
    """Return the variables of FLAGS that are set; an empty one is as good as none to most that read it, not to all."""
    return {name: os.environ[name] for name in FLAGS if name in os.environ}


def _cuda() -> bool:
    """Whether torch sees a CUDA device, asked through the driver so that CUDA itself is not initialised."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch  # noqa: PLC0415 - only the server describes, and it has torch

    return torch.cuda.is_available()


def _cpu_capability() -> str:
    """Name the widest instructions that PyTorch's own kernels use here: two CPUs of one name may differ by them."""
    import torch  # noqa: PLC0415 - as above

    return str(torch.backends.cpu.get_cpu_capability())


def _cpu_quota() -> str:
    """Return what a container may use of its CPUs, "max" or microseconds a period, as Linux states it; else nothing."""
    try:
        return Path("/sys/fs/cgroup/cpu.max").read_text().strip()
    except OSError:
        return ""


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
    """Hash of the suite's code and tables that make numbers, this package's among them."""
    return journal.code_hash(skipcost.bench)


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
        tracked = ask("ls-files", "__init__.py")
        return {
            "commit": ask("rev-parse", "HEAD") if tracked else "unknown",
            "dirty": bool(ask("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": False}
