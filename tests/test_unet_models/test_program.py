"""The network as a list of steps: its order, who reads what for the last time, and what folds over it say."""

from __future__ import annotations

import itertools

import pytest
from model_cells import by_label, cells

from skipcost.unet_models import ModelSpec, graph, lower, sizes
from skipcost.unet_models.program import Op, Program
from skipcost.unet_models.topology import Conv

SMALL = ModelSpec("unet", 1, 2, norm="none")


def _told(program: Program) -> list[str]:
    return [f"{op.kind} {op.where}/{op.part} {' '.join(map(str, op.reads))}".rstrip() for op in program.ops]


def test_the_order_of_a_small_network() -> None:
    """U-Net of depth 1, written by hand: encoder, bottleneck, up again, joined, decoder, head."""
    assert _told(lower(graph(SMALL))) == [
        "image image/",
        *("conv x0_0/0 0", "relu x0_0/0 1", "conv x0_0/1 2", "relu x0_0/1 3"),
        "pool x0_0->x1_0/resample 4",
        *("conv x1_0/0 5", "relu x1_0/0 6", "conv x1_0/1 7", "relu x1_0/1 8"),
        "up_conv x1_0->x0_1/up 9",
        "join x0_1/merge 4 10",
        *("conv x0_1/0 11", "relu x0_1/0 12", "conv x0_1/1 13", "relu x0_1/1 14"),
        "conv head of x0_1/ 15",
    ]


def test_the_order_within_a_gate() -> None:
    """The map that steers is up-sampled first; both are cropped to each other; the gated map is joined with it."""
    told = _told(lower(graph(SMALL.with_fields(skip="gated"))))

    assert told[10:20] == [
        "up_conv x1_0->x0_1/up 9",
        *("crop x0_0->x0_1/gate 4 10", "crop x0_0->x0_1/gate 10 4"),
        *("conv x0_0->x0_1/gate.x 11", "conv x0_0->x0_1/gate.signal 12"),
        *("add x0_0->x0_1/gate 13 14", "relu x0_0->x0_1/gate 15"),
        *("conv x0_0->x0_1/gate.psi 16", "sigmoid x0_0->x0_1/gate 17", "multiply x0_0->x0_1/gate 11 18"),
    ]
    assert told[20] == "join x0_1/merge 19 10"


@by_label(cells((1, 3)))
def test_every_convolution_of_the_graph_is_in_the_program_once(spec: ModelSpec) -> None:
    """With its record, in whatever order, and no other."""
    network = graph(spec)

    found = [op.conv for op in lower(network).ops if op.kind in sizes.CONVOLUTIONS]

    assert sorted(map(repr, found)) == sorted(map(repr, network.convs()))


@by_label(cells((1, 3)))
def test_a_result_is_dropped_once_after_its_last_reader(spec: ModelSpec) -> None:
    """Never before somebody reads it, and what the network returns never."""
    program = lower(graph(spec))

    drops = program.drops()

    dropped = list(itertools.chain(*drops))
    assert sorted([*dropped, *program.results]) == list(range(len(program.ops)))
    for number, gone in enumerate(drops):
        later = {read for op in program.ops[number + 1 :] for read in op.reads}
        assert not later & set(gone)
        assert set(gone) <= {number, *program.ops[number].reads}


@pytest.mark.parametrize("size", [(16,), (16, 24), (16, 24, 8)], ids=str)
def test_sizes_are_of_any_number_of_dimensions(size: tuple[int, ...]) -> None:
    """A network lowered once has the same sizes along an axis, however many there are beside it."""
    program = lower(graph(ModelSpec("unet++", 3, 2, "gated")))

    together = sizes.shapes(program, size)

    alone = [sizes.shapes(program, (side,)) for side in size]
    assert together == tuple((each[0][0], *(one[1] for one in each)) for each in zip(*alone, strict=True))


def test_pooling_rounds_down_in_the_encoder_and_up_on_skips() -> None:
    """UNet 3+ at 13x14: the bottleneck's way down, and the skip that is halved too."""
    program = lower(graph(ModelSpec("unet3+", 2, 2)))

    made = dict(zip((op.where + op.kind for op in program.ops), sizes.shapes(program, (13, 14)), strict=True))

    assert made["x0_0->x1_0pool"] == (2, 6, 7)
    assert made["x0_0->x1_1pool"] == (2, 7, 7)


def test_multiply_adds_in_three_dimensions() -> None:
    """3x3x3 weights at every voxel, 2x2x2 at every voxel that is up-sampled; by hand for the network of depth 1."""
    program = lower(graph(SMALL))

    counted = sizes.conv_macs(program, (4, 6, 8))

    whole, half = 4 * 6 * 8, 2 * 3 * 4
    fine = 27 * (1 * 2 + 2 * 2 + 4 * 2 + 2 * 2) + 2 * 2
    assert counted == whole * fine + half * (27 * (2 * 4 + 4 * 4) + 8 * 4 * 2)


def test_an_image_that_is_too_small_along_one_axis_is_refused() -> None:
    """The sentence names the place, the smallest side, and the nearest size, in as many dimensions as were given."""
    wording = "an input of 8x1x8 leaves no pixel at x0_0->x1_0: .* at least 2 pixels a side; .* works is 8x2x8$"

    with pytest.raises(ValueError, match=wording):
        sizes.shapes(lower(graph(SMALL)), (8, 1, 8))


@pytest.mark.parametrize(
    ("factor", "how", "field"), [(2, "nearest", 3), (3, "nearest", 3), (2, "bilinear", 4), (3, "bilinear", 3)]
)
def test_what_an_output_sees_through_up_sampling(factor: int, how: str, field: int) -> None:
    """A 5x5 convolution on an enlarged map, by hand: at x3, bilinear, one output in three is a pixel of the map."""
    ops = (
        Op("image", "image", "", ()),
        Op("up_sample", "up", "", (0,), factor=factor, how=how),
        Op("conv", "conv", "", (1,), (), Conv(1, 1, 5), padding=2),
    )

    assert sizes.receptive_field(Program(ops, (2,), 1)) == field


def test_an_output_sees_as_far_as_its_farthest_way_back() -> None:
    """A map and what a 3x3 convolution makes of it, added."""
    ops = (
        Op("image", "image", "", ()),
        Op("conv", "conv", "", (0,), (), Conv(1, 1, 3), padding=1),
        Op("add", "sum", "", (1, 0)),
    )

    assert sizes.receptive_field(Program(ops, (2,), 1)) == 3
