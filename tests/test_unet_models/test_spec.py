"""Specs and labels: what is accepted, what is refused and in which words, and when two specs are the same network."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skipcost.unet_models
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, graph
from skipcost.unet_models.spec import CHOICES, MAX_CHANNELS, MAX_DEPTH, coerce

FREE_FIELDS = [field.name for field in fields(ModelSpec)][4:]  # those that a label writes as key=value


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Any valid spec."""
    variant = draw(st.sampled_from(list(VARIANTS)))
    row = VARIANTS[variant]
    depth, width = draw(st.integers(1, MAX_DEPTH)), draw(st.integers(1, MAX_CHANNELS))
    head = draw(st.sampled_from(row.heads))
    prunable = row.prunable and head == "single"
    return ModelSpec(
        variant,
        depth,
        width,
        draw(st.sampled_from(list(SKIPS))),
        in_channels=draw(st.integers(1, MAX_CHANNELS)),
        classes=1 if head == "guided" else draw(st.integers(1, MAX_CHANNELS)),
        padding=draw(st.sampled_from(CHOICES["padding"])),
        max_width=draw(st.none() | st.integers(width, MAX_CHANNELS)),
        norm=draw(st.sampled_from(CHOICES["norm"])),
        bias=draw(st.booleans()),
        upsample=draw(st.sampled_from((None, *row.upsamples))),
        head=head,
        pruned_to=draw(st.none() | st.integers(1, depth)) if prunable else None,
    )


@given(specs())
def test_a_label_reads_back_as_its_spec(spec: ModelSpec) -> None:
    """Nothing is lost in a label."""
    label = spec.label

    assert ModelSpec.parse(label) == spec


@given(specs())
def test_a_spec_rebuilt_from_its_fields_is_the_same(spec: ModelSpec) -> None:
    """The one form that a spec is put into is final: checking it again changes nothing."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}

    assert ModelSpec(**values) == spec


@given(specs())
def test_the_texts_of_a_specs_values_give_the_spec(spec: ModelSpec) -> None:
    """Command lines and sweeps hold texts; they mean what the values mean."""
    texts = {field.name: str(getattr(spec, field.name)) for field in fields(spec)}

    assert ModelSpec(**coerce(texts)) == spec


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_label_names_the_four_axes(variant: str, skip: str) -> None:
    """A label leaves out every default, the variant's own up-sampling too."""
    spec = ModelSpec(variant, skip=skip)

    assert spec.label == f"{variant}/d4/w64/{skip}"


def test_a_label_names_what_is_not_default_in_the_order_of_the_fields() -> None:
    """The order is the fields', so that equal specs have equal labels."""
    spec = ModelSpec("unet++", 3, 8, "sum", upsample="nearest", bias=False, classes=5, pruned_to=2)

    assert spec.label == "unet++/d3/w8/sum/classes=5/bias=false/upsample=nearest/pruned_to=2"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CHOICES.items() for name in names])
def test_an_unknown_choice_names_the_nearest_and_all(kind: str, name: str) -> None:
    """A slip of the finger is answered with the name that was meant, and the list."""
    slip = f"{name}x"
    wording = f"unknown {kind} {slip!r}; did you mean {name!r}? accepted: {', '.join(CHOICES[kind])}"

    with pytest.raises(ValueError, match=f"^{re.escape(wording)}$"):
        ModelSpec(**{kind: slip})


def test_an_unknown_choice_like_no_other_names_all() -> None:
    """Where nothing is near, nothing is guessed."""
    with pytest.raises(ValueError, match=r"^unknown variant 'vgg16'; accepted: unet, unet\+\+, unet3\+$"):
        ModelSpec("vgg16")


@pytest.mark.parametrize("key", FREE_FIELDS)
def test_an_unknown_key_in_a_label_names_the_nearest(key: str) -> None:
    """Keys are checked as names are."""
    with pytest.raises(ValueError, match=rf"^unknown key '{key}x'; did you mean '{key}'\? accepted: variant, depth"):
        ModelSpec.parse(f"unet/d4/w8/concat/{key}x=1")


@pytest.mark.parametrize(
    "label", ["", "unet", "unet/d4", "unet/d4/w8", "unet/4/8/concat", "unet/d4/w8/norm=none", "unet/w8/d4/concat"]
)
def test_what_is_no_label_is_refused_with_an_example(label: str) -> None:
    """The form is shown."""
    wording = f"{label!r} is not a label: write variant/dDEPTH/wWIDTH/skip, e.g. unet3+/d4/w64/concat"

    with pytest.raises(ValueError, match=f"^{re.escape(wording)}$"):
        ModelSpec.parse(label)


@pytest.mark.parametrize("part", ["norm", "", "depth=3", "skip=sum", "norm=none/norm=none"])
def test_a_label_with_a_repeated_or_valueless_key_is_refused(part: str) -> None:
    """Nothing is read twice, and nothing is passed over."""
    with pytest.raises(ValueError, match="is not a further key=value; accepted keys: variant, depth"):
        ModelSpec.parse(f"unet/d4/w8/concat/{part}")


@pytest.mark.parametrize(
    ("part", "wording"),
    [
        ("classes=two", "classes='two' is not a whole number"),
        ("classes=none", "classes=None is not a whole number from 1 to 65536"),
        ("max_width=1.5", "max_width='1.5' is not a whole number"),
        ("bias=maybe", "bias='maybe' is not true or false"),
        ("bias=1", "bias=1 is neither true nor false"),
    ],
)
def test_a_value_of_another_kind_is_refused(part: str, wording: str) -> None:
    """The key, the text and what it should have been."""
    with pytest.raises(ValueError, match=f"^{re.escape(wording)}$"):
        ModelSpec.parse(f"unet/d4/w8/concat/{part}")


@pytest.mark.parametrize("name", ["depth", "width", "in_channels", "classes"])
@pytest.mark.parametrize("value", [0, -1, MAX_CHANNELS + 1, 2.0, True, "2", None])
def test_a_number_out_of_range_is_refused(name: str, value: object) -> None:
    """Zero, a typing slip, a truth value and a text are no counts."""
    high = MAX_DEPTH if name == "depth" else MAX_CHANNELS
    fields_of_spec: dict[str, Any] = {name: value}

    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r} is not a whole number from 1 to {high}')}$"):
        ModelSpec(**fields_of_spec)


@pytest.mark.parametrize(
    ("variant", "upsample"), [(v, u) for v in VARIANTS for u in CHOICES["upsample"] if u not in VARIANTS[v].upsamples]
)
def test_an_upsampling_that_a_variant_cannot_have_is_refused(variant: str, upsample: str) -> None:
    """A transposed convolution doubles; UNet 3+ needs up to 2**depth."""
    wording = f"{variant} cannot use upsample={upsample}: its edges grow maps by up to 2**depth, a 2x2 transposed"

    with pytest.raises(ValueError, match=f"^{re.escape(wording)}.*accepted: bilinear, align_corners, nearest$"):
        ModelSpec(variant, upsample=upsample)


@pytest.mark.parametrize(
    ("variant", "head"), [(v, h) for v in VARIANTS for h in CHOICES["head"] if h not in VARIANTS[v].heads]
)
def test_a_head_that_a_variant_does_not_have_is_refused(variant: str, head: str) -> None:
    """The heads that it has are named."""
    wording = f"{variant} has no head={head}: accepted for it: {', '.join(VARIANTS[variant].heads)}"

    with pytest.raises(ValueError, match=f"^{re.escape(wording)}$"):
        ModelSpec(variant, head=head, classes=1)


@pytest.mark.parametrize(
    ("values", "wording"),
    [
        ({"variant": "unet3+", "head": "guided"}, "head=guided needs classes=1, not 2: its classifier says organ or"),
        ({"variant": "unet", "pruned_to": 2}, "unet cannot be pruned: only UNet++ holds its shallower networks"),
        ({"variant": "unet3+", "pruned_to": 2}, "unet3+ cannot be pruned: only UNet++ holds its shallower networks"),
        ({"variant": "unet++", "pruned_to": 2, "head": "deep"}, "pruned_to=2 has one output, so it cannot have head="),
        ({"variant": "unet++", "pruned_to": 5}, "pruned_to=5 is not a whole number from 1 to 4"),
        ({"variant": "unet++", "pruned_to": 0}, "pruned_to=0 is not a whole number from 1 to 4"),
        ({"width": 8, "max_width": 7}, "max_width=7 is below width=8: raise it, or narrow the network"),
        ({"max_width": 0}, "max_width=0 is not a whole number from 1 to 65536"),
        ({"bias": 1}, "bias=1 is neither true nor false"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_with_its_reason(values: dict[str, Any], wording: str) -> None:
    """When the spec is made, not when it is used."""
    with pytest.raises(ValueError, match=f"^{re.escape(wording)}"):
        ModelSpec(**values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_upsampling_is_the_papers_own(variant: str) -> None:
    """None is resolved when the spec is made."""
    own = VARIANTS[variant].upsamples[0]

    assert ModelSpec(variant) == ModelSpec(variant, upsample=own) == ModelSpec.parse(f"{variant}/d4/w64/concat")


@pytest.mark.parametrize("max_width", [128, 129, MAX_CHANNELS])
def test_a_cap_that_caps_nothing_is_no_cap(max_width: int) -> None:
    """The widest level of d4/w8 has 128 channels."""
    assert ModelSpec(depth=4, width=8, max_width=max_width) == ModelSpec(depth=4, width=8)


def test_a_cap_just_below_the_widest_level_counts() -> None:
    """One channel less is another network."""
    capped, free = ModelSpec(depth=4, width=8, max_width=127), ModelSpec(depth=4, width=8)

    assert graph(capped) != graph(free)


def test_pruning_to_the_whole_depth_is_no_pruning() -> None:
    """L^depth is the network itself."""
    assert ModelSpec("unet++", pruned_to=4) == ModelSpec("unet++")


@pytest.mark.parametrize("padding", CHOICES["padding"])
def test_thirteen_of_the_eighteen_cells_are_different_networks(padding: str) -> None:
    """Of VARIANTS x SKIPS at depth 4, these coincide and no others."""
    cells = {
        (variant, skip): graph(ModelSpec(variant, skip=skip, padding=padding)) for variant in VARIANTS for skip in SKIPS
    }

    aliases: dict[object, list[str]] = {}
    for (variant, skip), network in cells.items():
        aliases.setdefault(network, []).append(f"{variant}/{skip}")

    assert sorted(names for names in aliases.values() if len(names) > 1) == [
        ["unet/concat", "unet/same", "unet/nearest", "unet++/same"],
        ["unet/none", "unet++/none"],
        ["unet3+/same", "unet3+/nearest"],
    ]
    assert len(aliases) == 13


def test_changing_the_variant_takes_its_own_upsampling() -> None:
    """A default does not stick."""
    changed = ModelSpec("unet").with_fields(variant="unet3+")

    assert changed == ModelSpec("unet3+")


def test_changing_the_variant_keeps_an_upsampling_that_was_chosen() -> None:
    """What is not the old variant's default was meant."""
    changed = ModelSpec("unet", upsample="nearest").with_fields(variant="unet3+", depth="3")

    assert changed == ModelSpec("unet3+", 3, upsample="nearest")


def test_a_spec_cannot_be_changed() -> None:
    """Specs are values: keys of tables and rows of results."""
    spec = ModelSpec()

    with pytest.raises(AttributeError):
        spec.depth = 3  # type: ignore[misc]
    assert hash(spec) == hash(replace(spec))


def test_specs_and_graphs_need_no_torch() -> None:
    """Planning and reports import them where torch is missing or slow to load."""
    program = (
        "import sys\n"
        "from skipcost.unet_models import ModelSpec, graph\n"
        "network = graph(ModelSpec.parse('unet3+/d4/w8/gated'))\n"
        "network.conv_macs(64, 64), network.receptive_field()\n"
        "print('torch' in sys.modules)"
    )

    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert answer.stdout.strip() == "False"


def test_every_public_name_can_be_imported() -> None:
    """Also those that are looked up late, because they need torch."""
    missing = [name for name in skipcost.unet_models.__all__ if not hasattr(skipcost.unet_models, name)]

    assert missing == []


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    """The late look-up refuses what it does not know."""
    with pytest.raises(AttributeError, match=r"module 'skipcost.unet_models' has no attribute 'buidl'"):
        _ = skipcost.unet_models.buidl
