"""`backend=rewritten`: networks whose convolutions over up-sampled maps run at low resolution, and what they cost."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cells import by_label, outputs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels import rewritten, tap_choice
from skipcost.kernels.rewritten import RewrittenOps
from skipcost.kernels.tap_axis import Axis
from skipcost.kernels.tap_choice import choose, executed_macs, rewritings
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipNet, build

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = [
    ModelSpec(variant, 2, 4, skip, upsample=upsample)
    for (variant, row), skip in itertools.product(VARIANTS.items(), SKIPS)
    for upsample in row.upsamples
]
SPECS = [
    *CELLS,
    ModelSpec("unet++", 2, 4, padding="valid", upsample="bilinear"),
    ModelSpec("unet3+", 2, 4, padding="valid"),
    ModelSpec("unet3+", 3, 4, head="deep", norm="instance"),
    ModelSpec("unet3+", 2, 4, head="guided", classes=1, bias=False),
    ModelSpec("unet", 2, 4, upsample="nearest", norm="group", bias=False),
    ModelSpec("unet++", 2, 4, upsample="bilinear", norm="none", head="deep"),
]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take tap-first wherever it can be: networks small enough for tests would be left as they are."""
    rewritten._counted.cache_clear()
    monkeypatch.setattr(rewritten, "choose", lambda *args, **given: replace(choose(*args, **given), taken=True))
    yield
    rewritten._counted.cache_clear()


def _pair(spec: ModelSpec) -> tuple[SkipNet, SkipNet]:
    torch.manual_seed(0)
    reference, network = build(spec).double(), build(spec, RewrittenOps().ops()).double()
    for name, buffer in reference.named_buffers():  # statistics as after training
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    network.load_state_dict(reference.state_dict())
    return reference, network


def _image(spec: ModelSpec, batch: int = 2) -> Tensor:
    sides = (61, 58) if spec.padding == "valid" else (13, 18)
    return torch.randn(batch, 1, *sides, dtype=torch.float64)


def _assert_equal(actual: Tensor, wanted: Tensor, name: str = "") -> None:
    torch.testing.assert_close(
        actual, wanted, rtol=0, atol=1e-12 * max(1.0, wanted.abs().max().item()), msg=name or None
    )


@pytest.mark.usefixtures("everywhere")
@by_label(SPECS)
def test_inference_is_the_references(spec: ModelSpec) -> None:
    """Every variant, skip scheme, way of up-sampling, norm, head and padding, at odd sizes; roundings of float64."""
    reference, network = (net.eval() for net in _pair(spec))
    image = _image(spec)

    with torch.inference_mode():
        results, expected = outputs_of(network(image)), outputs_of(reference(image))

    for actual, wanted in zip(results, expected, strict=True):
        _assert_equal(actual, wanted)


@pytest.mark.usefixtures("everywhere")
@by_label(SPECS)
def test_training_is_the_references(spec: ModelSpec) -> None:
    """Outputs, every gradient and every running statistic of a step."""
    reference, network = (net.train() for net in _pair(spec))
    image = _image(spec)
    results = []

    for net in (network, reference):
        torch.manual_seed(1)  # of the classifier's dropout
        results.append(outputs_of(net(image)))
        sum(each.square().mean() for each in results[-1]).backward()

    for actual, wanted in zip(*results, strict=True):
        _assert_equal(actual, wanted)
    for (name, wanted), actual in zip(reference.named_parameters(), network.parameters(), strict=True):
        scale = 1e-9 * max(1.0, wanted.grad.abs().max().item())  # batch norm divides by small variances on its way
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=0, atol=scale, msg=name)
    for (name, wanted), actual in zip(reference.named_buffers(), network.named_buffers(), strict=True):
        _assert_equal(actual[1].double(), wanted.double(), name)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_gives_the_references_types(variant: str, dtype: torch.dtype) -> None:
    """Maps and gradients are cast as the reference casts them, and are as close as 16 bits are."""
    spec = ModelSpec(variant, 2, 4, upsample="bilinear")
    reference, network = (net.float().eval() for net in _pair(spec))
    image = _image(spec).float()

    with torch.autocast("cpu", dtype):
        result, wanted = network(image), reference(image)
    result.float().square().sum().backward()

    assert result.dtype == wanted.dtype == dtype
    torch.testing.assert_close(result, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in network.parameters())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_network_is_the_same(variant: str) -> None:
    """torch.compile takes the whole network without a graph break."""
    spec = ModelSpec(variant, 1, 4, upsample="bilinear")
    _, network = (net.eval() for net in _pair(spec))
    image = _image(spec)

    with torch.no_grad():
        result = torch.compile(network, backend="aot_eager", fullgraph=True)(image)

        _assert_equal(result, network(image))


WIDE = [replace(spec, width=24) for spec in CELLS]


@pytest.mark.parametrize("size", [(64, 64), (61, 58)])
@by_label([*WIDE, *(replace(spec, padding="valid") for spec in WIDE if spec.skip == "concat")])
def test_executed_macs_are_what_torch_counts(spec: ModelSpec, size: tuple[int, int]) -> None:
    """FlopCounterMode / 2 on the meta device, banded products included, as an integer; left alone, it is conv_macs."""
    graph = spec.graph()
    with torch.device("meta"):
        network, image = build(spec, RewrittenOps().ops()).eval(), torch.empty(3, 1, *size)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)

    taken = [each for each in rewritings(graph, *size, batch=3) if each.choice.taken]
    assert counter.get_total_flops() == 2 * executed_macs(graph, *size, batch=3)
    assert (executed_macs(graph, *size) < graph.conv_macs(*size)) == bool(taken)


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_of_small_maps_are_left_alone(variant: str) -> None:
    """With few channels the bands would cost more than they save: then the reference's own steps run, to the bit."""
    spec = ModelSpec(variant, 2, 2, upsample="bilinear")
    reference, network = (net.eval() for net in _pair(spec))
    image = _image(spec)

    outputs = network(image), reference(image)

    assert torch.equal(*outputs)
    assert not any(each.choice.taken for each in rewritings(spec.graph(), 13, 18) if "x2_0" not in each.edge)


def _call(factor: int, channels: tuple[int, int], extent: int = 16, **where: Any) -> tap_choice.Choice:
    axis = Axis(extent, factor, "bilinear", False, 0, extent * factor, 3, 1)
    return choose(axis, axis, channels, **where)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["fp32", "tf32", "16 bits"])
def test_choice_turns_once_with_the_channels(kind: str, device: str) -> None:
    """More input channels are always in favour of tap-first, and at some number it is taken."""
    taken = [_call(16, (channels, 64), kind=kind, device=device).taken for channels in (1, 4, 16, 64, 256, 1024)]

    assert taken == sorted(taken)
    assert not taken[0]
    assert taken[-1]


def test_choice_says_why_in_numbers() -> None:
    """MACs of both forms, and which is less."""
    few, many = _call(2, (4, 8)), _call(2, (512, 256))

    assert few.why.endswith("are not less than the direct form's 0.3 M")
    assert "M MACs over channels and 2.5 times" in many.why
    assert many.why.endswith("are less than the direct form's 1,208.0 M")
    assert "all times 3.0 for products in fp32" in _call(2, (512, 256), kind="16 bits").why


def test_tap_first_never_holds_or_moves_more() -> None:
    """It forms no up-sampled map: bytes and live bytes are the direct form's without that map."""
    choice = _call(4, (10, 6), batch=2)

    up = 2 * 10 * 64 * 64 * 4
    assert choice.direct_live_bytes - choice.tap_live_bytes == up
    assert choice.direct_bytes - choice.tap_bytes == 2 * up


def test_networks_can_be_pickled() -> None:
    """The table holds methods of a value: nothing that a copy would not have."""
    network = build(ModelSpec("unet3+", 1, 4), RewrittenOps("cuda").ops()).eval()
    image = torch.randn(1, 1, 8, 8)

    copied = pickle.loads(pickle.dumps(network))  # noqa: S301 - its own

    assert torch.equal(copied(image), network(image))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_trace_chooses_as_the_device_that_it_stands_for(device: str) -> None:
    """On meta tensors, in 16 bits, where a GPU's products in fp32 are far slower than the direct form's."""
    spec = ModelSpec("unet3+", 2, 64)
    with torch.device("meta"):
        network = build(spec, RewrittenOps(device).ops()).eval().bfloat16()
        image = torch.empty(1, 1, 32, 32, dtype=torch.bfloat16)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)

    assert counter.get_total_flops() == 2 * executed_macs(spec.graph(), 32, 32, precision="bf16", device=device)
