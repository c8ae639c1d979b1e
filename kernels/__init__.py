"""The fused kernels, each beside the op it replaces, and `BACKENDS`, the table of ways to run a network.

Importing this package needs neither torch nor triton nor a GPU. An op is imported from its own module, as in
`from skipcost.kernels.ops.crop_concat import crop_concat`: as an attribute of the package that name is the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcost.kernels.backends import BACKENDS, Backend
    from skipcost.kernels.rewriting.fusion import Change, fuse
    from skipcost.kernels.rewriting.rewrite import rewrite
    from skipcost.kernels.verify.table import KERNELS, Kernel

__all__ = ["BACKENDS", "KERNELS", "Backend", "Change", "Kernel", "fuse", "rewrite"]

_NEED_TORCH = {
    "BACKENDS": "backends",
    "Backend": "backends",
    "Change": "rewriting.fusion",
    "KERNELS": "verify.table",
    "Kernel": "verify.table",
    "fuse": "rewriting.fusion",
    "rewrite": "rewriting.rewrite",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name not in _NEED_TORCH:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    import importlib  # noqa: PLC0415 - only on the lazy path

    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)


def __dir__() -> list[str]:
    """Name what there is."""
    return sorted(__all__)
