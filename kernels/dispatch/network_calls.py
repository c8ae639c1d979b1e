"""Every call of a network, in order: what the fused backend asks of the kernels, and where in the network.

Read off the program that it runs (`fuse`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.programs.fuse import fuse
from skipcost.unet_models.names import call_name
from skipcost.unet_models.program import Op, Program, lower
from skipcost.unet_models.sizes import Shape, measured
from skipcost.unet_models.spec import ModelSpec
from skipcost.unet_models.topology import Conv, SkipGraph


def network_calls(
    spec: ModelSpec, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of the network of `spec`, all heads included, on a batch of height x width pixels; see `graph_calls`.

    mode: "inference" or "training". precision: "fp32", "tf32", "bf16" or "fp16". ValueError where the size cannot work.
    """
    return graph_calls(spec.graph(), batch, height, width, mode, precision)


def graph_calls(
    graph: SkipGraph, batch: int, height: int, width: int, mode: str, precision: str
) -> list[tuple[str, Call]]:
    """Every call of a graph with where it happens, in the executor's order and as the fused backend groups the work.

    Where: `x0_1.0` is the first convolution of node x0_1; `x1_0->x0_1` what an edge does (its transposed or its 3x3
    convolution), `x1_0->x0_1.project` and `x0_0->x0_1.gate.psi` what else it has; `x0_1.merge`, `head of x0_4` and
    `classifier on x4_0` speak for themselves. Each convolution of the network is in exactly one call, so the calls'
    MACs add up to the network's. Pooling, up-sampling without weights, sums and a gate's arithmetic are no calls, nor
    are norms that cannot be folded (instance, group): such a layer is its bare convolution, without ReLU, and maps
    are concatenated before it.
    """
    setting: dict[str, Any] = {"batch": batch, "mode": mode, "precision": precision}
    return [(where, Call(**setting, **facts)) for where, facts in _calls(fuse(lower(graph)), (height, width), mode)]


def _calls(program: Program, size: tuple[int, int], mode: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what each call of a fused program is, but for what all have alike."""
    joined: tuple[Shape, ...] = ()
    for op, shapes, _, whole in measured(program, size):
        reads = tuple(shapes)
        if op.kind == "join" and op.how == "concat":
            joined = reads
            if whole.kind != "join_layer":
                yield call_name(op), {"op": "crop_concat", "sources": reads, "out_channels": 0}
        elif op.kind == "up_conv" and op.conv:
            yield call_name(op), {"op": "up_conv", "sources": reads, "out_channels": op.conv.out_channels}
        elif op.kind == "conv" and op.conv:
            sources = joined if whole.kind == "join_layer" else reads
            yield call_name(op), _convolution(whole, op, op.conv, sources, mode)


def _convolution(op: Op, part: Op, conv: Conv, sources: tuple[Shape, ...], mode: str) -> dict[str, Any]:
    """A convolution of maps with what of its norm and ReLU is in the op; in training, with statistics."""
    name = "conv_bn_relu"
    if mode == "training" and conv.norm == "batch":
        name = "conv_bn_relu_train"
    elif op.kind == "join_layer":
        name = "concat_conv_bn_relu"
    elif op.kind == "layer_pool" and mode == "inference":
        name = "conv_bn_relu_pool"
    relu = op.part_of("relu") is not None
    settings = {"kernel": conv.kernel, "padding": part.padding, "relu": relu}
    return {"op": name, "sources": sources, "out_channels": conv.out_channels, **settings}
