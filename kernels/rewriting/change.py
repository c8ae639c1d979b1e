"""What became of one place of a user's model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one place of a model.

    where: its layers by name, and its functions by that of the module which calls them, in order. before: what they
    are, "Conv2d -> BatchNorm2d -> ReLU". after: the ops that run now, "" where all stays as it is. why: the reason for
    that, or for what is less than the kernels could do.
    """

    where: tuple[str, ...]
    before: str
    after: str
    why: str

    def __str__(self) -> str:
        """Say it in one line."""
        became = f"runs as {self.after}" if self.after else "stays as it is"
        return f"{', '.join(self.where)}: {self.before} {became}" + (f": {self.why}" if self.why else "")
