"""The HTML report of a store. Reads the store and graphs alone; never imports torch.

From Python: `write_report`. docs/tour.md has the rooms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcost.unet_models.doors import door

if TYPE_CHECKING:
    from skipcost.reports.page import write_report

__all__ = ["write_report"]

__getattr__, __dir__ = door(
    __name__,
    {
        "page": ("write_report",),
    },
)
