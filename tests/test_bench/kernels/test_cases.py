"""What is checked, timed and tuned: real calls, each once, with the tiles that the ops themselves would take."""

from __future__ import annotations

import pytest
import torch

from skipcost.bench.kernels.cases import (
    FAMILY,
    INTERPRETED,
    LIBRARIES,
    NETWORKS,
    TILED,
    TINY,
    USEFUL,
    chosen,
    distinct,
    form,
    forward_form,
    parse_network,
    settings,
    tiles,
)
from skipcost.bench.kernels.check import BATCHES
from skipcost.bench.measure.machine import DTYPES
from skipcost.kernels.dispatch.call import OPS, Call
from skipcost.kernels.ops import conv_bn_relu, up_conv
from skipcost.kernels.ops.tiles import CANDIDATES, Tile
from skipcost.kernels.verify.table import KERNELS

LAST = torch.channels_last


def calls_of(networks: tuple[str, ...], precision: str = "bf16") -> list[Call]:
    """All distinct calls of networks at the batches that `check` takes."""
    return distinct(call for each in settings(networks, BATCHES) for call in each.calls(precision))


def launched(call: Call, kind: str) -> Tile:
    """The tile that the op itself launches for a call, on tensors without values."""
    dtype, tf32 = DTYPES[call.precision], call.precision == "tf32"
    maps = [torch.empty(call.batch, *each, dtype=dtype, device="meta").to(memory_format=LAST) for each in call.sources]
    out = torch.empty(call.batch, call.out_channels, *call.out_size, dtype=dtype, device="meta").to(memory_format=LAST)
    if call.op == "up_conv":
        weight = torch.empty(call.in_channels, call.out_channels, 2, 2, dtype=dtype, device="meta")
        (launch,) = up_conv.launches(maps[0], weight, None, out, tf32=tf32)
    else:
        shape = (call.out_channels, call.in_channels, call.kernel, call.kernel)
        weight = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=LAST)
        options = {"padding": call.padding, "relu": call.relu, "tf32": tf32, "form": kind}
        (launch,) = conv_bn_relu.launches(maps, weight, None, None, out, **options)
    constants = launch.constants
    rows, columns = constants.get("tile_rows", 0), constants.get("tile_columns", 0)
    pixels = constants.get("tile_pixels", rows * columns)
    sizes = (pixels, constants["tile_channels"], constants["tile_depth"], launch.warps, launch.stages)
    return Tile(kind, *sizes, rows, columns)


@pytest.mark.parametrize("precision", USEFUL)
def test_the_first_tile_is_the_one_that_the_op_takes(precision: str) -> None:
    """What is checked and timed as shipped is what runs: for every call of the family, in every form.

    And where maps have channels of which only 16 is a common divisor, which is what a block may then hold of each.
    """
    compared = 0
    uneven = Call("concat_conv_bn_relu", 1, ((48, 9, 9), (80, 9, 9)), 64, precision=precision)
    for call in (*calls_of(NETWORKS, precision), uneven):
        for name in ("triton", "tma"):
            kind = form(call, name)
            if not kind or name not in KERNELS[call.op].implementations:
                continue
            try:
                expected = launched(call, kind)
            except ValueError:  # the copy engine takes no image of three channels
                assert name == "tma"
                continue
            assert tiles(call, name, "")[0] == expected
            compared += 1

    assert compared > 100


def test_every_candidate_of_a_form_is_tried_once() -> None:
    """The shipped tile first, and not again where it is a candidate; a first layer's must hold all of its taps."""
    plain = tiles(Call("conv_bn_relu", 1, ((64, 64, 64),), 64), "tma", "")
    few = tiles(Call("conv_bn_relu", 1, ((7, 64, 64),), 64), "triton", "")

    assert set(CANDIDATES["tma"]) <= set(plain)
    assert len(plain) == len(set(plain))
    assert {tile.form for tile in few if tile} == {"few"}
    assert all(tile and tile.depth >= 63 for tile in few)


@pytest.mark.parametrize(
    ("op", "name"), [("crop_concat", "triton"), ("conv_bn_relu_train", "triton"), ("conv_bn_relu", "cudnn")]
)
def test_what_is_told_no_tile_has_none(op: str, name: str) -> None:
    """A copy, a training step and PyTorch's own choose for themselves."""
    call = Call(op, 1, ((8, 8, 8), (8, 8, 8))[: 1 + (op == "crop_concat")], 0 if op == "crop_concat" else 8)

    assert tiles(call, name, "sm90") == [None]


def test_the_family_asks_for_every_op() -> None:
    """No kernel is left unchecked, on a GPU or in the interpreter."""
    assert {call.op for call in calls_of(NETWORKS)} == set(OPS) == set(KERNELS)
    assert {call.op for call in calls_of(TINY)} == set(OPS)


def test_a_merge_is_also_checked_as_a_concatenation() -> None:
    """Dispatch may concatenate and convolve instead: both are there, over the same channels and window."""
    found = calls_of((f"{FAMILY[0]}@64",))

    virtual = next(call for call in found if call.op == "concat_conv_bn_relu")
    assert Call("crop_concat", 1, virtual.sources, 0) in found
    assert Call("conv_bn_relu", 1, ((virtual.in_channels, *virtual.window),), virtual.out_channels) in found


def test_convolutions_of_up_sampled_maps_are_checked_at_low_resolution() -> None:
    """Every edge of UNet 3+ that up-samples, from the map as it is; none where a transposed convolution does."""
    found = distinct(calls_of((f"{FAMILY[2]}@512",)), ("tap_first",))

    deepest = [
        call for call in found if call.sources == ((1024, 32, 32),) and (call.batch, call.mode) == (1, "inference")
    ]
    assert sorted(call.factor for call in deepest) == [2, 4, 8, 16]
    assert {(call.out_channels, call.kernel, call.padding) for call in found} == {(64, 3, 1)}
    assert not distinct(calls_of((f"{FAMILY[0]}@64",)), ("tap_first",))


def test_each_call_comes_once_and_only_if_its_op_is_asked_for() -> None:
    """Networks share most of their calls."""
    found = distinct((call for each in settings(NETWORKS, BATCHES) for call in each.calls("bf16")), ("up_conv",))

    assert len(found) == len(set(found))
    assert {call.op for call in found} == {"up_conv"}


def test_training_changes_only_what_takes_statistics() -> None:
    """An up_conv in training runs what it runs at inference, so it is not checked again."""
    up = Call("up_conv", 1, ((8, 4, 4),), 4, mode="training")
    step = Call("conv_bn_relu_train", 1, ((8, 4, 4),), 4, mode="training")

    assert forward_form(up).mode == "inference"
    assert forward_form(step) == step


def test_networks_have_their_usual_sizes() -> None:
    """512, but 572 where nothing is padded; or what is asked for."""
    assert [parse_network(each)[1] for each in NETWORKS] == [512, 512, 512, 572]
    assert parse_network("unet/d4/w64/concat/padding=valid")[1] == 572
    assert parse_network("unet/d4/w64/concat")[1] == 512
    assert parse_network("unet/d1/w4/concat@30")[1] == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unett/d4/w64/concat", "unknown variant 'unett'"),
        ("unet/d4/w64/concat@", "is not a network at a size"),
        ("unet/d4/w64/concat@5x5", "is not a network at a size"),
        ("unet/d4/w64/concat@9999999", "is not a whole number from 1 to"),
        ("unet/d4/w64/concat/padding=valid@100", "the nearest size that works is 188x188"),
    ],
)
def test_a_network_that_cannot_be_run_is_refused(text: str, message: str) -> None:
    """With what is accepted, before anything is run."""
    with pytest.raises(ValueError, match=message):
        parse_network(text)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    """A misspelt op would otherwise select nothing and pass."""
    assert chosen(None, "op", OPS) == OPS
    assert chosen("up_conv,crop_concat,up_conv", "op", OPS) == ("up_conv", "crop_concat")
    with pytest.raises(ValueError, match="unknown op 'upconv'; did you mean 'up_conv'"):
        chosen("upconv", "op", OPS)


def test_the_tables_hold_what_they_should() -> None:
    """Every precision is run, the interpreter's are real ones, libraries and tiled ops exist."""
    assert sorted(USEFUL) == sorted(DTYPES)
    assert set(INTERPRETED) < set(USEFUL)
    assert set(LIBRARIES) <= {name for kernel in KERNELS.values() for name in kernel.implementations}
    assert set(TILED) <= set(OPS)
