"""Cases, their measurement, and what is made of the results: sweeps, predictions, `fit`, `gate`, `ab`.

From Python, everything is under these names; each is imported when it is first used. The rooms have the rest: see
docs/tour.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcost.bench.api import fit, predict, sweep
    from skipcost.bench.cases.case import Case
    from skipcost.bench.measure.metrics import METRICS
    from skipcost.bench.store.store import open_store
    from skipcost.bench.store.tables import wide_table
    from skipcost.bench.sweeps.plan import load_plan

__all__ = ["METRICS", "Case", "fit", "load_plan", "open_store", "predict", "sweep", "wide_table"]

_WHERE = {
    "METRICS": "measure.metrics",
    "Case": "cases.case",
    "fit": "api",
    "load_plan": "sweeps.plan",
    "open_store": "store.store",
    "predict": "api",
    "sweep": "api",
    "wide_table": "store.tables",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name not in _WHERE:
        message = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """Name what there is."""
    return sorted(__all__)
