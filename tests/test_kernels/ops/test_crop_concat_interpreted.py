"""`crop_concat` in Triton's interpreter, which runs the kernel on CPU tensors without a GPU.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/ops/test_crop_concat_interpreted.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, amid, assert_same, far_apart
from torch import Tensor

from skipcost.kernels.ops import crop_concat as module
from skipcost.kernels.ops.crop_concat import DTYPES, Move, crop_concat, launches, merge
from skipcost.kernels.ops.launch import run
from skipcost.unet_models import REFERENCE, VARIANTS, ModelSpec, build
from skipcost.unet_models import ops as reference_ops

FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a check merges: tiles smaller than a map make several programs, sizes they do not divide ragged edges."""

    batch: int
    sizes: tuple[tuple[int, int, int], ...]  # C, H, W of each map
    layouts: tuple[str, ...]
    dtype: torch.dtype
    tile: int = 256


@st.composite
def shapes(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Shapes:
    """1 to 6 maps of any size from the smallest on, so that crops have odd and even remainders."""
    count = draw(st.integers(1, 6))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = st.tuples(st.sampled_from((0, 1, 2, 3, 16, 17)), st.integers(0, 4), st.integers(0, 4))
    extra = draw(st.lists(size, min_size=count, max_size=count))
    return Shapes(
        batch=draw(st.integers(0, 2)),
        sizes=tuple(
            (channels, height + more_height, width + more_width) for channels, more_height, more_width in extra
        ),
        layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=count, max_size=count))),
        dtype=draw(st.sampled_from(dtypes)),
        tile=draw(st.sampled_from((256, 1024))),
    )


def make_maps(case: Shapes) -> list[Tensor]:
    """Random maps, each amid canaries: NaN, or 77 in a type that has none."""
    torch.manual_seed(0)
    maps = []
    for size, layout in zip(case.sizes, case.layouts, strict=True):
        shape = (case.batch, *size)
        values = torch.randn(shape).mul(50).to(case.dtype)
        maps.append(amid(values, layout, float("nan") if case.dtype.is_floating_point else 77))
    return maps


def differentiable(maps: list[Tensor]) -> list[Tensor]:
    """Make leaves of the maps, strides and surroundings kept."""
    return [each.detach().requires_grad_() for each in maps]


@pytest.fixture
def _small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 128)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of moves in each launch of the device code, in the order of the launches."""
    from skipcost.kernels.device import crop_concat as crop_concat_triton  # noqa: PLC0415 - needs the interpreter

    counts = []
    kernel = crop_concat_triton.place

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def place(**arguments: Any) -> None:
                counts.append(len(arguments["sources"]))
                kernel[grid](**arguments)

            return place

    monkeypatch.setattr(crop_concat_triton, "place", Recorder())
    return counts


def test_one_launch_writes_all_maps(moved: list[int]) -> None:
    """Six maps are one launch of the kernel, so the checks of this file are about the kernel."""
    maps = make_maps(Shapes(2, ((3, 5, 6),) * 5 + ((2, 4, 4),), ("contiguous",) * 6, torch.float32))

    crop_concat(maps)

    assert moved == [6]


def test_one_launch_writes_the_gradients_of_the_cropped_maps(moved: list[int]) -> None:
    """Of four maps, two cropped and wanted: backwards they are one launch; the others are views or not wanted."""
    maps = make_maps(Shapes(2, ((3, 5, 6), (2, 4, 7), (2, 4, 4), (1, 9, 9)), ("contiguous",) * 4, torch.float32))
    wanted = differentiable(maps[:3])

    crop_concat([*wanted, maps[3]]).sum().backward()

    assert moved == [4, 2]


@settings(deadline=None, max_examples=25)
@given(shapes())
@example(Shapes(2, ((3, 9, 13), (5, 6, 8)), ("channels_last", "channels_last"), torch.bfloat16))
@example(Shapes(1, ((64, 3, 3), (130, 2, 2)), ("channels_last", "channels_last"), torch.float16))  # two runs per row
@example(Shapes(2, ((1, 3, 300), (2, 2, 290)), ("contiguous", "contiguous"), torch.float32))  # three runs per row
def test_the_result_is_the_references(case: Shapes) -> None:
    """Any sizes, strides and types, in any number: every bit and every stride is what the reference gives."""
    maps = make_maps(case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", case.tile)
        result = crop_concat(maps)

    expected = reference_ops.merge(maps, "concat")
    assert_same(result, expected)
    assert result.stride() == expected.stride()


@settings(deadline=None, max_examples=20)
@given(shapes(FLOATS), st.sampled_from(LAYOUTS))
@example(Shapes(2, ((3, 9, 13), (5, 6, 8)), ("channels_last", "channels_last"), torch.bfloat16), "channels_last")
def test_the_gradients_are_the_references(case: Shapes, layout: str) -> None:
    """Any sizes, strides and float types: every gradient has the bits of autograd's; a cropped map's is dense."""
    kernels, references = differentiable(make_maps(case)), differentiable(make_maps(case))
    expected = reference_ops.merge(references, "concat")
    grad = amid(torch.randn(expected.shape).to(case.dtype), layout, float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", case.tile)
        actual_grads = torch.autograd.grad(crop_concat(kernels), kernels, grad)

    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, references, grad), strict=True):
        assert_same(actual, wanted)


@pytest.mark.usefixtures("_small_tile")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "window"), [((2, 5, 7, 9), (3, 6)), ((2, 17, 4, 5), (4, 5)), ((1, 3, 1, 40), (1, 33))]
)
def test_nothing_is_written_beside_the_target(shape: tuple[int, ...], window: tuple[int, int], layout: str) -> None:
    """Sentinels round the target stay, and all of the target is written: sizes that the tile does not divide."""
    n, c, *size = shape
    source = torch.randn(n, c, *window)
    target = amid(torch.full(shape, 7e7), layout, 7e7)
    top, left = (size[0] - window[0]) // 2, (size[1] - window[1]) // 2
    expected = torch.zeros(shape)
    expected[..., top : top + window[0], left : left + window[1]] = source

    run(launches([Move(source, target, -top, -left)]))

    assert_same(target, expected)
    everything = target.as_strided((target.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int((everything == 7e7).sum()) == everything.numel() - target.numel()


@pytest.mark.parametrize("remainder", [0, 1, 2, 3, 4, 5])
def test_odd_remainders_crop_as_the_paper_does(remainder: int) -> None:
    """The window starts at remainder // 2: what is left over is cut at the bottom and on the right."""
    large = torch.arange(float((4 + remainder) ** 2)).view(1, 1, 4 + remainder, 4 + remainder)
    start = remainder // 2

    result = crop_concat([large, torch.zeros(1, 1, 4, 4)])

    assert torch.equal(result[0, 0], large[0, 0, start : start + 4, start : start + 4])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values_keep_their_bits(dtype: torch.dtype) -> None:
    """NaN, infinities, -0.0 and subnormals go through, forwards and backwards."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, tiny, -tiny], dtype=dtype)
    maps = [special.view(1, 1, 1, 6).expand(2, 3, 4, 6).clone().requires_grad_() for _ in range(2)]
    large = special.roll(2).view(1, 1, 1, 6).repeat(2, 1, 5, 2).requires_grad_()

    result = crop_concat([*maps, large])
    grads = torch.autograd.grad(result, [*maps, large], result.detach().flip(3))

    expected = reference_ops.merge([*maps, large], "concat")
    assert_same(result, expected)
    for actual, wanted in zip(
        grads, torch.autograd.grad(expected, [*maps, large], expected.detach().flip(3)), strict=True
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        ((3, 1, 1), (4, 1, 1)),
        ((1, 5, 6), (1, 4, 4)),
        ((1, 5, 1), (1, 4, 1)),
        ((2, 1, 7), (1, 3, 5)),
        ((0, 3, 3), (2, 3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "layouts", [("channels_last",) * 2, ("contiguous",) * 2, ("channels_last", "contiguous")], ids=str
)
def test_ambiguous_layouts_follow_torch_cat(sizes: tuple[tuple[int, int, int], ...], layouts: tuple[str, ...]) -> None:
    """With one channel, one pixel or one row, strides fit two memory formats; the result has torch.cat's."""
    maps = make_maps(Shapes(2, sizes, layouts, torch.float32))

    result = crop_concat(maps)

    expected = reference_ops.merge(maps, "concat")
    assert_same(result, expected)
    assert result.stride() == expected.stride()


def test_a_gradient_keeps_the_memory_format_of_its_map() -> None:
    """A cropped channels_last map gets a channels_last gradient, and no convolution behind it has to convert."""
    maps = make_maps(
        Shapes(2, ((3, 6, 7), (2, 4, 7), (2, 4, 4)), ("channels_last", "contiguous", "contiguous"), torch.half)
    )
    first, second, _ = differentiable(maps)

    grads = torch.autograd.grad(crop_concat([first, second, maps[2]]).sum(), [first, second])

    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert grads[1].is_contiguous()


def test_no_launch_where_nothing_is_written(moved: list[int]) -> None:
    """An empty batch has an empty result, forwards and backwards, without a launch."""
    maps = differentiable(make_maps(Shapes(0, ((3, 6, 7), (2, 4, 4)), ("contiguous",) * 2, torch.float32)))

    crop_concat(maps).sum().backward()

    assert moved == []
    assert maps[0].grad is not None
    assert maps[0].grad.shape == (0, 3, 6, 7)


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("far", ["read", "written"])
def test_offsets_beyond_31_bits(axis: int, far: str) -> None:
    """Images, rows or columns that lie so far apart that only a product of 64 bits finds the last of them."""
    near = torch.arange(120, dtype=torch.int8).view(3, 2, 4, 5).contiguous(memory_format=torch.channels_last)
    empty = torch.zeros_like(near)
    source = far_apart(near, axis) if far == "read" else near
    target = far_apart(empty, axis) if far == "written" else empty

    (launch,) = launches([Move(source, target, 0, 0)])
    run([launch])

    assert torch.equal(target, near)
    assert launch.constants["wide"]


def test_gradcheck_passes_in_float64() -> None:
    """The gradients agree with finite differences of the kernel itself."""
    maps = differentiable(make_maps(Shapes(1, ((1, 3, 3), (1, 2, 4)), ("contiguous", "channels_last"), torch.float64)))

    assert torch.autograd.gradcheck(lambda *each: crop_concat(each), maps, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize(
    ("layout", "wanted"), [("contiguous", ()), ("channels_last", (0,)), ("contiguous", (0, 1, 2))], ids=str
)
def test_opcheck_passes(layout: str, wanted: tuple[int, ...]) -> None:
    """Schema, fake tensors, autograd and tracing of the op are sound, with and without gradients."""
    maps = make_maps(Shapes(2, ((3, 6, 7), (2, 4, 7), (2, 4, 4)), (layout,) * 3, torch.float32))
    maps = [each.clone().requires_grad_(index in wanted) for index, each in enumerate(maps)]

    torch.library.opcheck(torch.ops.skipcost.crop_concat.default, (maps,))


def test_opcheck_passes_backwards() -> None:
    """The op that writes the gradients is sound too."""
    grad = torch.randn(2, 5, 4, 4)

    torch.library.opcheck(
        torch.ops.skipcost.crop_concat_backward.default, (grad, [0, 3], [3, 2], [6, 4], [7, 7], [True, False])
    )


OURS = REFERENCE.replacing(join=lambda step, _, maps: merge(maps, step.op.how))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_has_the_references_bits(variant: str, moved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel in it, a network that crops every skip gives and learns the reference's bits."""
    monkeypatch.setattr(module, "TILE", 1 << 15)  # the interpreter's time goes by programs, whatever their size
    spec = ModelSpec(variant=variant, depth=2, width=3, padding="valid")
    network, reference = build(spec, OURS), build(spec)
    network.load_state_dict(reference.state_dict())
    image = torch.randn(1, 1, 44, 44)

    result, expected = network(image), reference(image)
    for output in (result, expected):
        output.square().sum().backward()

    assert moved
    assert_same(result, expected)
    for actual, wanted in zip(network.parameters(), reference.parameters(), strict=True):
        assert actual.grad is not None
        assert wanted.grad is not None
        assert_same(actual.grad, wanted.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_channels_last_network_has_the_references_bits(
    variant: str, moved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that GPUs run in; forwards only, since autograd's NCHW gradients let convolutions round otherwise."""
    monkeypatch.setattr(module, "TILE", 1 << 15)
    spec = ModelSpec(variant=variant, depth=2, width=3, padding="valid")
    network, reference = build(spec, OURS), build(spec)
    network.load_state_dict(reference.state_dict())
    image = torch.randn(1, 1, 44, 44).contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        result, expected = network(image), reference(image)

    assert moved
    assert_same(result, expected)
