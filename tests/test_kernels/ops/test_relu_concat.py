"""`relu_concat` against ReLU of each map and a concatenation: same bits, forwards and backwards, and fewer bytes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from dataclasses import replace
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipcost.kernels.ops.relu_concat import relu_concat
from skipcost.kernels.programs.low import relu_joins
from skipcost.kernels.recompute import saved_bytes
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models import REFERENCE, SKIPS, ModelSpec, build
from skipcost.unet_models.ops import crop_all

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Sides = list[tuple[int, int, int]]  # channels, height, width of each map


def _maps(sides: Sides, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sides))
    made = (torch.randn(2, *side, generator=generator, dtype=torch.float64).to(dtype) for side in sides)
    return [each.to(memory_format=LAYOUTS[layout]) for each in made]


def _shape(maps: list[Tensor]) -> tuple[int, int, int]:
    height, width = (min(each.shape[axis] for each in maps) for axis in (2, 3))
    return sum(each.shape[1] for each in maps), height, width


def _expected(maps: list[Tensor]) -> Tensor:
    return torch.cat(crop_all([each.relu() for each in maps]), 1)


sides_strategy = st.lists(st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7)), min_size=1, max_size=5)


@given(sides_strategy, st.sampled_from(sorted(LAYOUTS)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_relu_and_a_concatenation(sides: Sides, layout: str, dtype: torch.dtype) -> None:
    """To the bit, with gradients and without, whatever the sizes that are cropped."""
    maps = _maps(sides, layout, dtype)
    leaves, others = ([each.clone().requires_grad_() for each in maps] for _ in range(2))

    with torch.no_grad():
        plain = relu_concat(iter(maps), _shape(maps))
    result = relu_concat(iter(leaves), _shape(maps))

    expected = _expected(others)
    above = torch.randn(expected.shape).to(dtype)
    result.backward(above)
    expected.backward(above)
    assert torch.equal(plain, expected)
    assert torch.equal(result, expected)
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(leaves, others, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(5, 6), (4, 6), (5, 5)])
def test_its_layout_is_that_of_a_concatenation(layout: str, size: tuple[int, int]) -> None:
    """Of cropped maps as well, in either way; so a convolution behind has nothing to lay out anew."""
    maps = _maps([(3, 5, 6), (2, *size)], layout)

    results = [relu_concat(maps, _shape(maps))]
    with torch.no_grad():
        results.append(relu_concat(maps, _shape(maps)))

    assert {each.stride() for each in results} == {_expected(maps).stride()}


def test_gradients_agree_with_finite_differences() -> None:
    """Twice differentiable, of a crop too; a map that asks for no gradient gets none."""
    maps = _maps([(2, 4, 3), (1, 3, 3)], dtype=torch.float64)
    leaves = [each.requires_grad_() for each in maps]
    fixed = _maps([(2, 4, 3)], dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda *each: relu_concat(each, _shape(leaves)), leaves)
    assert torch.autograd.gradgradcheck(lambda *each: relu_concat(each, _shape(leaves)), leaves)
    relu_concat([*fixed, leaves[0]], (4, 4, 3)).sum().backward()
    assert fixed[0].grad is None


def test_one_buffer_is_all_that_is_kept() -> None:
    """Where eager keeps each map and the concatenation of them, in front of a convolution."""
    sides, weight = [(3, 8, 8), (5, 8, 8)], torch.randn(2, 8, 1, 1, requires_grad=True)
    leaves = [each.requires_grad_() for each in _maps(sides)]
    total = sum(each.nbytes for each in leaves)

    def kept(joined: Tensor) -> Tensor:
        return torch.conv2d(joined, weight)

    assert saved_bytes(lambda: kept(relu_concat((each * 1 for each in leaves), (8, 8, 8)))) == total
    assert saved_bytes(lambda: kept(_expected([each * 1 for each in leaves]))) == 2 * total


def test_a_map_is_dropped_before_the_next_is_made() -> None:
    """Without gradients; each is asked for once the one before is gone."""
    seen: list[ref[Tensor]] = []

    def arriving() -> Iterator[Tensor]:
        for each in range(4):
            gc.collect()
            assert all(before() is None for before in seen)
            made = [torch.full((1, 2, 3, 3), float(each))]
            seen.append(ref(made[0]))
            yield made.pop()

    with torch.no_grad():
        result = relu_concat(arriving(), (8, 3, 3))

    assert len(seen) == 4
    assert torch.equal(result[0, ::2, 0, 0], torch.arange(4.0))


@pytest.mark.parametrize("channels", [4, 7])
def test_maps_that_do_not_fill_the_result_are_refused(channels: int) -> None:
    """No uninitialised memory is handed out."""
    maps = _maps([(2, 3, 3), (3, 3, 3)])

    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"of 5 channels in all|start .* length"):
        relu_concat(maps, (channels, 3, 3))


ALONE = replace(REFERENCE.replacing(relu_join=RewrittenOps().ops().functions["relu_join"]), rewrite=relu_joins)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("skip", SKIPS)
def test_a_network_with_it_is_the_reference_to_the_bit(skip: str, padding: str) -> None:
    """As the only op replaced: outputs and all gradients, sizes that are cropped, in training."""
    spec = ModelSpec("unet3+", 2, 3, skip, padding=padding, head="deep")
    net, reference = build(spec, ALONE), build(spec)
    reference.load_state_dict(net.state_dict())
    image = torch.randn(2, 1, *((61, 66) if padding == "valid" else (21, 18)))

    outputs, expected = net(image), reference(image)
    sum(each.square().sum() for each in outputs).backward()
    sum(each.square().sum() for each in expected).backward()

    assert all(map(torch.equal, outputs, expected))
    gradients = ([each.grad for each in model.parameters()] for model in (net, reference))
    assert all(map(torch.equal, *gradients))
    assert all(map(torch.equal, net.buffers(), reference.buffers()))


def test_layers_are_left_as_they_are() -> None:
    """Leaving ReLU out of an edge is for that call: the layer, its copies and its file still have it."""
    net = build(ModelSpec("unet3+", 2, 3), RewrittenOps().ops()).eval()
    image = torch.randn(1, 1, 12, 12)
    before = net(image)

    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]  # noqa: S301 - our own

    assert all(each.conv.act for each in net.edges.values() if each.conv)
    assert all(torch.equal(each(image), before) for each in (net, *copies))


def test_a_compiled_network_runs_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler joins them itself; in one graph, as before."""
    monkeypatch.setattr("skipcost.kernels.ops.relu_concat._fill", None)
    net = build(ModelSpec("unet3+", 1, 2), ALONE).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)

    assert compiled(torch.randn(1, 1, 8, 8)).shape == (1, 2, 8, 8)
