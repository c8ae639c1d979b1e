"""A case is identified by what changes a number, and by nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipcost.bench.cases.case import CASE_KEYS, CHOICES, SPEC_KEYS, Case
from skipcost.unet_models import ModelSpec

CASES = st.builds(
    Case,
    spec=st.sampled_from([ModelSpec.parse(f"{v}/d2/w8/{s}") for v in ("unet", "unet3+") for s in ("concat", "none")]),
    batch=st.integers(1, 8),
    height=st.integers(16, 64),
    width=st.integers(16, 64),
    threads=st.integers(1, 4),
    cudnn_benchmark=st.booleans(),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
)


@given(CASES)
def test_json_round_trip(case: Case) -> None:
    """What `to_json` writes, `from_json` reads back, with the same id."""
    again = Case.from_json(case.to_json())

    assert again == case
    assert again.case_id == case.case_id


@given(CASES, CASES)
def test_ids_differ_exactly_where_cases_do(one: Case, other: Case) -> None:
    """Two cases have the same id if and only if they are equal."""
    assert (one.case_id == other.case_id) == (one == other)


def test_defaults_are_left_out_of_the_identity() -> None:
    """Canonical JSON names the label and nothing that is at its default, so that new fields orphan no results."""
    assert Case().to_json() == '{"label":"unet/d4/w64/concat"}'


@pytest.mark.parametrize("name", ["optimizer", "loss"])
def test_training_fields_do_not_split_inference(name: str) -> None:
    """An optimizer or a loss changes nothing at inference, so it makes no other case there."""
    odd = CHOICES[name][1]

    assert Case(mode="inference", **{name: odd}) == Case(mode="inference")
    assert Case(mode="training", **{name: odd}) != Case(mode="training")


def test_one_head_has_one_form() -> None:
    """With a single head, `final` and `all` are the same work and the same case."""
    assert Case(outputs="final") == Case(outputs="all")


def test_final_runs_the_deployed_network() -> None:
    """A deep network's final form is the single-head network, as data."""
    deep = ModelSpec.parse("unet++/d3/w8/concat/head=deep")

    final = Case(spec=deep, outputs="final").graph()

    assert final == replace(deep, head="single").graph()


def test_flat_names_do_not_collide() -> None:
    """A spec's `width` is channels, an image's is `image_width`: every flat name means one thing."""
    names = (*SPEC_KEYS, *CASE_KEYS)

    assert len(names) == len(set(names))
    assert set(Case().flat()) == set(names)
    assert len(names) == len(fields(ModelSpec)) + len(fields(Case)) - 1


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choices_name_what_is_accepted(name: str) -> None:
    """A value outside a field's list is refused with the list."""
    with pytest.raises(ValueError, match=f"unknown {name} 'nonsense'.*accepted: {CHOICES[name][0]}"):
        Case(**{name: "nonsense"})


@pytest.mark.parametrize(("name", "shown"), [("batch", "batch"), ("height", "image_height"), ("threads", "threads")])
@pytest.mark.parametrize("value", [0, -1, True, "4", 1.5])
def test_numbers_are_whole_and_positive(name: str, shown: str, value: object) -> None:
    """A number that is none, or out of range, is refused by its flat name."""
    with pytest.raises(ValueError, match=f"{shown}=.* is not a whole number from 1"):
        Case(**{name: value})
