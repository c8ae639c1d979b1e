"""How `up_conv` is launched, and what it and its relatives refuse, in one sentence each, before any launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipcost.kernels.ops import up_conv as module
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.ops.tiles import Tile
from skipcost.kernels.ops.up_conv import launches, pack_weight, up_conv_concat, up_conv_into


@pytest.fixture
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: list[Launch]) -> None:
        pytest.fail(f"launched {given}")

    monkeypatch.setattr(module, "run", refuse)


def test_a_weight_that_lies_as_it_is_packed_is_not_copied() -> None:
    """Whoever keeps weights in the kernel's order spares each call the copy; others are laid out once per call."""
    weight = torch.randn(4, 3, 2, 2)
    packed = pack_weight(weight)

    again = pack_weight(packed.permute(3, 2, 0, 1))

    assert packed.shape == (2, 2, 3, 4)
    assert torch.equal(packed[1, 0, 2], weight[:, 2, 1, 0])
    assert again.data_ptr() == packed.data_ptr()


def _launch(batch: int, size: int, **options: Any) -> Launch:
    """The launch that up-samples 128 channels to 64 in the last channels of a map of 128, without memory."""
    x = torch.empty(batch, 128, size, size, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    wide = torch.empty(batch, 128, 2 * size, 2 * size, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(128, 64, 2, 2, device="meta", dtype=torch.bfloat16)
    wide = wide.contiguous(memory_format=torch.channels_last)
    (launch,) = launches(x, weight, None, wide[:, 64:], **options)
    return launch


@pytest.mark.parametrize(("batch", "wide"), [(64, False), (65, True)])
def test_addresses_take_64_bits_where_32_do_not_reach(batch: int, wide: bool) -> None:  # noqa: FBT001 - what is expected
    """A map of 128 channels at 512x512 holds 2**31 elements at batch 64: the last address still fits, the next not."""
    assert _launch(batch, 256).constants["wide"] == wide


def test_a_tile_runs_across_the_four_positions() -> None:
    """64 output channels are 256 columns of the product: the grid has two tiles of 128 for every 128 pixels."""
    launch = _launch(2, 256, tile=Tile("pointer", 128, 128, 64, 8, 3))

    assert launch.grid == (2 * 256 * 256 // 128 * 2,)
    assert (launch.warps, launch.stages, launch.constants["tile_channels"]) == (8, 3, 128)


def test_more_pixels_than_can_be_counted_are_refused() -> None:
    """Pixels are counted in 32 bits; a map of more would need terabytes at any real width, and is refused."""
    with pytest.raises(ValueError, match=r"x of up_conv has shape .*the kernel counts 2\*\*31 pixels at most; split"):
        _launch(2, 1 << 15)


def test_a_tile_of_another_form_is_refused() -> None:
    """There is one kernel, which reads by address."""
    with pytest.raises(ValueError, match="up_conv cannot run in form tma: its kernel reads by address; take a tile"):
        _launch(1, 8, tile=Tile("tma", 128, 64, 64, 4, 3, 8, 16))


X, WEIGHT, BIAS = torch.ones(1, 4, 3, 3), torch.ones(4, 2, 2, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], X[0], WEIGHT, BIAS), r"map 0 of up_conv_concat has shape \(4, 3, 3\): every map must be \(N, C, H, W\)"),
        (([torch.ones(2, 4, 3, 3)], X, WEIGHT, BIAS), "map 1 of up_conv_concat has batch size 1, map 0 has 2"),
        (([X.half()], X, WEIGHT, BIAS), "map 1 of up_conv_concat is torch.float32 on cpu, map 0 is torch.float16 on"),
        (([], X.int(), WEIGHT, BIAS), "is torch.int32, which .* accepted: float32, float16, bfloat16, float64"),
        (([], X[:, :, :0], WEIGHT, BIAS), r"x of up_conv_concat has shape \(1, 4, 0, 3\): it needs a channel and a pi"),
        (
            ([], X, WEIGHT[:3], BIAS),
            r"weight .* has shape \(3, 2, 2, 2\): for x of shape \(1, 4, 3, 3\) it must be \(4, O",
        ),
        (([], X, torch.ones(4, 2, 3, 3), BIAS), r"weight .* shape \(4, 2, 3, 3\): .* it must be \(4, O, 2, 2\), as of"),
        (([], X, torch.ones(4, 2, 2), BIAS), r"weight of up_conv_concat has shape \(4, 2, 2\): for x of"),
        (([], X, WEIGHT.double(), BIAS), "the weight of up_conv_concat is torch.float64 on cpu, x is torch.float32 on"),
        (([], X, WEIGHT.to("meta"), BIAS), "the weight of up_conv_concat is torch.float32 on meta, x is torch.float32"),
        (([], X, WEIGHT, torch.ones(3)), r"the bias of up_conv_concat has shape \(3,\): one number for each of 2 outp"),
        (([], X, WEIGHT, BIAS.half()), "the bias of up_conv_concat is torch.float16 on cpu, x is torch.float32 on cpu"),
        (
            ([torch.ones(1, 4, 6, 7), torch.ones(1, 4, 9, 5)], X, WEIGHT, BIAS),
            "map 1 of up_conv_concat is 9x5, the map that joins it is up-sampled to 6x6: encoder maps must be at least",
        ),
    ],
    ids=[
        "rank",
        "batch",
        "type",
        "integers",
        "no pixel",
        "channels",
        "side",
        "weight's rank",
        "weight's type",
        "device",
        "bias",
        "bias's type",
        "larger than its encoder's",
    ],
)
@pytest.mark.usefixtures("_no_launch")
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    """One sentence says what was given and what is needed, before anything runs."""
    with pytest.raises(ValueError, match=message):
        up_conv_concat(*arguments)


def _buffer(*shape: int) -> Tensor:
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("buffer", "channel", "message"),
    [
        (
            _buffer(1, 3, 6, 6),
            2,
            r"shape \(1, 3, 6, 6\): 2 channels from channel 2 on do not fit; give it more channels",
        ),
        (_buffer(1, 3, 6, 6), -1, "2 channels from channel -1 on do not fit"),
        (_buffer(1, 3, 7, 6), 0, r"\(1, 3, 7, 6\): x of shape \(1, 4, 3, 3\) gives 6x6 pixels and cannot fill it"),
        (_buffer(1, 3, 6, 7), 0, r"\(1, 3, 6, 7\): x of shape \(1, 4, 3, 3\) gives 6x6 pixels and cannot fill it"),
        (_buffer(2, 3, 6, 6), 0, "map 1 of up_conv_into has batch size 2, map 0 has 1"),
        (_buffer(1, 3, 6, 6).double(), 0, "map 1 of up_conv_into is torch.float64 on cpu, map 0 is torch.float32"),
        (
            torch.zeros(1, 3, 6, 6),
            0,
            r"strides \(108, 36, 6, 1\): channels must be adjacent and nothing repeated; make",
        ),
        (
            _buffer(1, 3, 1, 6).expand(1, 3, 6, 6),
            0,
            "channels must be adjacent and nothing repeated; make it channels_l",
        ),
        (
            _buffer(1, 3, 6, 6).requires_grad_(),
            0,
            "up_conv_into has no gradient, but an argument requires one: use up_",
        ),
    ],
    ids=["behind", "before", "higher", "wider", "batch", "type", "strides", "repeated", "gradient"],
)
@pytest.mark.usefixtures("_no_launch")
def test_a_buffer_that_does_not_fit_is_refused(buffer: Tensor, channel: int, message: str) -> None:
    """One sentence says what is wrong with the buffer, and it is not written to."""
    with pytest.raises(ValueError, match=message):
        up_conv_into(X, WEIGHT, BIAS, buffer, channel)

    assert not buffer.any()
