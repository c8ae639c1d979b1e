"""The drawing of live bytes over a step: it adds up, names the peak and its tensors, and needs no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from skipcost.bench import figures
from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.memory.liveness import KINDS, at_peak, peak_bytes, timeline
from skipcost.reports.drawings.timeline import GROUPS, HIGH, LISTED, TOP, memory_context
from skipcost.unet_models import VARIANTS, ModelSpec


def _drawn(case: Case) -> tuple[dict[str, Any], ET.Element]:
    context = memory_context(case, "net")
    assert context is not None
    return context, ET.fromstring(context["svg"])  # noqa: S314 - our own text


def _case(variant: str = "unet", mode: str = "training") -> Case:
    return Case(spec=ModelSpec(variant=variant, depth=2, width=8), batch=2, height=32, width=32, mode=mode)


def test_every_kind_is_drawn_once() -> None:
    """The groups share out KINDS without remainder: a new kind has to find its colour."""
    drawn = [kind for _, kinds in GROUPS.values() for kind in kinds]

    assert sorted(drawn) == sorted(KINDS)


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_peak_is_drawn_named_and_listed(variant: str, mode: str) -> None:
    """The stack reaches the top once at least; the moment, its bytes and its largest tensors are written."""
    case = _case(variant, mode)
    moment, alive = at_peak(timeline(case))

    context, svg = _drawn(case)

    heights = [float(corner.split(",")[1]) for each in svg.iter("polygon") for corner in each.attrib["points"].split()]
    texts = [each.text for each in svg.iter("text")]
    assert min(heights) == TOP
    assert max(heights) == TOP + HIGH
    assert {moment, figures.text(peak_bytes(case)[1], "bytes")} <= set(texts)
    assert [name for name, _, _ in context["alive"]] == [each.name for each in alive[:LISTED]]


def test_other_backends_have_no_drawing() -> None:
    """The arithmetic follows eager only."""
    assert memory_context(replace(_case(), backend="compile"), "net") is None


def test_it_needs_no_torch() -> None:
    """The report never loads torch, timelines included."""
    script = (
        "import sys; from skipcost.bench.cases.case import Case; "
        "from skipcost.reports.drawings.timeline import memory_context; "
        "memory_context(Case(mode='training'), 'net'); print('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
