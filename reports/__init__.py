"""The HTML report of a store. Reads the store and graphs alone; never imports torch.

From Python: `write_report`. docs/tour.md has the rooms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcost.reports.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        raise AttributeError(message)
    from skipcost.reports import page  # noqa: PLC0415 - jinja, pandas and seaborn, when they are needed

    return getattr(page, name)


def __dir__() -> list[str]:
    """Name what there is."""
    return sorted(__all__)
