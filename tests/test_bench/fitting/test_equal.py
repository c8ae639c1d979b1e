"""`fit --equal`: the width at which each variant and skip scheme costs the same, and what is left over."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from skipcost.bench.cases.case import Case
from skipcost.bench.fitting.equal import equal_facts, given_case, match
from skipcost.bench.fitting.lattice import Line
from skipcost.bench.fitting.limits import LIMITS
from skipcost.bench.fitting.question import live_source
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

FIXED: dict[str, Any] = {
    "device": "cpu",
    "mode": "training",
    "size": "48",
    "precision": "fp32",
    "batch": 2,
    "threads": 1,
}
FIGURES = ("params", "macs", "memory")


def facts_of(name: str, label: str, **settings: list[str]) -> dict[str, Any]:
    """The answer for one network."""
    return equal_facts(name, given_case(label, FIXED), FIXED, settings, live_source())


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("label", ["unet/d2/w16/concat", "unet3+/d3/w9/gated/norm=group", "unet++/d2/w12/sum"])
def test_no_other_width_is_nearer_in_cost(name: str, label: str) -> None:
    """Of every variant and skip scheme the width shown beats its two neighbours, at the given depth and norm."""
    given = given_case(label, FIXED)
    measure, wanted = live_source().measures[name], live_source().measures[name](given)

    rows = facts_of(name, label)["rows"]

    for row in rows:
        spec = ModelSpec.parse(row["label"])
        off = {
            width: measure(given.with_spec(replace(spec, width=width))) / wanted - 1
            for width in (spec.width - 1, spec.width, spec.width + 1)
            if width
        }
        assert (spec.depth, spec.norm) == (given.suite_spec.depth, given.suite_spec.norm)
        assert row["off"] == pytest.approx(off[spec.width])
        assert abs(off[spec.width]) == min(map(abs, off.values()))


@pytest.mark.parametrize("name", FIGURES)
def test_every_variant_and_skip_scheme_is_there_once(name: str) -> None:
    """As a row, or as another label of a row's network."""
    rows = facts_of(name, "unet/d2/w16/concat")["rows"]

    specs = [ModelSpec.parse(label) for row in rows for label in (row["label"], *row["aliases"])]
    assert sorted((spec.variant, spec.skip) for spec in specs) == sorted((v, s) for v in VARIANTS for s in SKIPS)
    assert len({ModelSpec.parse(row["label"]).graph() for row in rows}) == len(rows)


@pytest.mark.parametrize("name", FIGURES)
def test_a_network_equals_itself(name: str) -> None:
    """The given network's own variant and skip scheme has its width, and nothing is left over."""
    (row,) = facts_of(name, "unet++/d3/w11/nearest", variant=["unet++"], skip=["nearest"])["rows"]

    assert (row["label"], row["off"]) == ("unet++/d3/w11/nearest", 0.0)


def test_what_is_left_over_is_at_most_half_a_step() -> None:
    """Between two widths the nearer is taken, so the residual is no more than half of what one channel costs."""
    rows = facts_of("params", "unet/d3/w64/concat")["rows"]

    assert max(abs(row["off"]) for row in rows) < 0.02


def test_the_smallest_network_is_the_nearest_to_one_below_it() -> None:
    """Where even one channel costs more than what is wanted, that is what is shown, with what it is over."""
    line = Line(Case(ModelSpec(depth=2, width=1), 1, 48, 48), tuple(range(1, 100)))

    found = match(line, live_source().measures["params"], 1.0, live_source())

    assert found.standing.case.suite_spec.width == 1
    assert found.off == line.first.graph().params() - 1


def test_under_a_cap_every_width_is_tried() -> None:
    """Costs may fall there, so that the nearest width need not be at the border of a bisection."""
    given = "unet/d1/w255/sum/max_width=256/upsample=bilinear"
    wanted = given_case(given, FIXED).graph().params()

    (row,) = facts_of("params", given, variant=["unet"], skip=["sum"])["rows"]

    assert row["label"] == given
    assert ModelSpec.parse(given).with_fields(width=256).graph().params() != wanted
    assert row["off"] == 0.0


def test_up_sampling_that_is_no_default_is_kept_and_a_default_is_each_variants_own() -> None:
    """UNet 3+ cannot up-sample by transposed convolution: its own default stands in for U-Net's."""
    by_default = facts_of("macs", "unet/d2/w16/concat")["rows"]
    nearest = facts_of("macs", "unet/d2/w16/concat/upsample=nearest")["rows"]

    assert any(row["label"].startswith("unet3+") for row in by_default)
    assert all("upsample=nearest" in row["label"] for row in nearest)


def test_what_a_variant_cannot_have_is_left_out_with_its_reason() -> None:
    """Deep heads exist in two of the variants."""
    facts = facts_of("macs", "unet3+/d2/w8/concat/head=deep")

    assert {ModelSpec.parse(row["label"]).variant for row in facts["rows"]} == {"unet++", "unet3+"}
    assert all("unet has no head=deep" in reason for reason in facts["left_out"].values())
    assert facts["equal"] == LIMITS["macs"].key


def test_a_figure_unknown_at_both_ends_is_matched_in_between_or_left_out() -> None:
    """A calibrated latency is known in a range of MACs only; what cannot be matched within it is told."""
    given = given_case("unet/d2/w16/concat", FIXED)
    macs = live_source().measures["macs"]

    def latency(case: Case) -> float:
        known = 0.9 < macs(case) / macs(given) < 1.2 and case.suite_spec.variant != "unet3+"
        return macs(case) * 1e-9 if known else math.inf

    source = replace(
        live_source(),
        measures={**live_source().measures, "latency": latency},
        origins={**live_source().origins, "latency": "here"},
        remark=lambda case: "" if math.isfinite(latency(case)) else "says nothing of that",
    )

    facts = equal_facts("latency", given, FIXED, {}, source)

    by_macs = {ModelSpec.parse(row["label"]): row["off"] for row in facts_of("macs", "unet/d2/w16/concat")["rows"]}
    rows = {ModelSpec.parse(row["label"]): row["off"] for row in facts["rows"]}
    assert rows == pytest.approx({spec: off for spec, off in by_macs.items() if spec.variant != "unet3+"})
    assert set(facts["left_out"].values()) == {"says nothing of that"}
    assert all(label.startswith("unet3+") for label in facts["left_out"])
    with pytest.raises(ValueError, match="says nothing of that"):
        equal_facts("latency", given_case("unet/d2/w64/concat", FIXED), FIXED, {}, source)
