"""Counts, sizes and receptive fields worked out on the graph, against networks that really run.

Parameters and MACs have two or three independent witnesses each: the built module, torch's counter on the meta
device, fvcore on real tensors, closed forms. A receptive field is read from gradients.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from model_cells import by_label, maps_of
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.unet_models import REFERENCE, SKIPS, VARIANTS, ModelSpec, build, graph, lower, sizes
from skipcost.unet_models.ops import Step
from skipcost.unet_models.spec import CHOICES, MAX_DEPTH

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CELL = 6  # specs drawn for each cell of VARIANTS x SKIPS
AXES: dict[str, tuple[Any, ...]] = {
    "depth": (1, 1, 2, 2, 3, 4),
    "width": (2, 3),  # an odd one too: a gate's inside width is rounded
    "in_channels": (1, 3),
    "classes": (1, 2),
    "padding": CHOICES["padding"],
    "max_width": (None, 6),
    "norm": CHOICES["norm"],
    "bias": (True, False),
    "upsample": CHOICES["upsample"],
    "head": CHOICES["head"],
    "pruned_to": (None, None, 1, 2),
}


def _drawn(variant: str, skip: str, generator: random.Random) -> list[ModelSpec]:
    """Draw specs of one cell until enough of them are valid and different."""
    found: dict[ModelSpec, None] = {}
    while len(found) < PER_CELL:
        values = {name: generator.choice(options) for name, options in AXES.items()}
        try:
            found[ModelSpec(variant=variant, skip=skip, **values)] = None
        except ValueError:
            continue
    return list(found)


def _grid() -> list[tuple[ModelSpec, int, int]]:
    """Specs with an odd input size each, at which the deepest map keeps more than the one pixel that a norm refuses."""
    generator = random.Random(0)  # noqa: S311 - a reproducible draw of test cases
    cases = []
    for variant, skip in itertools.product(VARIANTS, SKIPS):
        for spec in _drawn(variant, skip, generator):
            least = sizes.smallest_size(lower(graph(spec))) + 2**spec.depth
            height, width = ((least + generator.randrange(2**spec.depth)) | 1 for _ in range(2))
            cases.append((spec, height, width))
    return cases


GRID = _grid()


def _name(case: tuple[ModelSpec, int, int]) -> str:
    spec, height, width = case
    return f"{spec.label}@{height}x{width}"


def _quiet(analysis: JitModelAnalysis) -> JitModelAnalysis:
    """Silence fvcore through its own switches: it names every op that it does not count."""
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def test_the_grid_holds_every_choice() -> None:
    """At least 100 networks, and every value of every axis in each of them that can have it."""
    specs = [spec for spec, _, _ in GRID]

    values = {(name, getattr(spec, name)) for spec in specs for name in AXES}

    assert len(specs) >= 100
    assert {(name, option) for name, options in AXES.items() for option in options} <= values


@pytest.mark.parametrize(("spec", "height", "width"), GRID, ids=[_name(case) for case in GRID])
def test_every_count_is_what_its_witnesses_see(spec: ModelSpec, height: int, width: int) -> None:
    """The built module's parameters, torch's FLOPs, which are two for a MAC, and the size that comes out."""
    with torch.device("meta"):
        net, image = build(spec).eval(), torch.empty(1, spec.in_channels, height, width)
    with FlopCounterMode(display=False) as counter:
        maps = maps_of(net, image)

    network = graph(spec)

    assert network.params() == sum(parameter.numel() for parameter in net.parameters())
    assert 2 * network.conv_macs(height, width) == counter.get_total_flops()
    assert {network.output_size(height, width)} == {(each.shape[2], each.shape[3]) for each in maps}


@pytest.mark.parametrize(("spec", "height", "width"), GRID[::3], ids=[_name(case) for case in GRID[::3]])
def test_convolutions_are_those_that_fvcore_counts(spec: ModelSpec, height: int, width: int) -> None:
    """A MAC once, by operator; activations are the outputs of convolutions, for there are no matrix products."""
    net, image = build(spec).eval(), torch.rand(1, spec.in_channels, height, width)

    network = graph(spec)

    assert network.conv_macs(height, width) == _quiet(FlopCountAnalysis(net, image)).by_operator()["conv"]
    assert network.activations(height, width) == _quiet(ActivationCountAnalysis(net, image)).total()


def _double(in_channels: int, out_channels: int) -> int:
    """Parameters of two 3x3 convolutions with biases and batch norms."""
    return 9 * out_channels * (in_channels + out_channels) + 6 * out_channels


def _unet_params(w: list[int], in_channels: int, classes: int) -> int:
    encoder = sum(_double(source, target) for source, target in itertools.pairwise([in_channels, *w]))
    ups = sum(4 * deeper * own + own for own, deeper in itertools.pairwise(w))
    return encoder + ups + sum(_double(2 * own, own) for own in w[:-1]) + (w[0] + 1) * classes


def _plus_plus_params(w: list[int], in_channels: int, classes: int) -> int:
    total = _unet_params(w, in_channels, classes)
    for level, own in enumerate(w[:-1]):
        columns = range(2, len(w) - level)  # the first decoder node of a level is U-Net's
        total += sum(4 * w[level + 1] * own + own + _double((column + 1) * own, own) for column in columns)
    return total


def _three_plus_params(w: list[int], in_channels: int, classes: int) -> int:
    n, fused = len(w), len(w) * w[0]
    total = sum(_double(source, target) for source, target in itertools.pairwise([in_channels, *w]))
    for level in range(n - 1):
        sources = [*w[: level + 1], *[fused] * (n - 2 - level), w[-1]]
        total += sum(9 * source * w[0] + 3 * w[0] for source in sources) + 9 * fused * fused + 3 * fused
    return total + (9 * fused + 1) * classes


CLOSED_FORMS = {"unet": _unet_params, "unet++": _plus_plus_params, "unet3+": _three_plus_params}


@pytest.mark.parametrize("max_width", [None, 40])
@pytest.mark.parametrize("depth", range(1, MAX_DEPTH + 1))
@pytest.mark.parametrize("variant", CLOSED_FORMS)
def test_params_equal_the_closed_form(variant: str, depth: int, max_width: int | None) -> None:
    """Written from the papers, level by level, at every depth and with capped widths."""
    spec = ModelSpec(variant, depth, 5, in_channels=3, classes=4, max_width=max_width)
    widths = [min(5 * 2**level, max_width or 5 * 2**level) for level in range(depth + 1)]

    params = graph(spec).params()

    assert params == CLOSED_FORMS[variant](widths, 3, 4)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_conv_macs_of_a_padded_network_scale_with_the_area(variant: str, skip: str) -> None:
    """Twice the height and three times the width cost six times as much."""
    network = graph(ModelSpec(variant, 3, 6, skip))

    small, large = network.conv_macs(16, 24), network.conv_macs(32, 72)

    assert large == 6 * small


@pytest.mark.parametrize("level", range(1, 5))
def test_every_encoder_level_of_a_doubling_network_costs_the_same(level: int) -> None:
    """Half the pixels each way, twice the channels each way: the MACs stay."""
    network = graph(ModelSpec())
    placed = list(sizes.placed(lower(network), (256, 256)))

    conv_macs = [sum(each.macs for each in placed if each.owner == owner) for owner in ("x1_0", f"x{level}_0")]

    assert conv_macs[0] == conv_macs[1]


CELLS = [(variant, skip, up) for variant in VARIANTS for skip in SKIPS for up in VARIANTS[variant].upsamples]
FIELDS = [
    ModelSpec(variant, 1 + at % 3, 1, skip, classes=1, norm="none", upsample=upsample)
    for at, (variant, skip, upsample) in enumerate(CELLS)
]


def _average(step: Step, _: list[Any], maps: list[Any]) -> Tensor:
    return functional.avg_pool2d(maps.pop(), step.op.factor, ceil_mode=step.op.how == "ceil")


def _seen_rows(spec: ModelSpec, extent: int) -> list[tuple[int, int]]:
    """First and last input row that an output row depends on, for one output row of every phase.

    Every weight is positive and every bias 0, so that no two paths cancel and no ReLU closes, and pooling averages, so
    that every pixel of a window counts: a gradient is 0 only where there is no path.
    """
    net = build(spec, REFERENCE.replacing(pool=_average)).double().requires_grad_(False)
    for name, parameter in net.named_parameters():
        parameter.fill_(0.0 if name.endswith("bias") else 1 / parameter[0].numel())
    phases = 2**spec.depth
    images = torch.ones(phases, 1, extent, phases, dtype=torch.float64, requires_grad=True)  # one image for each phase
    rows = net(images)[:, 0, extent // 2 :, :].sum(2)  # (phases, extent / 2)
    rows.diagonal().sum().backward()
    assert images.grad is not None
    touched = [each.nonzero()[:, 0] for each in images.grad.abs().sum((1, 3))]
    return [(int(each[0]), int(each[-1])) for each in touched]


@by_label(FIELDS)
def test_the_receptive_field_is_what_gradients_reach(spec: ModelSpec) -> None:
    """The widest span, over the phases of the output grid, of the input rows on which an output row depends."""
    extent = 256

    seen = _seen_rows(spec, extent)

    assert min(first for first, _ in seen) > 0, "the image is too small to show the whole field"
    assert max(last for _, last in seen) < extent - 1, "the image is too small to show the whole field"
    assert graph(spec).receptive_field() == max(last - first + 1 for first, last in seen)
