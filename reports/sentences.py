"""What a sentence of the report is made of: words, and numbers with where they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a sentence, marked as counted, predicted or measured; `span` is its range, where it has one."""

    text: str
    origin: str
    span: str = ""


Part = str | Number


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence; `basis` says which rows it rests on."""

    topic: str
    parts: tuple[Part, ...]
    basis: str

    @property
    def text(self) -> str:
        """The sentence as plain text, the origin behind each number."""
        words = [part if isinstance(part, str) else f"{part.text}{part.span} [{part.origin}]" for part in self.parts]
        return f"{self.topic}: {''.join(words)} ({self.basis})"


def listed(items: list[list[Part]]) -> list[Part]:
    """Join with commas and a final "and"."""
    parts: list[Part] = []
    for at, item in enumerate(items):
        if at:
            parts.append(" and " if at == len(items) - 1 else ", ")
        parts += item
    return parts


def plural(count: int, what: str = "matched cell") -> str:
    """Count things in words."""
    return f"{count} {what}{'s' if count != 1 else ''}"
