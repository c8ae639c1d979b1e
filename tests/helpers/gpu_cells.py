"""Cases of `backend=rewritten` on a GPU, over the project's tables, and what holds of every claim about its memory."""

from __future__ import annotations

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.memory.on_gpu import SCENARIOS, StepPrediction
from skipcost.kernels.devices import devices
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

SEGMENT = 2 << 20  # bytes, of which every segment of the allocator is a multiple
CARD = devices()["h100"]
LABELS = [
    f"{variant}/d2/w8/{skip}/upsample={upsample}"
    for variant in VARIANTS
    for skip in SKIPS
    for upsample in VARIANTS[variant].upsamples
] + [
    "unet/d2/w8/concat/upsample=nearest/norm=none/padding=valid",
    "unet3+/d2/w8/concat/norm=group/padding=valid",
    "unet++/d2/w8/concat/upsample=bilinear/norm=instance",
]
JOINED = "unet/d2/w8/concat/upsample=bilinear"  # the up-sampled map goes into the node's convolution, with the skip
ALONE = "unet3+/d2/w8/concat"  # each edge has a convolution of its own


everything = pytest.mark.usefixtures("all_low")


def case_of(label: str = ALONE, **changes: object) -> Case:
    """A small case for a GPU, in training unless said."""
    usual = {"height": 92, "width": 92, "batch": 2, "mode": "training", "device": "cuda", "backend": "rewritten"}
    return Case(spec=ModelSpec.parse(label), **usual | changes)


def assert_ordered(step: StepPrediction, live: int) -> None:
    """No less is requested than is live, allocated than requested, reserved than allocated, in whole segments."""
    for scenario in SCENARIOS:
        requested, allocated, reserved = (
            getattr(getattr(step, name), scenario) for name in ("requested", "allocated", "reserved")
        )
        assert live <= requested <= allocated <= reserved
        assert reserved % SEGMENT == 0
