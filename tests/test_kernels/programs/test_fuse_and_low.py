"""What the programs of the backends join, written by hand for small networks."""

from __future__ import annotations

from skipcost.kernels.programs.fuse import fuse
from skipcost.kernels.programs.low import low
from skipcost.unet_models import ModelSpec, Op, Program, graph, lower
from skipcost.unet_models.topology import Conv


def _kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops[1:]]


def _joined(program: Program, kind: str) -> list[str]:
    """Where the ops of a kind are, and the kinds of their parts."""
    return [f"{op.where}: {' '.join(part.kind for part in op.parts)}" for op in program.ops if op.kind == kind]


def test_the_fused_program_of_a_small_network() -> None:
    """Two layers an encoder node, the last with its pool, whose results are picked; the merge with its convolution."""
    program = fuse(lower(graph(ModelSpec("unet", 1, 2))))

    ends = ["layer", "layer", "join_layer", "layer", "layer"]
    assert _kinds(program) == ["layer", "layer_pool", "pick", "pick", *ends]
    assert _joined(program, "layer_pool") == ["x0_0: conv norm relu pool"]
    assert _joined(program, "join_layer") == ["x0_1: up_conv join conv norm relu"]
    assert [op.factor for op in program.ops if op.kind == "pick"] == [0, 1]


def test_norms_of_whole_maps_stay_behind_bare_convolutions() -> None:
    """Only the up-sampled map still goes straight into its part of the concatenation."""
    program = fuse(lower(graph(ModelSpec("unet", 1, 2, norm="instance"))))

    assert _joined(program, "join_up") == ["x0_1: up_conv join"]
    assert _kinds(program).count("norm") == 6
    assert _joined(program, "layer") == ["head of x0_1: conv"]


def test_the_program_at_low_resolution_of_a_full_scale_network() -> None:
    """Edges that up-sample join their convolution, and a node's edges, up to their ReLUs, its concatenation."""
    program = low(lower(graph(ModelSpec("unet3+", 1, 2, norm="none"))))

    assert _joined(program, "relu_join") == ["x0_1: conv relu up_layer join"]
    (joined,) = (op for op in program.ops if op.kind == "relu_join")
    assert [part.kind for part in joined.parts[2].parts] == ["up_sample", "conv", "relu"]


def test_a_gated_node_keeps_its_steps() -> None:
    """The map that steers is read three times, and a gate is no part of what ends in ReLU."""
    kinds = _kinds(low(lower(graph(ModelSpec("unet3+", 1, 2, "gated", norm="none")))))

    assert {"up_layer", "relu_join"} & set(kinds) == set()
    assert kinds.count("up_sample") == 1


def test_a_projection_keeps_its_up_sampled_map() -> None:
    """A 1x1 convolution is few multiply-adds at either resolution."""
    program = low(lower(graph(ModelSpec("unet", 1, 2, "sum", upsample="bilinear"))))

    assert _joined(program, "up_layer") == []
    assert _kinds(program).count("up_sample") == 1


def test_a_relu_of_something_else_is_no_part_of_a_layer() -> None:
    """One that no layer asks for, as behind a sum, is not in the module that a joined op runs."""
    conv = Conv(1, 1, 3)
    ops = (
        Op("image", "image", "", ()),
        Op("conv", "block", "0", (0,), ("nodes", "block", "0"), conv, padding=1),
        Op("relu", "block", "", (1,)),
    )

    assert _kinds(fuse(Program(ops, (2,), 1))) == ["layer", "relu"]
