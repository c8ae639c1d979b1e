"""Sizes: the crop rule, sizes that work and sizes that do not, and what is said about them beforehand."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from model_cells import by_label, cells, label_of, maps_of

from skipcost.unet_models import VARIANTS, ModelSpec, build, graph, lower, sizes
from skipcost.unet_models.ops import crop, crop_all
from skipcost.unet_models.spec import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("extent", "wanted", "first"), [(5, 3, 1), (5, 2, 1), (4, 3, 0), (7, 2, 2), (6, 6, 0), (8, 1, 3)]
)
def test_a_crop_starts_at_half_of_what_is_lost(extent: int, wanted: int, first: int) -> None:
    """Rounded down: an odd row goes at the far side."""
    image = torch.arange(float(extent * 10)).view(1, 1, extent, 10)

    cut = crop(image, wanted, 10)

    assert torch.equal(cut, image[:, :, first : first + wanted, :])


def test_maps_are_cropped_to_the_smallest_each_way() -> None:
    """Height and width come from different maps where these are the smallest."""
    maps = [torch.zeros(1, 1, 6, 9), torch.zeros(1, 2, 8, 4), torch.zeros(1, 3, 7, 7)]

    cropped = crop_all(maps)

    assert [tuple(each.shape) for each in cropped] == [(1, 1, 6, 4), (1, 2, 6, 4), (1, 3, 6, 4)]


@by_label(cells((4,)))
def test_an_odd_size_comes_out_as_a_multiple(spec: ModelSpec) -> None:
    """100x75 at depth 4 is 96x64, the largest multiples of 16, and the graph says so beforehand."""
    net = build(spec).eval()

    maps = maps_of(net, torch.randn(1, 1, 100, 75))

    assert {tuple(each.shape[2:]) for each in maps} == {(96, 64)}
    assert graph(spec).output_size(100, 75) == (96, 64)


SIZED = [
    ModelSpec(variant, depth, 1, skip, classes=1, padding=padding, norm="none", head=VARIANTS[variant].heads[-1])
    for variant, skip, padding in itertools.product(VARIANTS, ("concat", "gated", "none"), CHOICES["padding"])
    for depth in (1, 3)
]


@by_label(SIZED)
def test_the_smallest_size_runs(spec: ModelSpec) -> None:
    """At the least size every map has a pixel, the output too."""
    side = sizes.smallest_size(lower(graph(spec)))

    maps = maps_of(build(spec), torch.randn(1, 1, side, side + 1))

    assert {tuple(each.shape[2:]) for each in maps} == {graph(spec).output_size(side, side + 1)}
    assert all(each.numel() for each in maps)


@by_label(SIZED)
def test_one_pixel_less_than_the_smallest_size_does_not_run(spec: ModelSpec) -> None:
    """The least size is not merely safe: PyTorch itself refuses the next smaller one."""
    side = sizes.smallest_size(lower(graph(spec))) - 1

    with pytest.raises(RuntimeError, match=r"(?i)output size is too small|kernel size|negative|non-empty|expected"):
        build(spec)(torch.randn(1, 1, side, side))


@by_label(SIZED)
def test_a_size_too_small_is_refused_with_sizes_that_run(spec: ModelSpec) -> None:
    """One pixel below the least size; every size that the message names is executed."""
    least = sizes.smallest_size(lower(graph(spec)))
    wording = rf"^an input of {least - 1}x{least + 3} leaves no pixel at .*: this network needs at least {least} pixels"

    with pytest.raises(ValueError, match=wording) as refusal:
        graph(spec).output_size(least - 1, least + 3)

    named = [(int(y), int(x)) for y, x in re.findall(r"(\d+)x(\d+)", str(refusal.value))][1:]
    assert named[0] == (least, least + 3)
    for height, width in named:
        maps = maps_of(build(spec), torch.randn(1, 1, height, width))
        assert tuple(maps[0].shape[2:]) == graph(spec).output_size(height, width)
    assert sizes.size_note(lower(graph(spec)), named[-1]) == ""


@by_label(SIZED)
def test_every_size_above_the_smallest_works(spec: ModelSpec) -> None:
    """The least size is a limit, without gaps above it."""
    least = sizes.smallest_size(lower(graph(spec)))

    outputs = [min(graph(spec).output_size(side, side)) for side in range(least, least + 40)]

    assert outputs == sorted(outputs)
    assert outputs[0] >= 1


def test_a_network_too_deep_for_any_image_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a size ends."""
    monkeypatch.setattr(sizes, "SEARCH_LIMIT", 64)

    with pytest.raises(ValueError, match="no input of up to 64 pixels keeps every map of this network"):
        sizes.smallest_size(lower(graph(ModelSpec(padding="valid"))))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(32, 48), (16, 16), (160, 64)])
def test_a_size_without_loss_has_no_note(variant: str, size: tuple[int, int]) -> None:
    """Multiples of 2**depth pass through."""
    network = graph(ModelSpec(variant))

    assert sizes.size_note(lower(network), size) == ""
    assert network.output_size(*size) == size


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("size", "output", "padded"), [((100, 75), (96, 64), (112, 80)), ((64, 65), (64, 64), (64, 80))]
)
def test_a_size_with_loss_is_noted(
    variant: str, size: tuple[int, int], output: tuple[int, int], padded: tuple[int, int]
) -> None:
    """The note names what comes out, and the next size at which nothing is dropped."""
    note = sizes.size_note(lower(graph(ModelSpec(variant))), size)

    (height, width), (y, x), (padded_y, padded_x) = size, output, padded
    assert note.startswith(f"{height}x{width} gives {y}x{x}: pooling drops a row or column of an odd map")
    assert note.endswith(f"pad to {padded_y}x{padded_x} to avoid it")


def test_the_valid_network_is_lossless_at_the_papers_sizes() -> None:
    """12 mod 16, from 188 on; 572 among them."""
    network = graph(ModelSpec(padding="valid"))

    lossless = [side for side in range(188, 580) if not sizes.size_note(lower(network), (side, side))]

    assert lossless == list(range(188, 580, 16))


def _runs(spec: ModelSpec, case: tuple[int, int, int], *, training: bool) -> bool:
    """Whether PyTorch normalises every map of a network at this (batch, height, width)."""
    batch, height, width = case
    try:
        build(spec).train(training)(torch.randn(batch, spec.in_channels, height, width))
    except ValueError as refusal:
        assert "Expected more than 1" in str(refusal)  # noqa: PT017 - its wording tells it from an error of ours
        return False
    return True


NORMED = [
    ModelSpec(variant, 3, width, skip, norm=norm)
    for variant, norm, skip, width in itertools.product(VARIANTS, CHOICES["norm"], ("concat", "gated"), (4, 5, 8))
]
BATCHES = list(itertools.product((1, 2), ((8, 8), (8, 16)), (False, True)))  # images, their size, whether in training


@pytest.mark.parametrize(
    ("spec", "batch", "size", "training"),
    [(spec, *BATCHES[(3 * at + more) % len(BATCHES)]) for at, spec in enumerate(NORMED) for more in range(3)],
    ids=label_of,
)
def test_a_note_says_where_pytorch_refuses_a_norm(
    spec: ModelSpec, batch: int, size: tuple[int, int], *, training: bool
) -> None:
    """Over the one pixel of the deepest map of 8x8, and only there; at these widths groups have 1, 5 and 2 channels."""
    case = (batch, *size)

    note = sizes.norm_note(lower(graph(spec)), batch, size, training=training)

    assert bool(note) == (not _runs(spec, case, training=training))


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("norm", [norm for norm in CHOICES["norm"] if norm != "none"])
def test_what_a_norms_note_advises_works(norm: str, width: int) -> None:
    """Each remedy that is named: another size, a larger batch, group norm."""
    spec = ModelSpec("unet", 3, width, norm=norm)

    note = sizes.norm_note(lower(graph(spec)), 1, (8, 8), training=True)

    assert not note or "use 16x16" in note
    assert _runs(spec, (1, 16, 16), training=True)
    assert "a batch of 2 or more" not in note or _runs(spec, (2, 8, 8), training=True)
    assert "norm=group" not in note or _runs(replace(spec, norm="group"), (1, 8, 8), training=True)


def test_a_norms_note_says_what_where_and_why() -> None:
    """All on one line."""
    note = sizes.norm_note(lower(graph(ModelSpec())), 1, (16, 16), training=True)

    assert note == (
        "batch norm at x4_0 would normalise over a single value, because 16x16 leaves a 1x1 map there; "
        "use 32x32, a batch of 2 or more, or norm=group"
    )
