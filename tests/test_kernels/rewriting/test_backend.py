"""`torch.compile(model, backend="skipcost")`: the same function, and what Python decides stays decided by Python."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewrite_checks import MODELS, assert_same, made, run
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional

from skipcost.kernels.rewriting import enlarged
from skipcost.kernels.rewriting.backend import backend

pytestmark = pytest.mark.usefixtures("fresh")
IMAGE = (1, 64, 16, 16)  # with 32 channels out: enough MACs for a choice, few enough for a test


def compiled(model: nn.Module, **options: Any) -> Any:
    """Compile a model with the backend."""
    return torch.compile(model, backend=backend, options=options or None)


class Net(nn.Module):
    """Up-sampling and a convolution; `between` is what stands in front of the convolution."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] | None = None, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.conv, self.between = nn.Conv2d(width, 32, 3, padding=1), between
        self.head, self.scale, self.both = nn.Conv2d(32, 2, 1), 1.0, False

    def forward(self, x: Tensor) -> Any:
        """(N, 64, H, W) -> (N, 2, 2H, 2W)."""
        y = self.up(x) if self.between is None else self.between(self.up(x), x)
        y = self.scale * self.head(self.conv(y))
        return (y, x) if self.both else y


def assert_close(one: Tensor, other: Tensor) -> None:
    """Equal but for fp32's rounding in another order."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, ("evaluation", "training")[at % 2]) for at, name in enumerate(MODELS)), ("supervised", "evaluation")],
)
def test_results_gradients_and_statistics_are_the_models(name: str, mode: str, taken: list[tuple[int, ...]]) -> None:
    """In float64, for decoders as people write them, also those whose Python looks at sizes."""
    (model, x), training = made(name), mode == "training"

    one = run(model, x, training=training, through=lambda each: torch.compile(each.forward, backend=backend))

    assert_same(one, run(model, x, training=training))
    # Nothing is up-sampled, or not without gradients, or the only place in evaluation counts no fewer MACs
    assert bool(taken) is (name not in ("resnet", "transposed") and (name, mode) != ("supervised", "evaluation"))


def _sized(_: Tensor, x: Tensor) -> Tensor:
    assert x.shape[1] == 64
    return functional.interpolate(x, size=(2 * x.shape[2], 2 * x.size(3)), mode="nearest")


def _resized_if_it_must(up: Tensor, x: Tensor) -> Tensor:
    skip = torch.ones_like(up[:, :8])
    if skip.shape[2:] != x.shape[2:]:
        x = functional.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
    return torch.cat((skip, x), axis=1)  # type: ignore[call-arg]  # PyTorch takes numpy's word


def _nested(up: Tensor, _: Tensor) -> Tensor:
    return torch.cat([torch.cat([up, up.new_ones(up[:, :4].shape)], 1), up.new_ones(up[:, :4].shape)], -3)


def _cropped(up: Tensor, _: Tensor) -> Tensor:
    return functional.pad(up, [-1, -1, -2, 0])


def _padded(up: Tensor, _: Tensor) -> Tensor:
    return functional.pad(up, [1, 0, 0, 1])


def _sliced(up: Tensor, _: Tensor) -> Tensor:
    return up[:, :, 1:-2, 3:][..., :-1]


@pytest.mark.parametrize(
    ("between", "width"), [(_sized, 64), (_resized_if_it_must, 72), (_cropped, 64), (_sliced, 64), (_padded, 64)]
)
def test_what_asks_for_sizes_is_found(
    between: Callable[[Tensor, Tensor], Tensor], width: int, taken: list[tuple[int, ...]]
) -> None:
    """Asserted channels, `size=`, resizing only where sizes differ, crops, and numpy's word for the dimension."""
    model, x = Net(between, width), torch.randn(IMAGE)

    result = compiled(model)(x)

    assert_close(result, model(x))
    assert taken == [IMAGE]


class Residual(Net):
    """Two convolutions read one concatenation, as blocks with a shortcut do, and a third the map alone."""

    def __init__(self, *, read: bool = False) -> None:
        super().__init__(width=72)
        self.shortcut, self.last, self.read = nn.Conv2d(72, 32, 1), nn.Conv2d(64, 32, 3, padding=1), read

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, 32, 2H, 2W)."""
        up = self.up(x)
        both = torch.cat([x.new_ones((1, 8, *up.shape[2:])), up], 1)
        result = self.conv(both) + self.shortcut(both) + self.last(up)
        return result + both.mean() if self.read else result


def test_convolutions_that_read_one_map_are_places_together(taken: list[tuple[int, ...]]) -> None:
    """In training too; where a fourth reads the map, it is made for all."""
    model, x = Residual(), torch.randn(IMAGE, requires_grad=True)

    ours, its = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (compiled(model), model))
    shared = len(taken)
    other = Residual(read=True)
    result = compiled(other)(x)

    assert_close(ours, its)
    assert shared >= 2
    assert_close(result, other(x))
    assert len(taken) == shared


def test_where_sizes_vary_each_convolution_would_make_the_shared_map(
    taken: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """So it is made once, by the model; the list says who reads it as well."""
    model = Residual()
    run_it = torch.compile(model, backend=backend, dynamic=True)

    with caplog.at_level(logging.INFO, "skipcost.kernels.rewriting.backend"):
        for side in (16, 20):
            x = torch.randn(1, 64, side, side)
            assert_close(run_it(x), model(x))

    assert not taken
    assert "as well" in caplog.text


def _also_read(up: Tensor, _: Tensor) -> Tensor:
    return up + 0 * up.mean()


def _written(up: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return up


class _Later(nn.Module):
    """Writes to the small map when the convolution is done, which still needs it for the way back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, 2, 2H, 2W)."""
        x = x * 1
        return self.net(x) + x.relu_().mean()


def test_a_map_that_is_written_to_later_is_not_read_again(taken: list[tuple[int, ...]]) -> None:
    """The model keeps the up-sampled map for backward, the low form would keep the small one."""
    model, x = _Later(Net()), torch.randn(IMAGE, requires_grad=True)

    ours, its = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (compiled(model), model))

    assert_close(ours, its)
    assert not taken


def test_a_place_reads_the_result_of_another(taken: list[tuple[int, ...]]) -> None:
    """A convolution over an up-sampled map and what such a convolution gave."""

    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            first = self.conv(self.up(x))
            return functional.conv2d(torch.cat([first, self.up(x)], 1), torch.cat([self.conv.weight] * 2, 1)[:, :96])

    model, x = Two(), torch.randn(IMAGE)

    result = compiled(model)(x)

    assert_close(result, model(x))
    assert taken == [IMAGE, IMAGE]


def _cropped_and_padded(up: Tensor, _: Tensor) -> Tensor:
    return functional.pad(up[:, :, 1:], [0, 0, 1, 0])


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (_also_read, "reads"),
        (_written, "mul_ writes to a map that is read"),
        (_cropped_and_padded, "zeros are added to its map where it was cropped"),
        (_nested, "as well"),
    ],
)
def test_what_cannot_be_left_out_stays(
    between: Callable[[Tensor, Tensor], Tensor],
    why: str,
    taken: list[tuple[int, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another reader, a write to what is read later then, zeros in place of pixels: said, and nothing else changes."""
    model, x = Net(between, 72 if between is _nested else 64), torch.randn(IMAGE)
    wanted = model(x.clone())

    with caplog.at_level(logging.INFO, "skipcost.kernels.rewriting.backend"):
        result = compiled(model)(x.clone())

    assert_close(result, wanted)
    assert not taken
    assert why in caplog.text
    assert "stays as it is" in caplog.text


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # it breaks the graph there
def test_what_python_decides_is_decided_in_each_call(taken: list[tuple[int, ...]]) -> None:
    """An attribute set afterwards, a block replaced, and dice."""

    class Dropping(Net):
        def forward(self, x: Tensor) -> Any:
            heads = random.random() < 0.5  # noqa: S311 - dice
            return super().forward(x) if heads else super().forward(-x)

    model, x = Dropping(), torch.randn(IMAGE)
    run_it = compiled(model)
    run_it(x)
    model.scale, model.head = 3.0, nn.Conv2d(32, 5, 1)
    both = []
    for seed in range(8):
        random.seed(seed)
        wanted = model(x)
        random.seed(seed)
        assert_close(run_it(x), wanted)
        both.append(bool((wanted - model.scale * model.head(model.conv(model.up(x)))).abs().max() < 1e-3))
    model.both = True

    assert isinstance(run_it(x), tuple)
    assert len(set(both)) == 2  # the dice fell both ways
    assert taken


def test_the_form_is_chosen_for_the_maps_of_each_call(
    taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for many sizes, a small map is convolved as the model does, where Python would decide."""
    monkeypatch.setattr(enlarged, "FEWEST_MACS", 60_000_000)
    model = Net()
    run_it = torch.compile(model, backend=backend, dynamic=True)
    for side in (32, 40, 28):
        x = torch.randn(1, 64, side, side)
        assert_close(run_it(x), model(x))

    assert taken == [(1, 64, 32, 32), (1, 64, 40, 40)]  # 75, 118 and 58 M MACs


def test_the_change_names_layers_and_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    """In the terms of the model."""
    with caplog.at_level(logging.INFO, "skipcost.kernels.rewriting.backend"):
        compiled(Net())(torch.randn(IMAGE))

    (line,) = caplog.messages
    assert line.startswith("up, conv: Upsample -> Conv2d runs as tap_first: ")
    assert "MACs" in line


@pytest.mark.parametrize(("options", "message"), [({"form": "fast"}, "accepted: low"), ({"than": 1}, "form, then")])
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    """With what is accepted."""
    with pytest.raises(Exception, match=message):
        compiled(Net(), **options)(torch.randn(IMAGE))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # as Inductor is imported
def test_inductor_gets_the_rewritten_graph(taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that AOTAutograd can follow, gradients included; it stands for Inductor, which takes a C++ compiler."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)
    model, x = Net(), torch.randn(IMAGE, requires_grad=True)

    result = compiled(model, then="inductor")(x)

    assert_close(result, model(x))
    assert taken
    ours, its = (torch.autograd.grad(each.square().sum(), x)[0] for each in (result, model(x)))
    assert_close(ours, its)


class Transposed(Net):
    """Up-samples by weights, beside a skip."""

    def __init__(self) -> None:
        super().__init__(width=40)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)  # type: ignore[assignment]  # in place of the interpolation

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> (N, 32, 2H, 2W)."""
        return self.conv(torch.cat([x.new_ones((1, 8, 2 * x.shape[2], 2 * x.shape[3])), self.up(x)], 1))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # as Inductor is imported
@pytest.mark.parametrize(
    ("options", "why"),
    [({}, "runs as composed_up_conv"), ({"then": "inductor"}, "compiled further")],
)
def test_transposed_convolutions_are_composed_where_weights_can_be_kept(
    options: dict[str, Any], why: str, composing: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not where AOTAutograd follows the graph, as Inductor has it do; the form is that of each call's sizes."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)
    model = Transposed().eval()
    run_it = torch.compile(model, backend=backend, options=options or None, dynamic=True)

    with caplog.at_level(logging.INFO, "skipcost.kernels.rewriting.backend"), torch.no_grad():
        for side in (48, 4, 48):
            x = torch.randn(1, 64, side, side)
            assert_close(run_it(x), model(x))

    assert why in caplog.text
    assert composing == ([] if options else [(1, 64, 48, 48)] * 2)


def test_torch_compile_knows_its_name() -> None:
    """By the entry point of the installed package."""
    assert "skipcost" in torch._dynamo.list_backends(())
