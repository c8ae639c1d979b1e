"""The counters that only `nox -s counters` installs: what is said of torchinfo, thop and ptflops.

Not collected by a plain run of the tests: there they would be skipped, which is not passed.
"""

from __future__ import annotations

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.measure.arithmetic import TRANSPOSED
from skipcost.bench.measure.counters import COUNTERS, ask_all
from skipcost.unet_models import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = "unet/d4/w32/concat/in_channels=3"
# MACs of the counters' own totals over exact ones less 1, with 2x2 transposed convolutions and with bilinear
# up-sampling, at 3x128x128: the disagreement that is known of a U-Net of this size.
TRANSPOSING = {"torchinfo": 0.1351, "thop": 0.1387, "ptflops pytorch": 0.0060, "ptflops aten": 0.0017}
BILINEAR = {"torchinfo": 0.0012, "thop": 0.0046, "ptflops pytorch": 0.0054, "ptflops aten": 0.0012}


@pytest.mark.parametrize(("upsample", "expected"), [("transpose", TRANSPOSING), ("bilinear", BILINEAR)])
def test_how_far_each_counter_is_off(upsample: str, expected: dict[str, float]) -> None:
    """For torchinfo and thop a 2x2 transposed convolution has four times its MACs; the rest is norms and biases."""
    case = Case(spec=ModelSpec.parse(UNET).with_fields(upsample=upsample), height=128, width=128)

    places, answers = ask_all(case)

    exact = sum(place.macs for place in places)
    said = {each.counter: each for each in answers}
    assert {each.note for each in answers} == {""}
    assert {name: round(said[name].macs / exact - 1, 4) for name in expected} == expected
    for name in ("torchinfo", "thop"):
        worst = said[name].parts[0]
        if upsample == "transpose":
            assert worst.kind == TRANSPOSED
            assert worst.macs / worst.arithmetic == pytest.approx(4, rel=0.01)
            assert {layer.rpartition(".")[2] for layer, *_ in worst.layers} == {"up"}
        else:
            assert TRANSPOSED not in {part.kind for part in said[name].parts}


def test_every_counter_is_followed_to_the_layer() -> None:
    """No counter parts from arithmetic without a place, and its parts make up all of its difference."""
    places, answers = ask_all(Case(spec=ModelSpec.parse("unet++/d2/w8/concat"), height=32, width=32))
    exact = sum(place.macs for place in places)

    assert [each.counter for each in answers] == list(COUNTERS)
    for each in answers:
        assert "not said where" not in {part.kind for part in each.parts}, each.counter
        off = sum(part.macs - part.arithmetic for part in each.parts)
        assert each.macs is not None, each.note
        assert off == pytest.approx(each.macs - exact, rel=1e-12), each.counter
