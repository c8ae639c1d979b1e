"""Public U-Nets through `rewrite`: what `nox -s rewrite` installs computes the same, and what it cannot do it says.

Not collected by a plain run of the tests: there they would be skipped, which is not passed. The packages come without
what they depend on. Where a package's own `__init__` needs that, the files with the models are read past it, unchanged.
Each test prints a line of the table in docs/rewritten.md.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from types import ModuleType

import pytest
import torch
from fusion_checks import within
from rewrite_checks import assert_same, run
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from skipcost.kernels import rewrite
from skipcost.kernels.rewriting import enlarged
from skipcost.kernels.rewriting.backend import backend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # Dynamo asks behind a break of the graph
]
SMP = "segmentation_models_pytorch"
LOGGER = "skipcost.kernels.rewriting.backend"
CHANNELS = (3, 64, 64, 128, 256, 512)  # of ResNet-34, the default encoder of segmentation-models-pytorch


def past(*packages: str) -> None:
    """Put packages in place without running their `__init__`."""
    for name in packages:
        parent = sys.modules.get(name.rpartition(".")[0])
        spec = PathFinder.find_spec(name, parent.__path__ if parent else None)
        assert spec is not None
        module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[name] = module


class Decoding(nn.Module):
    """A decoder of segmentation-models-pytorch behind one convolution for each level of an encoder.

    Its encoders need packages that are not here. As the package's own models do, it checks the size first.
    """

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        past(SMP, f"{SMP}.base", f"{SMP}.decoders", f"{SMP}.decoders.{kind}")
        decoder = getattr(importlib.import_module(f"{SMP}.decoders.{kind}.decoder"), name)
        self.levels = nn.ModuleList(nn.Conv2d(3, channels, 1) for channels in CHANNELS)
        self.decoder = decoder(CHANNELS, (256, 128, 64, 32, 16), n_blocks=5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 16, H, W)."""
        if x.shape[2] % 32 or x.shape[3] % 32:
            message = f"got {tuple(x.shape)}: give sides that 32 divides"
            raise RuntimeError(message)
        maps = [layer(functional.avg_pool2d(x, 1 << level)) for level, layer in enumerate(self.levels)]
        return self.decoder(maps)


def smp_unet() -> nn.Module:
    """segmentation-models-pytorch, U-Net's decoder: nearest up-sampling."""
    return Decoding("unet", "UnetDecoder")


def smp_nested() -> nn.Module:
    """segmentation-models-pytorch, UNet++'s decoder."""
    return Decoding("unetplusplus", "UnetPlusPlusDecoder")


def bio_nested() -> nn.Module:
    """bio-image-unet, UNet++: bilinear up-sampling, corners aligned."""
    past("bio_image_unet", "bio_image_unet.multi_output_unet")
    module = importlib.import_module("bio_image_unet.multi_output_unet.multi_output_nested_unet")
    made: nn.Module = module.MultiOutputNestedUNet(n_filter=32, deep_supervision=True)
    return made


def seg2link() -> nn.Module:
    """seg2link-unet2d: nearest, cropped to the skip, in front of it."""
    made: nn.Module = importlib.import_module("seg2link_unet2d.unet2").UNet2()
    return made


def unet_torch() -> nn.Module:
    """unet-torch, bilinear: padded to the skip."""
    made: nn.Module = importlib.import_module("unet.model").Unet(1, 2)
    return made


def monai(name: str) -> Callable[[], nn.Module]:
    """MONAI's own, with up-sampling that has no weights."""

    def make() -> nn.Module:
        network = getattr(importlib.import_module("monai.networks.nets"), name)
        made: nn.Module = network(spatial_dims=2, upsample="nontrainable")
        return made

    return make


def bio_unet() -> nn.Module:
    """bio-image-unet, Unet: transposed convolutions."""
    past("bio_image_unet", "bio_image_unet.unet")
    made: nn.Module = importlib.import_module("bio_image_unet.unet.unet").Unet(n_filter=32)
    return made


def bio_attention() -> nn.Module:
    """bio-image-unet, AttentionUnet: gates read the maps of its transposed convolutions."""
    past("bio_image_unet", "bio_image_unet.unet")
    made: nn.Module = importlib.import_module("bio_image_unet.unet.attention_unet").AttentionUnet(n_filter=32)
    return made


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with a shape
    "segmentation-models-pytorch, Unet decoder": (smp_unet, (1, 3, 64, 96)),
    "segmentation-models-pytorch, UnetPlusPlus decoder": (smp_nested, (1, 3, 64, 96)),
    "bio-image-unet, MultiOutputNestedUNet": (bio_nested, (1, 1, 32, 48)),
    "seg2link-unet2d, UNet2": (seg2link, (1, 1, 51, 62)),
    "unet-torch, Unet(bilinear)": (unet_torch, (1, 1, 32, 32)),
}
TRANSPOSED = {"bio-image-unet, Unet": (bio_unet, (1, 1, 64, 64))}  # composed at inference
UNCHANGED = {
    "bio-image-unet, AttentionUnet": (bio_attention, (1, 1, 64, 64)),
    "MONAI, BasicUNet(nontrainable)": (monai("BasicUNet"), (1, 1, 64, 64)),
    "MONAI, BasicUNetPlusPlus(nontrainable)": (monai("BasicUNetPlusPlus"), (1, 1, 64, 64)),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite maps that are small enough for a test."""
    for name in ("FEWEST_MACS", "FEWEST_SAVED", "FEWEST_PIXELS"):
        monkeypatch.setattr(enlarged, name, 0)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in float64, and an input."""
    factory, shape = (MODELS | TRANSPOSED | UNCHANGED)[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    return factory().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [*MODELS, *TRANSPOSED, *UNCHANGED])
def test_a_public_model_computes_the_same(name: str) -> None:
    """In evaluation and training, gradients of all parameters included, to 1e-12 in float64; MONAI's find no place.

    MONAI's blocks ask with torch.jit.isinstance, which breaks the graph between up-sampling and convolution.
    """
    model, x = made(name)

    faster, changes = rewrite(model, x)

    assert any(each.after for each in changes) is (name in MODELS)
    for training in (False, True):
        before, after = (run(each, x, training=training) for each in (model, faster))
        assert_same(before, after)
        assert name not in MODELS or after.macs < before.macs


def test_transposed_convolutions_are_composed_at_inference(capsys: pytest.CaptureFixture[str]) -> None:
    """The same result in float64 and, of 256x256 pixels in fp32, in fewer MACs."""
    (name,) = TRANSPOSED
    model, _ = made(name)
    x = torch.randn(1, 1, 256, 256)
    flops: list[int] = []
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        faster, changes = rewrite(model, x.double())

        difference = (faster(x.double())[1] - model(x.double())[1]).abs().max()
        with within(counter, lambda _: flops.append(counter.get_total_flops())):
            rewrite(model.float(), x)
        with FlopCounterMode(display=False) as direct:
            model(x)

    low, all_ = sum(flops) / 2e9, direct.get_total_flops() / 2e9
    places = [each for each in changes if each.after == "composed_up_conv"]
    assert difference <= 1e-12 * model(x)[1].abs().max()
    assert low < all_
    with capsys.disabled():
        print(f"\n| {name} | {len(places)} | {all_:.2f} -> {low:.2f} G ({all_ / low:.2f}x) |")  # noqa: T201 - as above


@pytest.mark.parametrize("name", MODELS)
def test_an_image_takes_fewer_macs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass over 256x256 pixels in fp32, in evaluation."""
    model, x = made(name)
    x = torch.randn(1, x.shape[1], 256, 256)

    faster, changes = rewrite(model.float(), x)

    direct, low = (run(each, x, training=False).macs / 1e9 for each in (model, faster))
    assert low < direct
    places = len({each.where[-1] for each in changes if each.after})
    with capsys.disabled():
        print(f"\n| {name} | {places} | {direct:.2f} -> {low:.2f} G ({direct / low:.2f}x) |")  # noqa: T201 - the table's line


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [*MODELS, *UNCHANGED])
def test_torch_compile_finds_as_much(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """By `torch.compile(model, backend="skipcost")`, which logs what became of each place."""
    model, x = made(name)
    _, changes = rewrite(model, x)
    caplog.set_level("INFO", LOGGER)

    ours = run(model, x, training=False, through=lambda each: torch.compile(each.forward, backend=backend))

    assert_same(run(model, x, training=False), ours)
    assert [str(each) for each in changes] == [each.getMessage() for each in caplog.records if each.name == LOGGER]
