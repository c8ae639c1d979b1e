"""The fused kernels, each beside the op it replaces, and `BACKENDS`, the table of ways to run a network.

Importing this package needs neither torch nor triton nor a GPU. An op is imported from its own module, as in
`from skipcost.kernels.ops.crop_concat import crop_concat`: as an attribute of the package that name is the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcost.unet_models.doors import door

if TYPE_CHECKING:
    from skipcost.kernels.backends import BACKENDS, Backend
    from skipcost.kernels.rewriting.change import Change
    from skipcost.kernels.rewriting.rewrite import fuse, rewrite
    from skipcost.kernels.verify.table import KERNELS, Kernel

__all__ = ["BACKENDS", "KERNELS", "Backend", "Change", "Kernel", "fuse", "rewrite"]

__getattr__, __dir__ = door(
    __name__,
    {
        "backends": ("BACKENDS", "Backend"),
        "rewriting.change": ("Change",),
        "rewriting.rewrite": ("fuse", "rewrite"),
        "verify.table": ("KERNELS", "Kernel"),
    },
)
