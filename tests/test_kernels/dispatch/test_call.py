"""What a network asks of the kernels: a call has one key and sound arithmetic, and the calls are the whole network."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.dispatch.call import MERGING, MODES, OPS, PRECISIONS, Call
from skipcost.kernels.dispatch.network_calls import graph_calls, network_calls
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, build, graph

GOOD: dict[str, Any] = {"op": "conv_bn_relu", "batch": 2, "sources": ((3, 8, 9),), "out_channels": 5}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any call that a kernel could be asked for."""
    op = draw(st.sampled_from(OPS))
    size = st.tuples(st.integers(1, 999), st.integers(3, 999), st.integers(3, 999))
    sources = draw(st.lists(size, min_size=1, max_size=5 if op in MERGING else 1))
    kernel = draw(st.sampled_from((1, 3)))
    return Call(
        op,
        draw(st.integers(1, 64)),
        tuple(sources),
        0 if op == "crop_concat" else draw(st.integers(1, 2048)),
        kernel,
        draw(st.integers(0, kernel // 2)),
        draw(st.booleans()),
        draw(st.sampled_from(PRECISIONS)),
        draw(st.sampled_from(MODES)),
        draw(st.integers(1, 32)),
    )


@given(calls())
def test_a_key_is_read_back_as_the_call_that_wrote_it(call: Call) -> None:
    """The key holds everything that makes one call another, in one line."""
    assert Call.parse(call.key) == call
    assert "\n" not in call.key


def test_keys_read_as_they_are_documented() -> None:
    """Rows of measurements are found by these texts: a change orphans all that were measured."""
    concat = Call("concat_conv_bn_relu", 1, ((64, 568, 568), (64, 392, 392)), 64, padding=0)
    up = Call("up_conv", 8, ((128, 16, 16),), 64, mode="training")
    merge = Call("crop_concat", 8, ((64, 9, 9), (64, 8, 8)), 0, precision="fp32")
    low = Call("tap_first", 1, ((320, 32, 32),), 64, factor=16)

    assert concat.key == "concat_conv_bn_relu n1 64x568x568+64x392x392>64 k3 p0 relu bf16 inference"
    assert up.key == "up_conv n8 128x16x16>64 bf16 training"
    assert merge.key == "crop_concat n8 64x9x9+64x8x8 fp32 inference"
    assert low.key == "tap_first n1 320x32x32>64 k3 p1 x16 bf16 inference"


@pytest.mark.parametrize("op", ["crop_concat", "up_conv"])
def test_fields_without_a_use_make_no_second_call(op: str) -> None:
    """A concatenation with a kernel and one without are one piece of work, and equal."""
    channels = 0 if op == "crop_concat" else 4

    plain = Call(op, 1, ((8, 6, 6),), channels)
    dressed = Call(op, 1, ((8, 6, 6),), channels, kernel=1, padding=0, relu=False, factor=2)

    assert plain == dressed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"op": "conv_bn_rel"}, "unknown op 'conv_bn_rel'; did you mean 'conv_bn_relu'"),
        ({"precision": "amp-bf16"}, "unknown precision 'amp-bf16'"),
        ({"mode": "train"}, "unknown mode 'train'; did you mean 'training'"),
        ({"batch": 0}, "batch=0 is not a whole number from 1"),
        ({"batch": True}, "batch=True is not a whole number"),
        ({"sources": ()}, "is not a tuple of"),
        ({"sources": [(3, 8, 9)]}, "is not a tuple of"),
        ({"sources": ((3, 8),)}, r"source \(3, 8\) is not \(C, H, W\)"),
        ({"sources": ((3, 8, 0),)}, "width of source"),
        ({"sources": ((3, 8, 9), (3, 8, 9))}, "conv_bn_relu reads one map, not 2"),
        ({"kernel": 5}, "kernel=5 of conv_bn_relu is not 1 or 3"),
        ({"kernel": 1, "padding": 1}, "padding=1 is not a whole number from 0 to 0"),
        ({"padding": 2}, "padding=2 is not a whole number from 0 to 1"),
        ({"relu": 1}, "relu=1 is neither true nor false"),
        ({"out_channels": 0}, "out_channels=0 is not a whole number from 1"),
        ({"sources": ((3, 2, 9),), "padding": 0}, "of a 2x9 map with kernel=3 and padding=0 has no pixel"),
        ({"op": "crop_concat"}, "out_channels=5 is not a whole number from 0 to 0"),
        ({"op": "tap_first", "factor": 0}, "factor=0 is not a whole number from 1"),
    ],
)
def test_a_call_that_no_kernel_could_run_is_refused(changed: dict[str, Any], message: str) -> None:
    """One sentence that says what was received and what is accepted."""
    with pytest.raises(ValueError, match=message):
        Call(**{**GOOD, **changed})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "conv_bn_relu",
        "conv_bn_relu n1 64x8x8>64 bf16",
        "conv_bn_relu n1 64x8x8>64 k3 p1 relu bf16 inference\n",
        "conv_bn_relu n01 64x8x8>64 k3 p1 relu bf16 inference",  # two texts of one call would be two calls in a table
        "up_conv n1 64x8x8>64 k2 p0 bf16 inference",
        "tap_first n1 64x8x8>64 k3 p1 bf16 inference",
        "conv_bn_relu n1 64x8x8>64 k3 p1 relu x2 bf16 inference",
    ],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    """Only the one way in which a key is written is read."""
    with pytest.raises(ValueError, match="call's key"):
        Call.parse(text)


def test_macs_and_sizes_are_those_of_pytorchs_convolutions() -> None:
    """PyTorch's own count of each op's convolution, a MAC being two of its operations, and its result's size."""
    x = torch.empty(2, 6, 9, 7, device="meta")
    up = nn.Upsample(scale_factor=4, mode="bilinear")
    layers = {
        Call("conv_bn_relu", 2, ((6, 9, 7),), 5): nn.Conv2d(6, 5, 3, padding=1),
        Call("conv_bn_relu", 2, ((6, 9, 7),), 5, padding=0): nn.Conv2d(6, 5, 3),
        Call("conv_bn_relu", 2, ((6, 9, 7),), 5, kernel=1, padding=0): nn.Conv2d(6, 5, 1),
        Call("concat_conv_bn_relu", 2, ((2, 11, 7), (4, 9, 8)), 5): nn.Conv2d(6, 5, 3, padding=1),
        Call("up_conv", 2, ((6, 9, 7),), 5): nn.ConvTranspose2d(6, 5, 2, stride=2),
        Call("tap_first", 2, ((6, 9, 7),), 5, padding=0, factor=4): nn.Sequential(up, nn.Conv2d(6, 5, 3)),
    }
    for call, layer in layers.items():
        with FlopCounterMode(display=False) as counter:
            result = layer.to("meta")(x)

        assert call.macs * 2 == counter.get_total_flops()
        assert call.out_size == result.shape[-2:]
        assert call.weights == next(layer.parameters()).numel()


def test_compulsory_bytes_are_each_map_once() -> None:
    """Windows and weights read once, results written once, and eight bytes of scale and shift a channel."""
    same = {"padding": 0, "kernel": 1}

    assert Call("conv_bn_relu", 2, ((3, 4, 4),), 5, **same).bytes == 2 * (2 * (3 + 5) * 16 + 15) + 8 * 5
    assert Call("conv_bn_relu", 2, ((3, 4, 4),), 5, precision="tf32", **same).bytes == 4 * (2 * 8 * 16 + 15) + 40
    assert Call("conv_bn_relu_pool", 1, ((3, 5, 4),), 5, **same).bytes == 2 * (8 * 20 + 5 * 4 + 15) + 40
    assert Call("crop_concat", 1, ((3, 9, 4), (2, 4, 9)), 0).bytes == 2 * 2 * 5 * 16
    assert Call("up_conv", 1, ((3, 4, 4),), 5).bytes == 2 * (3 * 16 + 5 * 64 + 60) + 40
    assert Call("tap_first", 1, ((3, 4, 4),), 5, factor=4).bytes == 2 * (3 * 16 + 5 * 256 + 135) + 40


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_calls_are_the_whole_network(variant: str, skip: str, padding: str, mode: str) -> None:
    """MACs and weights add up to the graph's, at sizes that pooling floors and skips crop, with every head.

    101 x 94: odd at level 0 in one direction, at level 1 in the other, so that no two crops are alike.
    """
    for head in VARIANTS[variant].heads:
        spec = ModelSpec(variant, 3, 4, skip, classes=1, padding=padding, head=head)
        network = graph(spec)
        listed = network_calls(spec, 3, 101, 94, mode, "bf16")

        assert sum(call.macs for _, call in listed) == 3 * network.conv_macs(101, 94)
        assert sum(call.weights for _, call in listed) == sum(conv.weights for conv in network.convs())
        assert {(call.batch, call.precision, call.mode) for _, call in listed} == {(3, "bf16", mode)}
        assert len({where for where, _ in listed}) == len(listed)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_calls_are_in_the_executors_order_with_its_shapes(variant: str, skip: str) -> None:
    """What the executor's layers are given when it runs, in order: channels, window, and the result's size."""
    spec = ModelSpec(variant, 2, 4, skip, head=VARIANTS[variant].heads[min(1, len(VARIANTS[variant].heads) - 1)])
    seen = []
    network = build(spec).to("meta")

    def keep(_layer: nn.Module, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        seen.append((*arguments[0].shape[1:], *result.shape[1:]))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(keep)
    network(torch.empty(1, 1, 41, 38, device="meta"))

    listed = [call for _, call in network_calls(spec, 1, 41, 38, "inference", "fp32")]
    assert [(call.in_channels, *call.window, call.out_channels, *call.out_size) for call in listed] == seen


def test_a_unet_is_grouped_as_the_fused_backend_runs_it() -> None:
    """Pooled encoder nodes end in one op, decoder nodes start with one that reads the maps before they are cropped."""
    spec = ModelSpec(depth=1, width=4, padding="valid")

    listed = network_calls(spec, 1, 36, 36, "inference", "bf16")
    keys = [(where, call.key.removesuffix(" bf16 inference")) for where, call in listed]

    assert keys == [
        ("x0_0.0", "conv_bn_relu n1 1x36x36>4 k3 p0 relu"),
        ("x0_0.1", "conv_bn_relu_pool n1 4x34x34>4 k3 p0 relu"),
        ("x1_0.0", "conv_bn_relu n1 4x16x16>8 k3 p0 relu"),
        ("x1_0.1", "conv_bn_relu n1 8x14x14>8 k3 p0 relu"),
        ("x1_0->x0_1", "up_conv n1 8x12x12>4"),
        ("x0_1.0", "concat_conv_bn_relu n1 4x32x32+4x24x24>4 k3 p0 relu"),
        ("x0_1.1", "conv_bn_relu n1 4x22x22>4 k3 p0 relu"),
        ("head of x0_1", "conv_bn_relu n1 4x20x20>2 k1 p0"),
    ]


def test_training_takes_statistics() -> None:
    """In training a layer with batch norm takes the batch's statistics, over maps that it reads side by side."""
    listed = dict(network_calls(ModelSpec(depth=1, width=4), 2, 16, 16, "training", "bf16"))

    assert listed["x0_1.0"].key == "conv_bn_relu_train n2 4x16x16+4x16x16>4 k3 p1 relu bf16 training"
    assert listed["x0_0.1"].op == "conv_bn_relu_train"
    assert listed["head of x0_1"].op == "conv_bn_relu"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_what_cannot_be_folded_is_a_bare_convolution(norm: str, mode: str) -> None:
    """Instance and group norm need the whole map first: neither ReLU nor pooling nor a merge is in the convolution."""
    listed = dict(network_calls(ModelSpec(depth=1, width=4, norm=norm), 2, 16, 16, mode, "bf16"))

    assert not listed["x0_0.0"].relu
    assert listed["x0_0.1"].op == "conv_bn_relu"
    assert listed["x0_1.merge"].key == f"crop_concat n2 4x16x16+4x16x16 bf16 {mode}"
    assert listed["x0_1.0"].key == f"conv_bn_relu n2 8x16x16>4 k3 p1 bf16 {mode}"


def test_without_a_norm_there_are_no_statistics() -> None:
    """The 2015 network trains on the same op that it runs inference on."""
    listed = dict(network_calls(ModelSpec(depth=1, width=4, norm="none"), 2, 16, 16, "training", "bf16"))

    assert listed["x0_1.0"].op == "concat_conv_bn_relu"
    assert listed["x0_0.1"].op == "conv_bn_relu"  # its gradients need the full map: it pools by itself


def test_a_deployed_graph_has_fewer_calls() -> None:
    """Any graph can be asked, the one without side outputs too."""
    whole = ModelSpec("unet++", 2, 4, head="deep").graph()

    final = graph_calls(whole.final(), 1, 16, 16, "inference", "fp32")

    assert {where for where, _ in final} == {
        where for where, _ in graph_calls(whole, 1, 16, 16, "inference", "fp32")
    } - {"head of x0_1"}


def test_a_size_that_cannot_work_is_refused_with_one_that_can() -> None:
    """The sentence is the geometry's own."""
    with pytest.raises(ValueError, match="the nearest size that works is 188x188"):
        network_calls(ModelSpec(padding="valid"), 1, 100, 100, "inference", "bf16")


def test_a_call_is_a_value() -> None:
    """Calls are frozen and can be counted in a set."""
    call = Call(**GOOD)

    assert {call, Call(**GOOD)} == {call}
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.batch = 3  # type: ignore[misc]


def test_calls_need_no_torch() -> None:
    """Listing what a network asks for works where only the counting does."""
    script = (
        "import sys; from skipcost.unet_models import ModelSpec;"
        "from skipcost.kernels.dispatch.network_calls import network_calls;"
        "print(len(network_calls(ModelSpec(), 1, 64, 64, 'inference', 'bf16')), 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["23", "False"]
