"""`backend=rewritten`: networks whose convolutions over up-sampled maps run at low resolution, and what they cost."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from model_cells import by_label, label_of, outputs_of
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional

from skipcost.bench.cases.case import CHOICES as CASES
from skipcost.bench.cases.case import Case
from skipcost.bench.measure.counting import predicted_peaks
from skipcost.kernels.dispatch.low_resolution import Choice, choose, choose_composed, folds, rewritings
from skipcost.kernels.low_resolution.composed import ATTRIBUTE
from skipcost.kernels.rewriting import low as rewritten
from skipcost.kernels.rewriting.low import RewrittenOps
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, SkipNet, build
from skipcost.unet_models.ops import ConvNormAct, conv_norm_act, merge
from skipcost.unet_models.program import lower
from skipcost.unet_models.sizes import PlacedConv, placed
from skipcost.unet_models.spec import CHOICES
from skipcost.unet_models.topology import Conv

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
    ModelSpec("unet", 2, 4, padding="valid", norm="none"),
    ModelSpec("unet++", 2, 4, padding="valid", head="deep", bias=False),
    ModelSpec("unet", 2, 4, "none", padding="valid"),
    ModelSpec("unet3+", 3, 4, head="deep", norm="instance"),
    ModelSpec("unet3+", 2, 4, head="guided", classes=1, bias=False),
    ModelSpec("unet", 2, 4, upsample="nearest", norm="group", bias=False),
    ModelSpec("unet++", 2, 4, upsample="bilinear", norm="none", head="deep"),
]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the other forms wherever they can be: networks small enough for tests would be left as they are."""
    yield from _decided(monkeypatch, taken=True)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the direct form everywhere."""
    yield from _decided(monkeypatch, taken=False)


def _decided(monkeypatch: pytest.MonkeyPatch, *, taken: bool) -> Iterator[None]:
    rewritten._counted.cache_clear()
    for name, count in (("choose", choose), ("choose_composed", choose_composed)):
        monkeypatch.setattr(rewritten, name, partial(_choice, count, taken))
    monkeypatch.setattr(rewritten, "folds", lambda *_: taken)
    yield
    rewritten._counted.cache_clear()


def _choice(count: Callable[..., Choice], taken: bool, *args: Any, **given: Any) -> Choice:  # noqa: FBT001 - bound
    return replace(count(*args, **given), taken=taken)


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


@pytest.mark.numeric
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


TRANSPOSED = [variant for variant, row in VARIANTS.items() if "transpose" in row.upsamples]


def _composed_edges(network: SkipNet) -> int:
    """How many edges have composed their weights."""
    return sum(ATTRIBUTE in vars(module) for module in network.modules())


@pytest.mark.numeric
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", TRANSPOSED)
def test_autocast_composes_in_its_type(variant: str, dtype: torch.dtype) -> None:
    """The parameters stay in 32 bits; what is composed of them is rounded to 16 once."""
    spec = ModelSpec(variant, 2, 4)
    reference, network = (net.float().eval() for net in _pair(spec))
    image = _image(spec).float()

    with torch.autocast("cpu", dtype), torch.no_grad():
        result, wanted = network(image), reference(image)

    assert result.dtype == wanted.dtype == dtype
    assert _composed_edges(network) == sum(edge.up is not None for edge in spec.graph().edges)
    torch.testing.assert_close(result, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("variant", TRANSPOSED)
def test_nothing_is_composed_where_gradients_are_asked_for(variant: str) -> None:
    """In training and in evaluation with gradients the reference's own steps run, to the bit."""
    spec = ModelSpec(variant, 2, 4)
    reference, network = _pair(spec)
    image = _image(spec)

    for mode in (True, False):
        assert torch.equal(network.train(mode)(image), reference.train(mode)(image))
    with torch.no_grad():
        assert torch.equal(network.train()(image), reference.train()(image))
    assert not _composed_edges(network)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("beside", [(6, 7), (5, 8)], ids=str)
def test_a_cropped_up_sampled_map_takes_its_own_steps(beside: tuple[int, int]) -> None:
    """No network of the suite has one; beside a smaller map the two convolutions run, to the bit."""
    layer = ConvNormAct(Conv(8, 4, 3, norm="group", act=True), valid=False).eval()
    up = torch.nn.ConvTranspose2d(6, 5, 2, stride=2)
    maps = [torch.randn(2, 3, *beside), torch.randn(2, 6, 3, 4)]

    with torch.no_grad():
        wanted = conv_norm_act(layer, merge([maps[0], up(maps[1])], "concat"))
        result = RewrittenOps().up_conv_concat_conv(layer, maps, up)

    assert torch.equal(result, wanted)
    assert not maps


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("variant", TRANSPOSED)
def test_training_between_evaluations_is_seen(variant: str) -> None:
    """An optimizer's step changes weights in place: what was composed of them before is composed anew."""
    spec = ModelSpec(variant, 2, 4)
    reference, network = _pair(spec)
    image = _image(spec)
    for net in (reference, network):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            with torch.inference_mode():
                result = net.eval()(image)
            net.train()(image).square().mean().backward()
            optimizer.step()

    with torch.inference_mode():
        before, result, wanted = result, network.eval()(image), reference.eval()(image)

    assert not torch.allclose(before, wanted)
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())  # two steps apart


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("variant", TRANSPOSED)
def test_composed_weights_stay_out_of_the_state(variant: str) -> None:
    """The state_dict is the reference's before and after, name by name and bit by bit."""
    spec = ModelSpec(variant, 2, 4)
    reference, network = (net.eval() for net in _pair(spec))

    with torch.inference_mode():
        network(_image(spec))

    before, after = reference.state_dict(), network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("upsample", CHOICES["upsample"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_network_is_the_same(variant: str, upsample: str) -> None:
    """torch.compile takes the whole network without a graph break; transposed convolutions go to it as they are."""
    if upsample not in VARIANTS[variant].upsamples:
        return
    spec = ModelSpec(variant, 1, 4, upsample=upsample)
    _, network = (net.eval() for net in _pair(spec))
    image = _image(spec)

    with torch.no_grad():
        result = torch.compile(network, backend="aot_eager", fullgraph=True)(image)

        _assert_equal(result, network(image))


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_of_small_maps_are_left_alone(variant: str) -> None:
    """With few channels the bands would cost more than they save: then the reference's own steps run, to the bit."""
    spec = ModelSpec(variant, 2, 2, upsample="bilinear")
    reference, network = (net.eval() for net in _pair(spec))
    image = _image(spec)

    outputs = network(image), reference(image)

    assert torch.equal(*outputs)
    assert not any(each.choice.taken for each in rewritings(spec.graph(), 13, 18) if "x2_0" not in each.edge)


def _peaks(spec: ModelSpec, backend: str, mode: str) -> tuple[int, int]:
    case = Case(spec, 2, 64, 64, mode=mode, backend=backend)
    return predicted_peaks(case)[:2]


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        (spec, CASES["mode"][(at + at // len(SKIPS)) % 2])
        for at, spec in enumerate(each for each in CELLS if each.upsample == "transpose")
    ],
    ids=label_of,
)
def test_what_is_left_as_it_is_holds_no_more(spec: ModelSpec, mode: str) -> None:
    """A network in which nothing is rewritten has eager's peaks to the byte: the joined op lets go of maps as soon."""
    assert _peaks(spec, "rewritten", mode) == _peaks(spec, "eager", mode)


def test_behind_a_compiler_that_failed_no_map_is_held_longer() -> None:
    """Then TorchDynamo's hook stays, and no call hands its arguments over: who calls holds on to what he gave."""
    spec = ModelSpec("unet", 2, 4, "none")

    def fails(_module: fx.GraphModule, _given: list[Tensor]) -> Callable[..., Any]:
        raise ValueError

    with pytest.raises(BackendCompilerFailed):
        torch.compile(nn.Conv2d(1, 4, 3), backend=fails)(torch.randn(1, 1, 8, 8))

    peaks = _peaks(spec, "rewritten", "inference")

    assert peaks == _peaks(spec, "eager", "inference")


@pytest.mark.parametrize("padding", CHOICES["padding"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", TRANSPOSED)
def test_composed_networks_hold_no_more(variant: str, skip: str, padding: str) -> None:
    """The first image's peak is not above eager's, but for one layer's weights with its norm in them.

    The next one's is, by what is kept at most: in the encoder.
    """
    spec = ModelSpec(variant, 2, 16, skip, padding=padding)
    kept = sum(each.choice.kept_bytes for each in rewritings(spec.graph(), 64, 64, batch=2) if each.choice.taken)

    first, steady = _peaks(spec, "rewritten", "inference")

    eager = _peaks(spec, "eager", "inference")[1]
    convolutions = placed(lower(spec.graph()), (64, 64))
    folded = max(
        (4 * (each.conv.weights + 2 * each.conv.out_channels) for each in convolutions if _folds(each)), default=0
    )
    assert first <= eager + folded
    assert steady <= eager + folded + kept


def _folds(each: PlacedConv) -> bool:
    return each.conv.norm == "batch" and folds(each.conv.weights, each.outputs)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("skip", ["concat", "gated"])
@pytest.mark.parametrize(("variant", "upsample"), [("unet", "transpose"), ("unet++", "bilinear"), ("unet3+", None)])
def test_norms_go_into_weights_at_inference_alone(variant: str, skip: str, upsample: str | None) -> None:
    """No norm runs then but a gate's and behind a composed convolution; all do with gradients, autocast or 16 bits."""
    network = build(ModelSpec(variant, 2, 4, skip, upsample=upsample), RewrittenOps().ops()).eval()
    left = {id(each) for name, each in network.named_modules() if ".gate." in name}
    if upsample == "transpose" and skip != "gated":
        left |= {id(layers[0].norm) for name, layers in network.nodes.items() if not name.endswith("_0")}
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    ran: list[int] = []
    for each in norms:
        each.register_forward_hook(lambda norm, *_: ran.append(id(norm)))
    image = torch.randn(1, 1, 16, 16)

    with torch.no_grad():
        network(image)
        inference = set(ran)
        ran.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            network(image)
        network.bfloat16()(image.bfloat16())
    network.float()(image)
    network.train()(image)

    assert inference == {id(each) for each in norms} & left
    assert sorted(ran) == sorted(4 * [id(each) for each in norms])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("change", ["weight", "bias", "running_mean", "running_var"])
def test_nothing_of_a_folded_norm_is_kept(change: str) -> None:
    """What changes between two calls, in place and behind its version's back, is in the second."""
    spec = ModelSpec("unet3+", 2, 4)
    reference, network = (net.eval() for net in _pair(spec))
    image = _image(spec)
    with torch.inference_mode():
        network(image)

    for net in (reference, network):
        getattr(net.nodes["x0_0"][0].norm, change).data.mul_(2).add_(1)

    with torch.inference_mode():
        _assert_equal(network(image), reference(image))


@pytest.mark.numeric
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bright", [False, True], ids=["normal", "bright"])
@pytest.mark.parametrize(("channels", "out_channels"), [(1, 8), (16, 16), (64, 32), (256, 16)])
def test_a_folded_norm_rounds_as_sums_do(channels: int, out_channels: int, bright: bool) -> None:  # noqa: FBT001 - a row
    """Root mean square in fp32 against float64: what rounding every sum in progress makes, in any order of the terms.

    A rounding of s errs evenly by up to u|s|: by at most u|s|/sqrt(3) in root mean square. Sums in progress of products
    of either sign are no larger than the root of the products' squares and the shift's, with which a CPU may start
    them: oneDNN does on SSE4.1 and AVX2, so that there a shift as large as the map's deviation makes the error sqrt(3)
    times that without one. Bright data is where means are large beside deviations, and filters find edges.
    """
    torch.manual_seed(0)
    layer = ConvNormAct(Conv(channels, out_channels, 3, norm="batch", act=False), valid=False).eval()
    x = torch.randn(2, channels, 24, 24)
    with torch.no_grad():
        if bright:
            x = x.abs() + 4
            layer.conv.weight -= layer.conv.weight.mean((1, 2, 3), keepdim=True)
        y = deepcopy(layer.conv).double()(x.double())
        layer.norm.running_mean.copy_(y.mean((0, 2, 3)))
        layer.norm.running_var.copy_(y.var((0, 2, 3)))
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.normal_()

        exact = conv_norm_act(deepcopy(layer).double(), x.double())
        results = conv_norm_act(layer, x), RewrittenOps().conv_norm_act(layer, [x])
        allowed = _rounded_sums(deepcopy(layer).double(), x.double())

    assert not torch.equal(*results)
    assert (results[1] - exact).square().mean() <= allowed.square().mean()


def _rounded_sums(layer: ConvNormAct, x: Tensor) -> Tensor:
    """Error of 9 C products and a shift, added up in fp32, root mean square: (N, O, H, W)."""
    norm = layer.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = ((layer.conv.bias - norm.running_mean) * scale).abs() + norm.bias.abs()
    squares = functional.conv2d(
        x.square(), (layer.conv.weight * scale.view(-1, 1, 1, 1)).square(), shift.square(), padding=1
    )
    beside = 6  # roundings of the scale's root, product and reciprocal, of the weight, of the shift's product and sum
    return 2**-24 / 3**0.5 * ((layer.conv.weight[0].numel() + beside) * squares).sqrt()


def test_small_maps_and_large_weights_stay_apart() -> None:
    """A pass over a map is saved where that is more than what scaling the weights takes."""
    assert folds(weights=9 * 64 * 64, outputs=64 * 256 * 256)
    assert not folds(weights=9 * 1024 * 1024, outputs=1024 * 16 * 16)
    assert not folds(weights=9, outputs=64 * 64)


def test_networks_can_be_pickled() -> None:
    """The table holds methods of a value: nothing that a copy would not have."""
    network = build(ModelSpec("unet3+", 1, 4), RewrittenOps("cuda").ops()).eval()
    image = torch.randn(1, 1, 8, 8)

    copied = pickle.loads(pickle.dumps(network))  # noqa: S301 - its own

    assert torch.equal(copied(image), network(image))
