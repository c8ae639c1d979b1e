"""A result: one metric of one case, with its raw samples and how it went. Plain values, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

OUTCOMES = ("ok", "out_of_memory", "timeout", "crash", "unsupported", "throttled")

FAILED = OUTCOMES[1:]


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the store. `samples` are raw, in the metric's base unit; empty unless the outcome is ok or throttled.

    `note` is one sentence for people: why there is no number, or what makes it doubtful. `detail` is what the metric
    wants to keep beside it (operators not counted, warm-up calls), as JSON values.
    """

    metric: str
    outcome: str = "ok"
    samples: tuple[float, ...] = ()
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an outcome outside the list: a misspelt failure would read as an absent one."""
        if self.outcome not in OUTCOMES:
            message = f"outcome {self.outcome!r} is unknown; accepted: {', '.join(OUTCOMES)}"
            raise ValueError(message)

    def to_json(self) -> str:
        """One line of the worker's output."""
        return json.dumps(
            {
                "metric": self.metric,
                "outcome": self.outcome,
                "samples": self.samples,
                "note": self.note,
                "detail": self.detail,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read a line of the worker's output."""
        values = json.loads(text)
        return cls(**{**values, "samples": tuple(values["samples"])})
