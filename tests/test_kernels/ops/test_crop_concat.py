"""`crop_concat` as an op: what it refuses, what it leaves to the reference, and what tracing sees of it.

The kernel behind it is checked in the two files beside this one: `..._interpreted.py` and `..._compiled.py`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from skipcost.kernels.ops import crop_concat as module
from skipcost.kernels.ops.crop_concat import crop_concat, like_channels_last, merge
from skipcost.kernels.ops.launch import Launch
from skipcost.unet_models import ops as reference

LARGE, MIDDLE, SMALL = (2, 3, 7, 9), (2, 1, 4, 6), (2, 2, 4, 5)
FORMATS = (torch.contiguous_format, torch.channels_last)


def _maps(memory_format: torch.memory_format, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    maps = [torch.randn(shape, device=device) for shape in (LARGE, MIDDLE, SMALL)]
    return [each.to(memory_format=memory_format).requires_grad_() for each in maps]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_neither_torch_nor_triton_nor_a_gpu_is_needed() -> None:
    """The package needs no torch, and where triton is missing ops run as the reference, and oracles are there too."""
    program = """
import sys
sys.modules["triton"] = None
import skipcost.kernels
assert "torch" not in sys.modules
import torch
from skipcost.kernels.ops.crop_concat import crop_concat
from skipcost.kernels.ops.conv_bn_relu import conv_bn_relu, conv_bn_relu_pool
from skipcost.kernels.verify import canaries, exact
assert crop_concat([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)]).shape == (1, 2, 2, 2)
x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
assert torch.equal(conv_bn_relu(x, weight, None, None, padding=0), torch.full((1, 3, 2, 2), 18.0))
assert conv_bn_relu_pool(x, weight, None, None, padding=0)[1].shape == (1, 3, 1, 1)
right = exact.conv([canaries.amid(x, "window")], weight, padding=0)
assert exact.worst(torch.full((1, 3, 2, 2), 18.0), right.value, exact.allowed(right, torch.float32)) == 0
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_cpu_runs_the_reference(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter nothing is launched on a CPU, and output and gradients are the reference's."""

    def refuse(launches: Sequence[Launch]) -> None:
        pytest.fail(f"launched {launches}")

    monkeypatch.setattr(module, "run", refuse)
    maps, references = _maps(memory_format), _maps(memory_format)

    result, expected = crop_concat(maps), reference.merge(references, "concat")

    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()
    grad = torch.randn_like(result)
    for actual, wanted in zip(
        torch.autograd.grad(result, maps, grad), torch.autograd.grad(expected, references, grad), strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, torch 2.15
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck_passes_on_the_reference(memory_format: torch.memory_format) -> None:
    """Schema, fake tensors, autograd and tracing of both ops are sound where the reference runs."""
    grad = torch.randn(2, 6, 4, 5).to(memory_format=memory_format)

    torch.library.opcheck(torch.ops.skipcost.crop_concat.default, (_maps(memory_format),))
    torch.library.opcheck(
        torch.ops.skipcost.crop_concat_backward.default, (grad, [0, 3], [3, 1], [7, 4], [9, 6], [True, False])
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_meta_tensors_have_the_layouts_of_real_ones(memory_format: torch.memory_format) -> None:
    """Without memory or data, output and gradients have the shapes and strides that a CPU gives them."""
    maps, real_maps = _maps(memory_format, "meta"), _maps(memory_format)

    result, real = crop_concat(maps), crop_concat(real_maps)

    assert (result.shape, result.stride(), result.device.type) == (real.shape, real.stride(), "meta")
    grads = torch.autograd.grad(result, maps, torch.empty_like(result))
    real_grads = torch.autograd.grad(real, real_maps, torch.empty_like(real))
    assert [(each.shape, each.stride()) for each in grads] == [(each.shape, each.stride()) for each in real_grads]


def test_the_memory_format_is_torch_cats() -> None:
    """For every map of sizes 1 and 2 and strides from 0 to 8, sensible or not, the rule is the one of torch.cat."""
    storage = torch.zeros(40)

    for shape in itertools.product((1, 2), repeat=4):
        for strides in itertools.product((0, 1, 2, 4, 8), repeat=4):
            x = storage.as_strided(shape, strides)
            expected = torch.cat([x, x], 1)
            ours = torch.empty(expected.shape, memory_format=FORMATS[like_channels_last(x)])
            assert ours.stride() == expected.stride(), (shape, strides)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")  # Dynamo's own, on Python 3.13.0
def test_compiled_code_calls_the_op_without_a_break() -> None:
    """torch.compile traces through the checks of the maps to the op and its gradients in one graph."""
    maps = _maps(torch.channels_last)
    program = torch.compile(lambda *each: crop_concat(each) * 2, backend="aot_eager", fullgraph=True)

    result = program(*maps)

    assert torch.equal(result, reference.merge(maps, "concat") * 2)
    (grad,) = torch.autograd.grad(result.sum(), maps[:1])
    assert int(grad.sum()) == 2 * result[:, : LARGE[1]].numel()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], r"crop_concat got no maps: give it at least one of shape \(N, C, H, W\)"),
        ([torch.ones(1, 2, 3, 4), torch.ones(2, 3, 4)], r"map 1 .* has shape \(2, 3, 4\): every map must be"),
        ([torch.ones(1, 2, 3, 4), torch.ones(3, 2, 3, 4)], "map 1 .* has batch size 3, map 0 has 1: all maps must"),
        (
            [torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half()],
            "map 1 .* is torch.float16 on cpu, map 0 is torch.fl",
        ),
        ([torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, device="meta")], "float32 on meta, map 0 is torch.float32 on"),
        (
            [torch.ones(1, 2, 3, 4, dtype=torch.cfloat)],
            "map 0 .* is torch.complex64, which .* accepted: float32, float1",
        ),
    ],
    ids=["none", "rank", "batch", "type", "device", "complex"],
)
def test_maps_that_do_not_fit_are_refused(maps: list[Tensor], message: str) -> None:
    """One sentence says which map, what it is, and what is needed, before anything is launched."""
    with pytest.raises(ValueError, match=message):
        crop_concat(maps)


def test_a_single_map_is_returned_as_it_is() -> None:
    """There is nothing to crop it to or to join it with, and the reference does not copy it either."""
    (only,) = _maps(torch.contiguous_format)[:1]

    assert merge([only], "concat") is only


def test_other_merges_are_the_references() -> None:
    """A sum is no business of this kernel."""
    maps = [torch.randn(1, 2, 5, 5), torch.randn(1, 2, 3, 4)]

    assert torch.equal(merge(maps, "sum"), reference.merge(maps, "sum"))


def test_maps_of_different_types_take_the_reference_loudly() -> None:
    """Autocast leaves such maps behind group norm; the kernel does not convert, and a warning says who did."""
    maps = [torch.randn(1, 2, 5, 5), torch.randn(1, 2, 3, 4).bfloat16()]

    with pytest.warns(RuntimeWarning, match="different types runs as the PyTorch reference"):
        result = merge(maps, "concat")

    assert torch.equal(result, reference.merge(maps, "concat"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_gives_the_references_bits(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The first skip of the 2015 network, and a map whose channels and width nothing divides."""
    shapes = ((2, 64, 568, 568), (2, 64, 392, 392), (2, 3, 393, 397))
    maps = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    maps = [each.to(memory_format=memory_format).requires_grad_() for each in maps]

    result, expected = crop_concat(maps), reference.merge(maps, "concat")

    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()
    grad = torch.randn_like(result)
    for actual, wanted in zip(
        torch.autograd.grad(result, maps, grad), torch.autograd.grad(expected, maps, grad), strict=True
    ):
        assert torch.equal(actual, wanted)
