"""What `fit` chooses from: every combination, each network once, and figures that grow along a line."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.lattice import AXES, MOST_LINES, SEARCHED_DEPTH, Lattice, lattice, line_through, read_axes
from skipcost.bench.fitting.limits import counted
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec
from skipcost.unet_models.spec import CHOICES, MAX_CHANNELS, MAX_DEPTH

FIXED = {"device": "cpu", "mode": "inference", "size": "256", "precision": "fp32"}


def made(settings: dict[str, list[str]], batch: int | None = None, **fixed: str) -> Lattice:
    """The lattice of some settings."""
    return lattice(read_axes(settings), FIXED | fixed, batch)


def test_the_whole_lattice_holds_every_network_once() -> None:
    """Every variant, skip scheme, depth and multiple of 8 is there, under one label and its aliases."""
    whole = made({})

    labels = [label for line in whole.lines for label in (line.first.spec.label, *line.labels(8))]
    assert not whole.left_out
    assert sorted(labels) == sorted(
        ModelSpec(variant=v, skip=s, depth=d, width=8).label
        for v, s, d in itertools.product(VARIANTS, SKIPS, range(1, SEARCHED_DEPTH + 1))
    )
    assert all(line.widths == tuple(range(8, 1025, 8)) for line in whole.lines)


@pytest.mark.parametrize("width", [8, 24, 1024])
def test_aliases_are_the_same_network_at_every_width(width: int) -> None:
    """What is merged has equal graphs all along, not at the ends alone; what is not merged has different ones."""
    lines = made({}).lines

    graphs = [line.at(width).graph() for line in lines]
    assert len(set(graphs)) == len(graphs)
    for line, graph in zip(lines, graphs, strict=True):
        assert all(ModelSpec.parse(label).graph() == graph for label in line.labels(width))


@pytest.mark.parametrize(
    ("norm", "padding"),
    [(norm, CHOICES["padding"][at % len(CHOICES["padding"])]) for at, norm in enumerate(CHOICES["norm"])],
)
def test_parameters_and_macs_never_fall_with_the_width(norm: str, padding: str) -> None:
    """So bisection along a line is sound: checked at every width from 1 to 40 and on to 1024 in steps."""
    widths = ["1..40..1", "64..1024..192"]
    settings = {"width": widths, "norm": [norm], "padding": [padding], "depth": ["1", "3"]}

    for line in made(settings, size="200").lines:
        for figure in counted().values():
            values = [figure(line.at(width)) for width in line.widths]
            assert values == sorted(values)


def test_under_a_cap_a_cost_can_fall_with_the_width_and_the_line_says_so() -> None:
    """At the cap both levels are equally wide, so a sum needs no projection: the wider network has fewer parameters."""
    settings = {"variant": ["unet"], "skip": ["sum"], "depth": ["1"], "upsample": ["bilinear"]}

    (line,) = made(settings | {"width": ["511..512..1"], "max_width": ["512"]}).lines

    below, at_cap = (line.at(width).graph() for width in line.widths)
    assert line.uneven
    assert sum(1 for edge in below.edges if edge.project) == 1
    assert sum(1 for edge in at_cap.edges if edge.project) == 0
    assert not made({"depth": ["1"]}).lines[0].uneven


def test_a_cap_holds_at_every_width_and_ends_the_line() -> None:
    """A cap that caps nothing at the narrow end still caps the wide one; widths above it are not networks."""
    (line,) = made({"variant": ["unet"], "skip": ["concat"], "depth": ["3"], "max_width": ["64"]}).lines

    assert line.widths == tuple(range(8, 65, 8))
    assert [line.at(width).spec.max_width for width in (8, 16)] == [None, 64]


def test_caps_that_differ_at_the_wide_end_alone_are_two_lines() -> None:
    """At the narrow end neither caps anything, so the networks there are one; further on they are not."""
    settings = {"variant": ["unet"], "skip": ["concat"], "depth": ["3"], "width": ["8..32"]}

    lines = made(settings | {"max_width": ["64", "128", "512"]}).lines

    assert [line.cap for line in lines] == [64, 128, 512]
    assert len({line.at(8).graph() for line in lines}) == 1
    assert len({line.at(32).graph() for line in lines}) == 3


@pytest.mark.parametrize(
    ("text", "values"),
    [("16,48", [16, 48]), ("8..32", [8, 16, 24, 32]), ("8..32..12", [8, 20, 32]), ("64,8..16", [8, 16, 64])],
)
def test_widths_are_lists_and_ranges(text: str, values: list[int]) -> None:
    """A range has both ends and goes by 8 unless it says otherwise; widths are put in order."""
    assert read_axes({"width": text.split(",")})["width"] == tuple(values)


def test_other_axes_go_by_one() -> None:
    """A range of depths has every depth."""
    assert read_axes({"depth": ["2..4"]})["depth"] == (2, 3, 4)
    assert read_axes({})["depth"] == AXES["depth"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"widht": ["8"]}, "unknown key of --set 'widht'; did you mean 'width'"),
        ({"batch": ["8"]}, "the case has options of its own"),
        ({"variant": ["unet4"]}, "unknown variant 'unet4'; did you mean 'unet'"),
        ({"width": ["wide"]}, f"--set width=wide is not all whole numbers from 1 to {MAX_CHANNELS}: write 4, or"),
        ({"width": ["8..10000000000"]}, f"not all whole numbers from 1 to {MAX_CHANNELS}"),
        ({"width": ["-8"]}, f"not all whole numbers from 1 to {MAX_CHANNELS}"),
        ({"width": ["\u0664"]}, "not all whole numbers"),
        ({"width": ["none"]}, "not all whole numbers"),
        ({"width": [""]}, "not all whole numbers"),
        ({"depth": ["1..100000000"]}, f"--set depth=1..100000000 is not all whole numbers from 1 to {MAX_DEPTH}"),
        ({"classes": ["0"]}, f"--set classes=0 is not all whole numbers from 1 to {MAX_CHANNELS}"),
        ({"layout": ["1..100000000"]}, "unknown layout '1..100000000'; accepted: contiguous"),
        ({"classes": ["1..60000"]}, f"asks for 7,560,000 combinations beside the widths, {MOST_LINES:,} at most"),
        ({"width": ["64..8"]}, "from the lower to the higher end"),
        ({"depth": ["4", "13"]}, "--set depth=13 is not all whole numbers from 1 to 12"),
        ({"width": ["0"]}, "--set width=0 is not all whole numbers"),
        ({"variant": ["unet3+"], "upsample": ["transpose"]}, "no network is left.*cannot use upsample=transpose"),
    ],
)
def test_a_bad_setting_gets_a_sentence(settings: dict[str, list[str]], sentence: str) -> None:
    """What was received, what is accepted."""
    with pytest.raises(BenchError, match=sentence):
        made(settings)


def test_a_depth_beyond_those_that_are_searched_can_be_asked_for() -> None:
    """The deepest network that there is halves 4,096 pixels to one."""
    (line,) = made({"variant": ["unet"], "skip": ["concat"], "depth": [str(MAX_DEPTH)]}, size="4096").lines

    assert line.first.suite_spec.depth == MAX_DEPTH > SEARCHED_DEPTH


def test_what_cannot_be_is_left_out_with_its_reason() -> None:
    """Combinations of good values that make no network, or none at this size, are told, not hidden."""
    mixed = made({"upsample": ["transpose"], "depth": ["2"]})
    small = made({"norm": ["instance"], "depth": ["4", "5"], "variant": ["unet"]}, size="32")

    assert {"unet++", "unet"} == {line.first.suite_spec.variant for line in mixed.lines}
    assert all("unet3+ cannot use upsample=transpose" in reason for reason in mixed.left_out.values())
    assert {line.first.suite_spec.depth for line in small.lines} == {4}
    assert all("instance norm at x5_0 would normalise over a single value" in why for why in small.left_out.values())


def test_a_line_that_one_image_cannot_train_starts_at_two() -> None:
    """Batch norm cannot normalise a 1x1 map of one image in training: the least batch of such a line is 2."""
    settings = {"variant": ["unet"], "skip": ["concat"], "depth": ["4", "5"]}

    shallow, deep = made(settings, size="32", mode="training").lines

    assert (shallow.first.batch, deep.first.batch) == (1, 2)
    with pytest.raises(BenchError, match=r"no network is left.*single value"):
        made(settings | {"depth": ["5"]}, 1, size="32", mode="training")


def test_the_line_through_a_network_has_its_width_and_all_else_of_it() -> None:
    """A scored network of an odd width lies on a line of its own kind."""
    spec = ModelSpec.parse("unet++/d3/w20/gated/in_channels=3/norm=group/head=deep")

    line = line_through(spec, read_axes({"layout": ["channels_last"]}), FIXED, 2)

    assert line.at(20).suite_spec == spec
    assert (line.first.batch, line.first.layout) == (2, "channels_last")
    assert set(line.widths) == {20, *AXES["width"]}
    assert line.at(64).suite_spec == replace(spec, width=64)
