"""`rewrite` as a whole: the same function in both modes, fewer MACs, and what is done with the model afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fusion_checks import Called, ours
from rewrite_checks import MODELS, Skipping, Supervised, UNet3Plus, always, assert_same, made, run, sizes_that_divide
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from user_models import NestedUNet, PaddingUNet, pickled

from skipcost.bench.measure.live_bytes import trace_peaks
from skipcost.kernels import Change, fuse, rewrite
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.kernels.rewriting.rewiring import Rewired
from skipcost.unet_models import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _dividing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes_that_divide(monkeypatch)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("chosen", ["counted", "tap-first", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_results_gradients_and_statistics_are_the_models(
    name: str, chosen: str, *, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12 in float64, whichever form each call takes, in both modes; where all is direct, bit by bit."""
    model, x = made(name)
    if chosen != "counted":
        always(monkeypatch, taken=chosen == "tap-first")

    faster, _ = rewrite(model)

    expected, got = (run(each, x, training=training) for each in (model, faster))
    assert_same(expected, got, 0 if chosen == "direct" else 1e-12)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dividing", 2),
        ("nested", 3),
        ("unet3+", 10),
        ("supervised", 3),
        ("skipping", 6),
        ("resnet", 0),
        ("branching", 2),
    ],
)
def test_the_places_that_models_have(name: str, count: int) -> None:
    """Every up-sampling that a convolution reads; twice where a skip may be given or not."""
    model, _ = made(name)

    _, changes = rewrite(model)

    assert len(ours(changes)) == count


@pytest.mark.parametrize("name", ["dividing", "nested", "skipping", "unet3+", "branching"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_fewer_macs_run(name: str, *, training: bool) -> None:
    """PyTorch's own counter says so, in both modes."""
    model, x = made(name)

    faster, _ = rewrite(model)

    assert run(faster, x, training=training).macs < run(model, x, training=training).macs


def test_a_hand_written_unet3_plus_runs_what_the_suites_own_does() -> None:
    """The MACs are those that arithmetic gives for `backend=rewritten`, exactly, up to the heads behind."""
    model = UNet3Plus().double()
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    graph = ModelSpec.parse("unet3+/d4/w4/concat/in_channels=3").graph()

    faster, _ = rewrite(model)

    saved = graph.conv_macs(64, 48) - executed_macs(graph, 64, 48)
    before, after = (run(each, x, training=False).macs for each in (model, faster))
    assert saved > 0
    assert before - after == saved


def test_every_place_is_named_in_words() -> None:
    """Layers by name, functions by that of their module."""
    _, changes = rewrite(PaddingUNet(bilinear=True))

    why = "in each call for which that counts fewer MACs"
    assert changes == [
        Change(
            (f"{up}.up", f"{up}.pad", f"{up}.cat", f"{up}.conv.double_conv.0"),
            "Upsample -> pad -> cat -> Conv2d",
            "tap_first",
            why,
        )
        for up in ("up1", "up2")
    ]
    assert str(changes[0]).endswith(f"Upsample -> pad -> cat -> Conv2d runs as tap_first: {why}")


def test_a_place_of_one_mode_or_of_some_arguments_says_so() -> None:
    """Deep supervision in training makes other graphs; a skip may be given or not."""
    modes, skips = rewrite(Supervised())[1], rewrite(Skipping())[1]

    assert [change.why.partition(" (")[2] for change in modes] == ["", "in training)", "in training)"]
    assert {change.why.partition(" (")[2] for change in skips if change.after} == {"with its defaults)", "given skip)"}
    assert [change.why for change in skips if not change.after] == [
        "it is only rewritten inside, since its Python decides by values or shapes of tensors"
    ]


class Asking(nn.Module):
    """Decides by what it is given beside the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(
        self, x: Tensor, skip: Tensor | None, gain: float | Tensor = 2.0, other: Tensor | None = None
    ) -> Tensor:
        """(N, 3, h, w) -> (N, 2, 2h - 2, 2w - 2)."""
        result = self.conv(nn.functional.interpolate(x, scale_factor=2))
        result = result if skip is None else result + skip
        return result * gain if other is None else result * other


@pytest.mark.parametrize(
    ("given", "more", "runs"),
    [
        ((torch.ones(1),), {}, True),
        ((), {"skip": torch.ones(1)}, True),
        ((torch.ones(1), 2.0), {}, True),
        ((torch.ones(1),), {"gain": 2.0, "other": None}, True),
        ((torch.ones(1), torch.ones(2, 1, 1)), {"other": torch.ones(1) * 3}, True),
        ((None,), {}, False),
        ((True,), {}, False),
        ((torch.ones(1), 3.0), {}, False),
        ((torch.ones(1), torch.ones(1)), {}, False),
        ((torch.ones(1), 3.0), {"other": torch.ones(1)}, False),
    ],
)
def test_arguments_that_a_graph_is_not_for_run_the_modules_own_forward(
    given: tuple[Any, ...], more: dict[str, Any], *, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is for those without a default, or for all as tensors; by None, True or a number Python may decide."""
    always(monkeypatch)
    x, model = torch.randn(1, 3, 5, 6), Asking()

    faster, _ = rewrite(model)

    with Called() as called:
        result = faster(x, *given, **more)
    assert bool(called.names) == runs
    torch.testing.assert_close(result, model(x, *given, **more))


def test_python_that_looks_at_sizes_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-written UNet 3+ as it is, with its trimming."""
    monkeypatch.undo()

    faster, changes = rewrite(UNet3Plus())

    assert not isinstance(faster, Rewired)
    assert [(each.where, each.why) for each in changes] == [
        (("the model",), "it is only rewritten inside, since its Python decides by values or shapes of tensors")
    ]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_tensors_are_the_very_same(name: str) -> None:
    """state_dict, parameters and modules: same keys in the same order, same memory behind the tensors."""
    model, _ = made(name)

    faster, _ = rewrite(model)

    assert [name for name, _ in faster.named_modules()] == [name for name, _ in model.named_modules()]
    theirs, its = faster.state_dict(), model.state_dict()
    assert list(theirs) == list(its)
    assert [each.data_ptr() for each in theirs.values()] == [each.data_ptr() for each in its.values()]
    assert isinstance(faster, type(model))


def test_the_given_model_is_left_alone() -> None:
    """It keeps its classes and attributes."""
    model = NestedUNet()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}

    rewrite(model)

    assert type(model) is NestedUNet
    assert {name: module.__dict__ for name, module in model.named_modules()} == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", ["nested", "supervised", "skipping"])
def test_a_copy_is_rewritten_and_has_weights_of_its_own(duplicate: Callable[[nn.Module], nn.Module], name: str) -> None:
    """Deep copies and pickles run as few MACs, and do not follow the original's weights."""
    model, x = made(name)
    faster, _ = rewrite(model)
    expected = run(faster, x, training=True)

    twin = duplicate(faster)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(2)

    got = run(twin, x, training=True)
    assert got.macs == expected.macs
    assert_same(expected, got, 0)


def test_an_optimizer_trains_both_at_once() -> None:
    """Steps on the rewritten model's parameters are steps of the model, to rounding."""
    model, x = made("nested")
    alone = copy.deepcopy(model).train()
    faster, _ = rewrite(model)
    faster.train()

    for each in (alone, faster):
        optimizer = torch.optim.SGD(each.parameters(), 1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack([y.square().mean() for y in each(x)]).sum().backward()
            optimizer.step()

    for one, two in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_a_compiler_gets_the_rewritten_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both modes, with gradients; again for another size."""
    always(monkeypatch)
    model, x = made("dividing")
    faster, _ = rewrite(model)
    ops: list[list[str]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        ops.append([str(node.target) for node in graph.graph.nodes if "skipcost" in str(node.target)])
        return graph.forward

    for training in (False, True):
        for each in (x, torch.cat([x, x], 3)):
            compiled = torch.compile(faster.train(training), backend=backend, fullgraph=True)
            (ours,) = torch.autograd.grad(compiled(each).square().sum(), model.up1.conv.double_conv[0].weight)
            (its,) = torch.autograd.grad(
                model.train(training)(each).square().sum(), model.up1.conv.double_conv[0].weight
            )
            torch.testing.assert_close(ours, its, rtol=1e-10, atol=1e-10)
    assert ops == [["skipcost.tap_first.default"] * 2] * 4


def _export(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model, (x,))
    assert all("skipcost" not in str(node.target) for node in program.graph.nodes)
    return program.module()(x)


def _script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,))(x)  # type: ignore[no-untyped-call]


def _symbolic(model: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(model)(x)


def _mapped(model: nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(model)(x[None])[0]


def _forward_mode(model: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [_export, _script, _symbolic, _mapped, _forward_mode])
def test_tracers_and_transforms_see_the_original(way: Callable[[nn.Module, Tensor], Any]) -> None:
    """They get PyTorch's own operators, whole, and the result is the original's."""
    model, x = made("dividing")
    faster, _ = rewrite(model)

    with torch.no_grad():
        result = way(faster, x)
        expected = model(x)

    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_op_runs_with_and_without_gradients(context: Callable[[], Any]) -> None:
    """Also where no tensor keeps a version."""
    model, x = made("dividing")
    faster, _ = rewrite(model)

    with context(), Called() as called:
        result = faster(x)
        expected = model(x)

    assert called.names == ["tap_first"] * len(called.names) != []
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_are_laid_out_as_the_originals(layout: torch.memory_format) -> None:
    """channels_last inputs give channels_last results, and contiguous ones contiguous results."""
    model, x = made("dividing")
    x = x.contiguous(memory_format=layout)

    faster, _ = rewrite(model)

    assert faster(x).is_contiguous(memory_format=layout)
    assert model(x).stride() == faster(x).stride()


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["dividing", "nested", "unet3+"])
@pytest.mark.parametrize("way", ["autocast", "bf16", "fp32"])
def test_rounding_is_not_worse_than_the_originals(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean square errors against float64: in fp32 and in 16 bits at most 1.5 times the model's own."""
    always(monkeypatch)
    model, x = made(name)
    with torch.no_grad():
        exact = tree_leaves(model(x))
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    model, x = model.to(dtype), x.to(dtype)

    faster, _ = rewrite(model)

    with torch.no_grad(), torch.autocast("cpu", enabled=way == "autocast"):
        results = [tree_leaves(each(x)) for each in (faster, model)]
    for own, its, truth in zip(*results, exact, strict=True):
        assert own.dtype == its.dtype
        assert (own - truth).square().mean().sqrt() <= 1.5 * (its - truth).square().mean().sqrt()


@pytest.mark.parametrize("name", ["up2", "up2.up", "up2.conv.double_conv.0"])
def test_a_hook_on_gradients_that_comes_later_is_called(name: str) -> None:
    """With the gradients of the module's own forward."""
    model, x = made("dividing")
    faster, _ = rewrite(model)
    seen: list[Tensor] = []

    for each in (model, faster):
        each.get_submodule(name).register_full_backward_hook(lambda _module, given, _results: seen.append(given[0]))
        each(x).square().sum().backward()

    assert len(seen) == 2
    assert torch.equal(*seen)


def test_a_hook_that_comes_later_is_called() -> None:
    """On any layer of a place or module in between: then the model's own forward runs."""
    model, x = made("dividing")
    faster, _ = rewrite(model)
    seen: list[torch.Size] = []
    faster.get_submodule("up2.up").register_forward_hook(lambda _module, _given, result: seen.append(result.shape))

    with Called() as called:
        result = faster(x)

    assert seen == [torch.Size((1, 16, 16, 24))]
    assert called.names == []
    assert torch.equal(result, model(x))


def test_parts_in_another_mode_run_the_modules_own_forward_where_modes_differ() -> None:
    """Only if the module's Python is another in training: frozen norms of a model that never asks are no obstacle."""
    (asking, x), (silent, _) = made("supervised"), made("nested")

    for model in (asking, silent):
        model.train()
        model.get_submodule("conv0_0").eval()
    with Called() as asked:
        rewrite(asking)[0](x)
    with Called() as not_asked:
        rewrite(silent)[0](x)

    assert asked.names == []
    assert not_asked.names != []


def test_fused_and_rewritten_models_stay_as_they_are() -> None:
    """Each says so of what the other has made, and of its own."""
    model, x = made("dividing")
    fused, faster = fuse(model)[0], rewrite(model)[0]

    again = [rewrite(each) for each in (fused, faster)]
    refused = fuse(faster)[1][0]

    assert [[change.why for change in changes] for _, changes in again] == [["it was fused or rewritten before"]] * 2
    assert refused.why.startswith("it is only fused inside, since it was rewritten")
    with torch.no_grad():
        for each, _ in again:
            torch.testing.assert_close(each(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_model_with_a_rewritten_part_is_rewritten_around_it() -> None:
    """The part keeps its own graph."""
    inner, x = made("dividing")
    model = nn.Sequential(rewrite(inner)[0], nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3)).double()

    faster, changes = rewrite(model)

    assert [each.where for each in changes] == [("1", "2"), ("0",)]
    assert_same(run(model, x, training=True), run(faster, x, training=True))


@pytest.mark.parametrize("given", [torch.jit.script(nn.ReLU()), "model", None], ids=["script", "str", "None"])  # type: ignore[no-untyped-call]
def test_what_is_no_module_of_python_is_refused(given: Any) -> None:
    """With the type that was given."""
    with pytest.raises(ValueError, match=rf"^rewrite got a {type(given).__name__}, whose code it cannot change: give"):
        rewrite(given)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_less_is_alive_at_the_peak(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the up-sampled map nor the concatenation is formed, nor kept for backward."""
    always(monkeypatch)
    model, x = made("unet3+")
    faster, _ = rewrite(model)

    def step(each: nn.Module) -> None:
        with torch.set_grad_enabled(mode == "training"):
            torch.stack([y.square().sum() for y in tree_leaves(each.train(mode == "training")(x))]).sum()

    present = [x, *model.parameters(), *model.buffers()]
    before, after = (trace_peaks(partial(step, each), present, 1)[0] for each in (model, faster))

    assert after < before


def test_a_write_to_the_input_before_backward_is_an_error_and_no_wrong_gradient() -> None:
    """The op reads the small map again, where the original kept a copy of the enlarged one."""
    faster, _ = rewrite(nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(64, 8, 3)))
    x = torch.randn(1, 64, 8, 8)
    loss = faster(x).sum()

    x.zero_()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_hook_on_gradients_of_a_block_leaves_the_others_rewritten() -> None:
    """The block is called as it is, and is rewritten inside with a graph of its own."""
    model, x = made("dividing")
    seen: list[Tensor] = []
    model.get_submodule("up2").register_full_backward_hook(lambda _module, given, _results: seen.append(given[0]))
    expected = run(model, x, training=True)

    faster, changes = rewrite(model)

    assert [type(faster.get_submodule(name)).__name__ for name in ("up1", "up2")] == ["Up", "RewrittenUp"]
    assert len(ours(changes)) == 2
    assert_same(expected, run(faster, x, training=True))
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-12)
