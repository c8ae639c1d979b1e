"""One step's live bytes over its moments, as inline SVG: stacked by kind, with the peak marked.

The numbers are `bench.liveness`' arithmetic; what an allocator adds is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from skipcost.bench import figures
from skipcost.bench.cases.case import Case
from skipcost.bench.memory.liveness import Timeline, at_peak, peaks_of, timeline, why_not
from skipcost.reports.drawings.svg import as_image

WIDE, HIGH, LEFT, TOP, BELOW = 620, 150, 70, 18, 20  # pixels of the drawing and of its margins
LISTED = 8  # tensors at the peak that are named
GROUPS = {  # what is stacked, from below: its colour in style.css, and the kinds of storages in it
    "weights, buffers, inputs": ("--faint", ("parameter", "buffer", "input")),
    "optimizer": ("--c6", ("optimizer",)),
    "gradients of weights": ("--c4", ("gradient",)),
    "maps kept for the backward pass": ("--c1", ("saved",)),
    "maps on the way": ("--c3", ("map",)),
    "gradients of maps": ("--c2", ("map gradient",)),
    "temporaries": ("--c5", ("temporary",)),
}
_GROUP_OF = {kind: at for at, (_, kinds) in enumerate(GROUPS.values()) for kind in kinds}


@dataclass(frozen=True, slots=True)
class _Column:
    """The fullest instant of one moment: what runs, and bytes by group."""

    what: str
    bytes: tuple[int, ...]


def _columns(line: Timeline) -> list[_Column]:
    """The moments of the steady step in order, each at its fullest."""
    names = dict(line.moments)
    live = [0] * len(GROUPS)
    found: list[_Column] = []
    for at, event in enumerate(line.events):
        storage = line.storages[abs(event) - 1]
        live[_GROUP_OF[storage.kind]] += storage.bytes if event > 0 else -storage.bytes
        if at < line.steady_from:
            continue
        if at in names or not found:
            found.append(_Column(names.get(at, ""), tuple(live)))
        elif sum(live) > sum(found[-1].bytes):
            found[-1] = _Column(found[-1].what, tuple(live))
    return found


def memory_context(case: Case, name: str) -> dict[str, Any] | None:
    """The drawing of a case's steady step, the peak in words and what is alive then; None for other backends."""
    if why_not(case):
        return None
    line = timeline(case)
    moment, alive = at_peak(line)
    _, peak = peaks_of(line)
    rest = sum(each.bytes for each in alive[LISTED:])
    return {
        "svg": _draw(_columns(line), moment, name),
        "legend": [(words, colour) for words, (colour, _) in GROUPS.items()],
        "summary": f"Predicted live bytes in a step of {case.mode}: {figures.text(peak, 'bytes')} at most, {moment}",
        "alive": [(each.name, each.kind, figures.text(each.bytes, "bytes")) for each in alive[:LISTED]],
        "rest": f"and {len(alive) - LISTED} more, {figures.text(rest, 'bytes')}" if rest else "",
    }


def _draw(columns: list[_Column], moment: str, name: str) -> Markup:
    """Stack the columns as steps; the highest has a line and its bytes."""
    totals = [sum(each.bytes) for each in columns]
    top, step = max(totals), WIDE / len(columns)
    floor = [0] * len(columns)
    pieces = []
    for group, (colour, _) in enumerate(GROUPS.values()):
        roof = [below + each.bytes[group] for below, each in zip(floor, columns, strict=True)]
        if roof != floor:
            outline = _steps(roof, top, step) + _steps(floor, top, step)[::-1]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            pieces.append(f'<polygon points="{points}" style="fill:var({colour});stroke:none"/>')
        floor = roof
    at = LEFT + (totals.index(top) + 0.5) * step
    anchor = "end" if at > LEFT + WIDE / 2 else "start"
    pieces.append(
        f'<path d="M{at:.1f} {TOP - 4}V{TOP + HIGH}" style="stroke:currentColor;stroke-dasharray:2 2;fill:none"/>'
        f'<text x="{at:.1f}" y="{TOP - 7}" text-anchor="{anchor}">{escape(moment)}</text>'
        f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{figures.text(top, "bytes")}</text>'
        f'<text x="{LEFT - 6}" y="{TOP + HIGH}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{TOP + HIGH + 14}">{escape(columns[0].what)}</text>'
        f'<text x="{LEFT + WIDE}" y="{TOP + HIGH + 14}" text-anchor="end">{escape(columns[-1].what)}</text>'
    )
    described = f"{len(columns)} moments from left to right; the highest is {moment}. The table below lists its tensors"
    box = f"0 0 {LEFT + WIDE + 10} {TOP + HIGH + BELOW}"
    inside = Markup("".join(pieces))  # noqa: S704 - every text in it is escaped where it is put in
    return as_image("topology memory", box, (f"{name}-memory", "Live bytes over one step", described), inside)


def _steps(heights: list[int], top: int, step: float) -> list[tuple[float, float]]:
    """The corners of a staircase, from left to right."""
    corners = []
    for at, height in enumerate(heights):
        y = TOP + HIGH * (1 - height / top)
        corners += [(LEFT + at * step, y), (LEFT + (at + 1) * step, y)]
    return corners
