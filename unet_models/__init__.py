"""Networks of the U-Net family as data, and the one module that executes them.

`ModelSpec`, `graph`, `VARIANTS` and `SKIPS` need no torch; `build` imports it when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipcost.unet_models.program import Op, Program, lower
from skipcost.unet_models.skips import SKIPS
from skipcost.unet_models.spec import ModelSpec, graph
from skipcost.unet_models.topology import Conv, Edge, Head, Node, SkipGraph
from skipcost.unet_models.variants import VARIANTS

if TYPE_CHECKING:
    from skipcost.unet_models.network import SkipNet, build
    from skipcost.unet_models.ops import REFERENCE, Ops

__all__ = [
    "REFERENCE",
    "SKIPS",
    "VARIANTS",
    "Conv",
    "Edge",
    "Head",
    "ModelSpec",
    "Node",
    "Op",
    "Ops",
    "Program",
    "SkipGraph",
    "SkipNet",
    "build",
    "graph",
    "lower",
]

_NEED_TORCH = {"build": "network", "SkipNet": "network", "Ops": "ops", "REFERENCE": "ops"}


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
