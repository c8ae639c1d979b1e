"""Networks of the U-Net family as data, and the one module that executes them.

Each name is imported when it is first used; of what they need, `build`, `SkipNet`, `Ops` and `REFERENCE` load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcost.unet_models.doors import door

if TYPE_CHECKING:
    from skipcost.unet_models.network import SkipNet, build
    from skipcost.unet_models.ops import REFERENCE, Ops
    from skipcost.unet_models.program import Op, Program, lower
    from skipcost.unet_models.skips import SKIPS
    from skipcost.unet_models.spec import ModelSpec, graph
    from skipcost.unet_models.topology import Conv, Edge, Head, Node, SkipGraph
    from skipcost.unet_models.variants import VARIANTS

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

__getattr__, __dir__ = door(
    __name__,
    {
        "network": ("SkipNet", "build"),
        "ops": ("REFERENCE", "Ops"),
        "program": ("Op", "Program", "lower"),
        "skips": ("SKIPS",),
        "spec": ("ModelSpec", "graph"),
        "topology": ("Conv", "Edge", "Head", "Node", "SkipGraph"),
        "variants": ("VARIANTS",),
    },
)
