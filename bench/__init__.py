"""Cases, their measurement, and what is made of the results: sweeps, predictions, `fit`, `gate`, `ab`.

From Python, everything is under these names; each is imported when it is first used. The rooms have the rest: see
docs/tour.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipcost.unet_models.doors import door

if TYPE_CHECKING:
    from skipcost.bench.api import fit, predict, sweep
    from skipcost.bench.cases.case import Case
    from skipcost.bench.measure.metrics import METRICS
    from skipcost.bench.store.store import open_store
    from skipcost.bench.store.tables import wide_table
    from skipcost.bench.sweeps.plan import load_plan

__all__ = ["METRICS", "Case", "fit", "load_plan", "open_store", "predict", "sweep", "wide_table"]

__getattr__, __dir__ = door(
    __name__,
    {
        "api": ("fit", "predict", "sweep"),
        "cases.case": ("Case",),
        "measure.metrics": ("METRICS",),
        "store.store": ("open_store",),
        "store.tables": ("wide_table",),
        "sweeps.plan": ("load_plan",),
    },
)
