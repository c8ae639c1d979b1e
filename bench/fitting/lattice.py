"""The networks that `skipcost fit` chooses from: lines of networks that differ in width alone, each network once.

Along a line every count of channels grows with the width and the wiring stays, so parameters, MACs and memory grow
too, and the search may bisect. A `max_width` breaks this: where a level's cap is reached, a projection may vanish
(skip=sum), so such a line is `uneven` and searched width by width; so is one of `backend=rewritten`, which rewrites
more of a wide network. Arithmetic on graphs alone; what fits is decided in
`fit_search`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from skipcost.bench.cases.case import CHOICES as CASE_CHOICES
from skipcost.bench.cases.case import SPEC_KEYS, Case
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.worker import refusal_of
from skipcost.bench.memory import liveness, on_gpu
from skipcost.bench.sweeps.plan import make_case
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipGraph
from skipcost.unet_models.spec import CHOICES as SPEC_CHOICES
from skipcost.unet_models.spec import MAX_CHANNELS, MAX_DEPTH, coerce, suggest

WIDTH_STEP = 8  # channels; tensor cores want multiples of 8 in 16 bits (NVIDIA, deep learning performance guide)
SEARCHED_DEPTH = 7  # deeper ones have to be asked for: each level doubles the smallest image that works
MOST_LINES = 3000  # some ten milliseconds each, and a question like any other
AXES: dict[str, tuple[Any, ...]] = {  # what is searched where nothing else is said; later values rank after earlier
    "variant": tuple(VARIANTS),
    "skip": tuple(SKIPS),
    "depth": tuple(range(1, SEARCHED_DEPTH + 1)),
    "width": tuple(range(WIDTH_STEP, 1024 + 1, WIDTH_STEP)),
}
NUMBERS = dict.fromkeys(("width", "in_channels", "classes", "max_width"), MAX_CHANNELS)  # and the most of each
NUMBERS |= dict.fromkeys(("depth", "pruned_to"), MAX_DEPTH)
SET_KEYS = (*SPEC_KEYS, "layout", "outputs", "loss", "backend")
LEAST_BATCHES = (1, 2)  # some norms cannot normalise a 1x1 map of a single image, and can from two images on


@dataclass(frozen=True, slots=True)
class Line:
    """Networks that differ in width alone. `first` is the narrowest, at the least batch that it can run with.

    `cap` is the max_width asked for; the first network's own is None where it caps nothing there. `aliases` are specs,
    at the first width, whose networks are these same ones at every width.
    """

    first: Case
    widths: tuple[int, ...]
    cap: int | None = None
    aliases: tuple[ModelSpec, ...] = ()

    def at(self, width: int) -> Case:
        """The case of the network with `width` channels at level 0."""
        return self.first.with_spec(self.first.suite_spec.with_fields(width=width, max_width=self.cap))

    def labels(self, width: int) -> tuple[str, ...]:
        """The other labels of the network at `width`."""
        return tuple(spec.with_fields(width=width, max_width=self.cap).label for spec in self.aliases)

    @property
    def uneven(self) -> bool:
        """Whether costs may fall with the width somewhere; what is rewritten depends on it, too."""
        return self.cap is not None or self.first.backend != "eager"


@dataclass(frozen=True, slots=True)
class Lattice:
    """All lines, in the order of the axes, and the combinations left out, with the reason for each."""

    lines: tuple[Line, ...]
    left_out: dict[str, str]

    @property
    def networks(self) -> int:
        """How many networks there are to choose from."""
        return sum(len(line.widths) for line in self.lines)


def read_axes(settings: dict[str, list[str]]) -> dict[str, tuple[Any, ...]]:
    """Lay `--set key=v1,v2` over the axes; `8..64` and `8..64..4` are ranges, both ends included. BenchError if bad."""
    axes: dict[str, tuple[Any, ...]] = dict(AXES)
    for key, texts in settings.items():
        if key not in SET_KEYS:
            raise BenchError(suggest("key of --set", key, SET_KEYS) + "; the case has options of its own")
        values = tuple(itertools.chain.from_iterable(_values(key, text) for text in texts))
        accepted = (SPEC_CHOICES | CASE_CHOICES).get(key, ())
        for value in values if accepted else ():
            if value not in accepted:
                raise BenchError(suggest(key, value, accepted))
        axes[key] = tuple(dict.fromkeys(values))
    lines = math.prod(len(values) for key, values in axes.items() if key != "width")
    if lines > MOST_LINES:
        message = f"--set asks for {lines:,} combinations beside the widths, {MOST_LINES:,} at most: name fewer values"
        raise BenchError(message)
    return axes | {"width": tuple(sorted(axes["width"]))}


def _values(key: str, text: str) -> Iterable[Any]:
    """The values of one text: a number or a range of them within what the key accepts, or a word."""
    if key not in NUMBERS or (text.lower() == "none" and key in ("max_width", "pruned_to")):
        return [text]
    span = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9})(?:\.\.([1-9][0-9]{0,8}))?)?", text)
    if span and int(span[1]) > int(span[2] or span[1]):
        message = f"--set {key}={text} is empty: a range goes from the lower to the higher end"
        raise BenchError(message)
    if not span or int(span[1]) < 1 or int(span[2] or span[1]) > NUMBERS[key]:
        message = (
            f"--set {key}={text} is not all whole numbers from 1 to {NUMBERS[key]}: write 4, or 1,2, or a range such "
            "as 1..3, or 8..256..8 by a step"
        )
        raise BenchError(message)
    return range(int(span[1]), int(span[2] or span[1]) + 1, int(span[3] or (WIDTH_STEP if key == "width" else 1)))


def lattice(axes: dict[str, tuple[Any, ...]], fixed: dict[str, Any], batch: int | None) -> Lattice:
    """Cross the axes for a case whose other values are `fixed` (flat names); equal networks make one line.

    Without a `batch` the least that a line can run with is taken. BenchError where nothing is left.
    """
    widths = axes["width"]
    others = {key: values for key, values in axes.items() if key != "width"}
    merged: dict[tuple[Any, ...], Line] = {}
    left_out: dict[str, str] = {}
    for values in itertools.product(*others.values()):
        chosen = dict(zip(others, values, strict=True))
        try:
            _merge(merged, _line(fixed | chosen, widths, batch))
        except ValueError as error:
            left_out[", ".join(f"{key}={value}" for key, value in chosen.items())] = str(error)
    if not merged:
        message = f"no network is left to choose from: {next(iter(left_out.values()))}"
        raise BenchError(message)
    return Lattice(tuple(merged.values()), left_out)


def _line(chosen: dict[str, Any], widths: tuple[int, ...], batch: int | None) -> Line:
    """The line of one combination; ValueError where it cannot be, or cannot run at this size."""
    machine = {"device": chosen["device"], "threads": 1}
    case = make_case(chosen | {"width": widths[0], "batch": batch or 1}, machine)
    unknown = (on_gpu.why_not(case) if case.device == "cuda" else "") or liveness.why_no_envelope(case)
    if unknown:
        raise ValueError(unknown)
    cap = coerce({"max_width": chosen.get("max_width")})["max_width"]
    fitting = tuple(width for width in widths if cap is None or width <= cap)
    for least in (batch,) if batch else LEAST_BATCHES:
        case = replace(case, batch=least)
        refusal = refusal_of(case)
        if not refusal:
            return Line(case, fitting, cap)
    raise ValueError(refusal)


def line_through(spec: ModelSpec, axes: dict[str, tuple[Any, ...]], fixed: dict[str, Any], batch: int | None) -> Line:
    """The line of the networks that differ from `spec` in width alone, at the widths of `axes` and its own."""
    own = {key: getattr(spec, key) for key in SPEC_KEYS if key != "width"}
    rest = {key: axes[key][0] for key in axes if key not in SPEC_KEYS}
    return _line(fixed | rest | own, tuple(sorted({*axes["width"], spec.width})), batch)


def _merge(merged: dict[tuple[Any, ...], Line], line: Line) -> None:
    """Add a line, or its label to the line of the same networks. Equal at both ends is equal in between.

    The wiring does not depend on the width, and where two caps differ in effect they do so at the wide end.
    """
    ends: list[SkipGraph] = [line.at(width).graph() for width in (line.widths[0], line.widths[-1])]
    key = (*ends, len(line.widths), replace(line.first, spec=ModelSpec(), outputs="all").to_json())
    known = merged.get(key)
    merged[key] = replace(known, aliases=(*known.aliases, line.first.suite_spec)) if known else line
