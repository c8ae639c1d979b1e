"""The composed transposed convolution against its two convolutions in turn: values, borders, the weights it keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels.low_resolution.composed import PART, add_composed, blank, composed, composed_up_conv
from skipcost.unet_models.ops import crop

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = torch.channels_last
SOURCES = ("up.weight", "up.bias", "conv.weight", "conv.bias")


@dataclass(frozen=True)
class Problem:
    """A transposed convolution of C to M channels, maps beside its result, and a 3x3 convolution to O channels."""

    size: tuple[int, int] = (3, 4)
    channels: tuple[int, int, int] = (5, 4, 6)
    beside: tuple[tuple[int, int, int], ...] = ((3, 0, 0),)  # channels, and rows and columns that are cropped away
    padding: int = 1
    biases: tuple[bool, bool] = (True, True)
    layout: torch.memory_format = torch.contiguous_format
    batch: int = 2

    def layers(self) -> nn.ModuleDict:
        """Both convolutions, in float64, of normal weights."""
        torch.manual_seed(0)
        (before, between, after), others = self.channels, sum(each[0] for each in self.beside)
        up = nn.ConvTranspose2d(before, between, 2, stride=2, bias=self.biases[0])
        conv = nn.Conv2d(others + between, after, 3, padding=self.padding, bias=self.biases[1])
        made = nn.ModuleDict({"up": up, "conv": conv}).double().eval()
        for each in made.parameters():
            nn.init.normal_(each)
            if each.ndim == 4:
                each.data = each.data.contiguous(memory_format=self.layout)
        return made

    def maps(self) -> list[Tensor]:
        """The maps beside the up-sampled one, and last the small map; normal values."""
        torch.manual_seed(1)
        height, width = self.size
        shapes = [(channels, 2 * height + rows, 2 * width + columns) for channels, rows, columns in self.beside]
        shapes.append((self.channels[0], height, width))
        return [torch.randn(self.batch, *each).double().contiguous(memory_format=self.layout) for each in shapes]


def _reference(layers: nn.ModuleDict, maps: list[Tensor]) -> Tensor:
    """Up-sample, crop, concatenate, convolve."""
    up = layers["up"](maps[-1])
    return layers["conv"](torch.cat([*(crop(each, *up.shape[2:]) for each in maps[:-1]), up], 1))


def _run(layers: nn.ModuleDict, maps: list[Tensor]) -> Tensor:
    """The same by composed weights."""
    up, conv = layers["up"], layers["conv"]
    made = composed(up, conv, maps[-1].dtype)
    of_maps = conv.weight[:, : conv.in_channels - up.out_channels]
    return composed_up_conv(maps[:-1], maps[-1], of_maps, made, padding=conv.padding[0])


@st.composite
def problems(draw: Any) -> Problem:
    """Any call: odd sizes, one pixel, crops of the other maps, both paddings, biases, layouts, batches."""
    padding = draw(st.integers(0, 1))
    side, few = st.integers(2 - padding, 6), st.integers(1, 5)
    beside = st.lists(st.tuples(few, st.integers(0, 3), st.integers(0, 3)), max_size=2)
    return Problem(
        (draw(side), draw(side)),
        (draw(few), draw(few), draw(few)),
        tuple(draw(beside)),
        padding,
        (draw(st.booleans()), draw(st.booleans())),
        draw(st.sampled_from((torch.contiguous_format, LAST))),
        draw(st.integers(0, 2)),
    )


@given(problems())
def test_composed_is_both_convolutions(call: Problem) -> None:
    """In float64, borders included: |error| <= gamma of the sum of all products' sizes (Higham, 2002, sec. 3.1)."""
    layers, maps = call.layers(), call.maps()

    with torch.no_grad():
        wanted = _reference(layers, maps)
        actual = _run(layers, maps)

        for each in layers.parameters():
            each.abs_()
        absolute = _reference(layers, [each.abs() for each in maps])
    terms = 9 * sum(each[0] for each in call.beside) + 9 * call.channels[1] + 4 * call.channels[0] + 32
    assert actual.shape == wanted.shape
    assert ((actual - wanted).abs() <= 2 * terms * torch.finfo(torch.float64).eps / 2 * absolute).all()


@given(problems(), st.tuples(*[st.integers(0, 4)] * 4))
def test_zeros_around_the_up_sampled_map_are_exact(call: Problem, pad: tuple[int, int, int, int]) -> None:
    """Any number of rows and columns of them, both biases included."""
    (layers, maps), (left, right, top, bottom) = (replace(call, beside=()).layers(), call.maps()), pad
    height, width = (2 * side for side in call.size)
    made = composed(layers["up"], layers["conv"], torch.float64)

    with torch.no_grad():
        wanted = layers["conv"](functional.pad(layers["up"](maps[-1]), pad))
        window = (-top, -left, height + top + bottom, width + left + right)
        result = blank(maps[-1], made.kernel, made.bias, window, call.padding)
        add_composed(result, maps[-1], made, window, call.padding)

    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (3, 4)], ids=str)
def test_bias_reaches_the_border_through_the_taps_inside(size: tuple[int, int]) -> None:
    """All-ones weights over a bias of 1 count the taps that lie inside: 9, at an edge 6, in a corner 4."""
    layers = Problem(size, (1, 1, 1), ()).layers()
    for each in layers.parameters():
        nn.init.ones_(each)
    nn.init.zeros_(layers["up"].weight)
    nn.init.zeros_(layers["conv"].bias)

    with torch.no_grad():
        result = _run(layers, [torch.randn(1, 1, *size).double()])

    rows, columns = ([2, *[3] * (2 * side - 2), 2] for side in size)
    assert result[0, 0].tolist() == [[row * column for column in columns] for row in rows]


@pytest.mark.parametrize("padding", [0, 1])
def test_integers_are_exact(padding: int) -> None:
    """Sums of small whole numbers have no rounding, so every pixel is the reference's to the bit, also in fp32."""
    call = Problem((5, 4), (6, 3, 4), ((2, 1, 2),), padding)
    layers, maps = call.layers().float(), [(4 * each).round().float() for each in call.maps()]
    with torch.no_grad():
        for each in layers.parameters():
            each.copy_((3 * each).round())

        assert torch.equal(_run(layers, maps), _reference(layers, maps))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("channels", [PART - 1, PART + 1, 2 * PART + 3])
def test_weights_are_rounded_once(channels: int, layout: torch.memory_format) -> None:
    """Composed in float64, part by part, whatever the weights are: the sixteen taps of one transposed convolution."""
    call = Problem(channels=(channels, 4, 3), layout=layout)
    layers = call.layers().float()

    made = composed(layers["up"], layers["conv"], torch.float32)

    of_up = layers["conv"].weight[:, 3:].double()
    taps = functional.conv2d(layers["up"].weight.double(), of_up, padding=2).float()  # (C, O, 4, 4)
    kernel = made.kernel.unflatten(0, (2, 2, 3))  # (phase, phase, O, C, 2, 2)
    for y in range(2):
        for x in range(2):
            wanted = taps[:, :, y::2, x::2].flip(2, 3).transpose(0, 1)
            torch.testing.assert_close(kernel[y, x], wanted, rtol=2e-7, atol=1e-12)


def _changed_in_place(layers: nn.ModuleDict, name: str) -> None:
    with torch.no_grad():
        layers.get_parameter(name).add_(1)


def _loaded(layers: nn.ModuleDict, name: str) -> None:
    state = {key: value + (key == name) for key, value in layers.state_dict().items()}
    layers.load_state_dict(state)


def _replaced(layers: nn.ModuleDict, name: str) -> None:
    owner, _, attribute = name.partition(".")
    setattr(layers[owner], attribute, nn.Parameter(layers.get_parameter(name) + 1))


def _data_replaced(layers: nn.ModuleDict, name: str) -> None:
    parameter = layers.get_parameter(name)
    parameter.data = parameter.data + 1


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("change", [_changed_in_place, _loaded, _replaced, _data_replaced])
def test_changed_weights_are_seen(change: Callable[[nn.ModuleDict, str], None], name: str) -> None:
    """Between two calls, whichever of the four it is."""
    call = Problem()
    layers, maps = call.layers(), call.maps()
    with torch.inference_mode():
        before = _run(layers, maps)
    change(layers, name)

    with torch.inference_mode():
        result, wanted = _run(layers, maps), _reference(layers, maps)

    assert not torch.allclose(result, before)
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


def test_unchanged_weights_are_composed_once() -> None:
    """For each type that is asked for."""
    layers = Problem().layers()
    up, conv = layers["up"], layers["conv"]

    single, double = (composed(up, conv, dtype) for dtype in (torch.float32, torch.float64))

    assert composed(up, conv, torch.float32) is single
    assert composed(up, conv, torch.float64) is double
    assert single.kernel.dtype == single.bias.dtype == single.border.dtype == torch.float32


def test_what_is_kept_stays_out_of_files_and_copies() -> None:
    """A state_dict has the parameters alone; a copy composes its own, and is right."""
    call = Problem()
    layers, maps = call.layers(), call.maps()
    plain, size = list(layers.state_dict()), len(pickle.dumps(layers))

    with torch.no_grad():
        wanted = _run(layers, maps)

        assert list(layers.state_dict()) == plain
        assert len(pickle.dumps(layers)) < size + 200
        for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):  # noqa: S301 - its own
            _changed_in_place(copied, "up.weight")
            assert not torch.allclose(_run(copied, maps), wanted)
            torch.testing.assert_close(_run(copied, maps), _reference(copied, maps), rtol=0, atol=1e-11)


def test_layers_may_move_to_another_type() -> None:
    """`.float()` after a call in float64: composed from the new weights."""
    call = Problem()
    layers, maps = call.layers(), call.maps()
    with torch.no_grad():
        _run(layers, maps)
        layers, maps = layers.float(), [each.float() for each in maps]

        torch.testing.assert_close(_run(layers, maps), _reference(layers, maps), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("beside", [(), ((3, 0, 0),), ((3, 1, 1), (2, 0, 0))], ids=str)
def test_layout_is_the_references(beside: tuple[tuple[int, int, int], ...]) -> None:
    """channels_last stays channels_last, so that nothing behind converts."""
    call = Problem(beside=beside, layout=LAST)
    layers, maps = call.layers().float(), [each.float() for each in call.maps()]

    with torch.no_grad():
        result, wanted = _run(layers, maps), _reference(layers, maps)

    assert result.stride() == wanted.stride()


@pytest.mark.parametrize("padding", [0, 1])
def test_counted_are_sixteen_macs_for_each_pair_of_channels_and_position(padding: int) -> None:
    """Positions lie between the pixels of the small map; composing is not counted, as it is not done in every step."""
    layers, maps = Problem((5, 7), padding=padding).layers(), Problem((5, 7)).maps()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _run(layers, maps)

    rows, columns = 5 - 1 + 2 * padding, 7 - 1 + 2 * padding
    of_maps = 9 * 3 * 6 * 4 * (5 - 1 + padding) * (7 - 1 + padding)
    assert counter.get_total_flops() == 2 * 2 * (16 * 5 * 6 * rows * columns + of_maps)


ERRORS = {torch.float32: 1.2, torch.bfloat16: 1.7, torch.float16: 1.7}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_error_is_a_factor_of_the_references_own(dtype: torch.dtype, positive: bool) -> None:  # noqa: FBT001 - a parameter
    """Against float64, on normal data and on bright images: in 16 bits two terms and their sum are rounded."""
    call = Problem((12, 10), (64, 32, 32), ((32, 0, 0),))
    exact = call.layers().float().to(dtype).double()
    maps = [(each.abs() if positive else each).to(dtype).double() for each in call.maps()]
    layers = copy.deepcopy(exact).to(dtype)
    given = [each.to(dtype) for each in maps]

    with torch.no_grad():
        wanted = _reference(exact, maps)
        ours, theirs = ((run(layers, given).double() - wanted).norm() for run in (_run, _reference))

    assert ours <= ERRORS[dtype] * theirs


def test_maps_are_let_go() -> None:
    """The list is emptied, so that no map lives on in it while the small map is convolved."""
    call = Problem()
    layers, maps = call.layers(), call.maps()
    beside, made = maps[:-1], composed(layers["up"], layers["conv"], torch.float64)

    composed_up_conv(beside, maps[-1], layers["conv"].weight[:, :3].detach(), made)

    assert not beside


def test_composing_is_a_proper_op() -> None:
    """torch.library's own checks: schema, fake results of the same sizes, no aliases."""
    layers = Problem(layout=LAST).layers()
    given = [each.detach() for each in (layers["up"].weight, layers["up"].bias, layers["conv"].weight)]

    for bias in (None, layers["conv"].bias.detach()):
        torch.library.opcheck(torch.ops.skipcost.compose_up_conv, (*given, bias, torch.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": 2}, "padding=2 beside a 3x3 convolution: composed_up_conv takes 0 or 1"),
        (
            {"beside": ((3, -1, 0),)},
            "a map of 5x8 would crop the up-sampled map of 6x8: composed_up_conv needs all of it",
        ),
        ({"beside": ((3, 0, 0), (1, 2, -3))}, "a map of 8x5 would crop the up-sampled map of 6x8"),
    ],
)
def test_what_is_not_done_gets_a_sentence(changes: dict[str, Any], message: str) -> None:
    """Wider padding, and maps that are smaller than the up-sampled one."""
    call = Problem(**changes)

    with pytest.raises(ValueError, match=message):
        _run(call.layers(), call.maps())
