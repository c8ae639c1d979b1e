"""`rewrite` as a whole: the same function in both modes, fewer MACs, and what is done with the model afterwards."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rewrite_checks import MODELS, UNet3Plus, always, assert_same, made, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from user_models import NestedUNet, PaddingUNet, pickled

from skipcost.kernels import rewrite
from skipcost.kernels.backends import BACKENDS
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.kernels.rewriting.rewrite import Running
from skipcost.unet_models import ModelSpec, build

BREAKS = "ignore:Dynamo does not know how to trace:UserWarning", "ignore:The .grad attribute:UserWarning"
pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh"),
    *map(pytest.mark.filterwarnings, BREAKS),  # where Dynamo breaks a graph, and behind that
]


OTHERS = (("tap-first", False), ("direct", True), ("direct", False))


@pytest.mark.parametrize(
    ("name", "chosen", "training"),
    [(name, *way) for at, name in enumerate(MODELS) for way in (("tap-first", True), OTHERS[at % len(OTHERS)])],
)
def test_results_gradients_and_statistics_are_the_models(
    name: str, chosen: str, *, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12 in float64, whichever form each call takes, in both modes; bit by bit where nothing changes place."""
    model, x = made(name)
    always(monkeypatch, taken=chosen == "tap-first")

    faster, _ = rewrite(model)

    expected, got = (run(each, x, training=training) for each in (model, faster))
    assert_same(expected, got, 0 if chosen == "direct" and name != "pointwise" else 1e-12)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        (name, at % 2 == 0)
        for at, name in enumerate(("dividing", "nested", "skipping", "unet3+", "branching", "pointwise"))
    ],
)
def test_fewer_macs_run(name: str, *, training: bool) -> None:
    """PyTorch's own counter says so, in both modes."""
    model, x = made(name)

    faster, _ = rewrite(model)

    assert run(faster, x, training=training).macs < run(model, x, training=training).macs


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_transposed_convolutions_are_composed_at_inference(
    inference: Callable[[], Any], composing: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12 in float64, at sizes that do not divide, whatever becomes of the weights; elsewhere it says why not."""
    always(monkeypatch)
    model, x = made("transposed")
    faster, changes = rewrite(model, x)
    why = {each.why.partition(":")[0] for each in changes}

    with inference():
        results = [(faster(x), model(x))]
        model.up1.up.weight.data.mul_(2)
        model.up2.conv.double_conv[0].load_state_dict({"weight": torch.ones(8, 16, 3, 3)})
        results += [(faster(x), model(x)) for _ in range(2)]
        model.up2.up = copy.deepcopy(model.up2.up)
        model.up2.up.weight.data.zero_()
        faster.up2.up.weight = model.up2.up.weight
        results += [(faster(x), model(x)) for _ in range(2)]

    assert why == {"gradients may be asked for, and composed weights have none"}
    assert [each.after for each in changes] == ["", "", "composed_up_conv", "composed_up_conv"]
    assert len(composing) == 2 + 0 + 2 + 2 + 2
    for ours, its in results:
        torch.testing.assert_close(ours, its, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("variant", ["unet", "unet3+"])
def test_a_network_of_the_suite_runs_what_its_backend_does(variant: str) -> None:
    """The same program, so the same numbers to the bit; its list names what stands for several ops."""
    model = build(ModelSpec(variant=variant, depth=2, width=8)).eval()
    alike = copy.deepcopy(model)
    alike.use(BACKENDS["rewritten"].ops())
    x = torch.randn(1, 1, 32, 32)

    faster, changes = rewrite(model)

    assert [each.kind for each in faster.program.ops if each.parts] == [each.after for each in changes] != []
    assert not any(each.parts for each in model.program.ops)
    with torch.no_grad():
        assert all(map(torch.equal, tree_leaves(faster(x)), tree_leaves(alike(x))))


def test_every_place_is_named_in_words_as_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers by name, functions by that of their module; with an example at once, in evaluation."""
    always(monkeypatch)
    model = PaddingUNet(bilinear=True).train()
    x = torch.randn(1, 3, 16, 24)

    later, at_first_call = rewrite(model)
    faster, changes = rewrite(model, x)
    before = list(at_first_call)
    later(x)

    assert [(each.where, each.before, each.after) for each in changes] == [
        (
            (f"{up}.up", f"{up}.pad", f"{up}.cat", f"{up}.conv.double_conv.0"),
            "Upsample -> pad -> cat -> Conv2d",
            "tap_first",
        )
        for up in ("up1", "up2")
    ]
    assert before == []
    assert at_first_call == changes
    assert all(each.training for each in faster.modules())
    assert model.inc.double_conv[1].num_batches_tracked == 1  # by `later`, in training, and not by the example


def test_a_place_is_told_once_for_each_outcome() -> None:
    """Compiled again for another mode and another size, only what is new is added."""
    faster, changes = rewrite(made("dividing")[0])

    for training in (False, True):
        for size in (16, 32):
            faster.train(training)(torch.randn(1, 3, size, 24, dtype=torch.float64))

    assert len(changes) == 2


@pytest.mark.parametrize("name", MODELS)
def test_names_and_tensors_are_the_very_same(name: str) -> None:
    """state_dict, parameters and modules: same keys in the same order, same memory behind the tensors."""
    model, _ = made(name)

    faster, _ = rewrite(model)

    assert [name for name, _ in faster.named_modules()] == [name for name, _ in model.named_modules()]
    theirs, its = faster.state_dict(), model.state_dict()
    assert list(theirs) == list(its)
    assert [each.data_ptr() for each in theirs.values()] == [each.data_ptr() for each in its.values()]
    assert type(faster) is type(model)


def test_the_given_model_is_left_alone() -> None:
    """It keeps its classes and attributes."""
    model = NestedUNet()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}

    rewrite(model)

    assert type(model) is NestedUNet
    assert {name: module.__dict__ for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("duplicate", "name"), [(copy.deepcopy, "nested"), (pickled, "supervised"), (copy.deepcopy, "skipping")]
)
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


class Switched(nn.Module):
    """Reads attributes, throws dice, and has a block to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(64, 32, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Conv2d(32, 2, 1)
        self.scale, self.both, self.dice = 1.0, False, False

    def forward(self, x: Tensor) -> Any:
        """(N, 64, h, w) -> (N, 2, 2h, 2w), or a list with the input."""
        y = self.scale * self.head(self.norm(self.conv(self.up(x))))
        y = -y if self.dice and random.random() < 0.5 else y  # noqa: S311 - dice
        return [y, x] if self.both else y


IMAGE = torch.ones(1, 64, 16, 16)


def test_what_is_set_afterwards_is_seen() -> None:
    """Attributes, a head and a block replaced, dice: as the model's own forward does it."""
    model: Any = Switched().eval()
    faster: Any = rewrite(model, IMAGE)[0]

    for each in (model, faster):
        each.scale = 3.0
    torch.testing.assert_close(faster(IMAGE), model(IMAGE))
    faster.head = model.head = nn.Conv2d(32, 5, 1)
    torch.testing.assert_close(faster(IMAGE), model(IMAGE))
    faster.up = model.up = nn.ConvTranspose2d(64, 64, 2, stride=2)
    torch.testing.assert_close(faster(IMAGE), model(IMAGE))
    faster.dice, expected = True, model(IMAGE)
    signs = {bool(torch.allclose(faster(IMAGE), expected, atol=1e-5)) for _ in range(16)}
    faster.both = True

    assert signs == {True, False}
    assert isinstance(faster(IMAGE), list)


def _twice(self: Switched, x: Tensor) -> Tensor:
    return 2 * Switched.forward(self, x)


def test_a_forward_that_was_replaced_on_the_object_runs_on_the_new_modules(taken: list[tuple[int, ...]]) -> None:
    """With their mode: no statistics of the given model move."""
    model = Switched()
    model.forward = types.MethodType(_twice, model)  # type: ignore[method-assign]

    faster, _ = rewrite(model.train())
    result = faster.eval()(IMAGE)

    assert model.norm.num_batches_tracked == 0
    assert taken
    torch.testing.assert_close(result, model.eval()(IMAGE))


def test_many_models_of_one_class_are_all_compiled() -> None:
    """PyTorch stops after eight graphs of one Python function, unless each model counts for itself."""
    found = [rewrite(Switched().eval(), IMAGE)[1] for _ in range(10)]

    assert all(len(changes) == 1 for changes in found)


def _export(model: nn.Module, x: Tensor, *, strict: bool = False) -> Any:
    program = torch.export.export(model, (x,), strict=strict)
    assert all("skipcost" not in str(node.target) for node in program.graph.nodes)
    return program.module()(x)


def _script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,), check_trace=False)(x)  # type: ignore[no-untyped-call]


def _symbolic(model: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(model)(x)


def _mapped(model: nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(model)(x[None])[0]


def _forward_mode(model: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[0]


def _counted(model: nn.Module, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        result = model(x)
    assert counter.get_total_flops() > 0
    return result


def _compiled(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def _dynamic(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager", dynamic=True)(x)


WAYS = [
    _export,
    partial(_export, strict=True),
    _script,
    _symbolic,
    _mapped,
    _forward_mode,
    _counted,
    _compiled,
    _dynamic,
]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
def test_tracers_transforms_and_modes_see_the_original(
    way: Callable[[nn.Module, Tensor], Any], taken: list[tuple[int, ...]]
) -> None:
    """They get PyTorch's own operators, whole, and the result is the original's; afterwards it is rewritten as ever."""
    model, x = made("dividing")
    faster, _ = rewrite(model)

    with torch.no_grad():
        result = way(faster, x)
        expected = model(x)

    torch.testing.assert_close(result, expected)
    assert not taken
    faster(x)
    assert taken


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_op_runs_with_and_without_gradients(
    context: Callable[[], Any], taken: list[tuple[int, ...]]
) -> None:  # fmt: skip
    """Also where no tensor keeps a version."""
    model, x = made("dividing")
    faster, _ = rewrite(model)

    with context():
        result = faster(x)
        expected = model(x)

    assert taken
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
@pytest.mark.parametrize(
    ("name", "way"), [("dividing", "bf16"), ("nested", "fp32"), ("unet3+", "autocast"), ("unet3+", "bf16")]
)
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
def test_hooks_that_come_later_are_called(name: str) -> None:
    """On calls and on gradients, with what the module's own forward gives them."""
    model, x = made("dividing")
    faster, _ = rewrite(model, x)
    maps: list[Tensor] = []
    gradients: list[Tensor] = []

    for each in (model, faster):
        module = each.get_submodule(name)
        module.register_forward_hook(lambda _module, _given, result: maps.append(result))
        module.register_full_backward_hook(lambda _module, given, _results: gradients.append(given[0]))
        each(x).square().sum().backward()

    assert len(maps) == len(gradients) == 2
    torch.testing.assert_close(*maps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_parts_in_another_mode_keep_it() -> None:
    """Frozen norms of a model in training."""
    model, x = made("supervised")
    model.train().get_submodule("conv0_0").eval()
    torch.manual_seed(0)
    expected = model(x)

    torch.manual_seed(0)
    faster, _ = rewrite(model)

    for one, other in zip(tree_leaves(faster(x)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rewriting_twice_is_rewriting_once() -> None:
    """The second wraps nothing round the first."""
    model, x = made("dividing")
    once, first = rewrite(model, x)

    twice, second = rewrite(once, x)

    assert first == second
    assert isinstance(twice.forward, Running)
    assert twice.forward.own is None
    torch.testing.assert_close(twice(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_model_with_a_rewritten_part_is_rewritten_as_a_whole() -> None:
    """The part is followed like any other."""
    inner, x = made("dividing")
    model = nn.Sequential(rewrite(inner)[0], nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3)).double()

    faster, changes = rewrite(model, x)

    assert [each.where[-1] for each in changes] == ["0.up1.conv.double_conv.0", "0.up2.conv.double_conv.0", "2"]
    assert_same(run(model, x, training=True), run(faster, x, training=True))


@pytest.mark.parametrize("given", ["model", None, torch.relu], ids=["str", "None", "function"])
def test_what_is_no_module_is_refused(given: Any) -> None:
    """With the type that was given."""
    with pytest.raises(ValueError, match=rf"^rewrite got a {type(given).__name__}, whose code it cannot follow: give"):
        rewrite(given)


def test_a_write_to_the_input_before_backward_is_an_error_and_no_wrong_gradient() -> None:
    """The op reads the small map again, where the original kept a copy of the enlarged one."""
    faster, _ = rewrite(nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(64, 8, 3)))
    x = torch.randn(1, 64, 8, 8)
    loss = faster(x).sum()

    x.zero_()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
