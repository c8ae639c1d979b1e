"""What is done with a fused model afterwards: trained, loaded, moved, copied, compiled, it stays the model it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_checks import Called, assert_as_good, made, ours, outputs, total
from torch import Tensor, nn
from user_models import MODELS, PaddingUNet, pickled, trained

from skipcost.kernels import fuse
from skipcost.kernels.rewriting.rewiring import Rewired

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MODELS)
def test_names_and_tensors_are_the_very_same(name: str) -> None:
    """state_dict, parameters, buffers and modules: same keys in the same order, same objects behind the tensors."""
    model, _ = made(name)

    fused, _ = fuse(model)

    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        theirs, its = dict(getattr(fused, kind)()), dict(getattr(model, kind)())
        assert list(theirs) == list(its)
        assert all(theirs[name] is its[name] for name in its)
    assert list(fused.state_dict()) == list(model.state_dict())


def test_a_fused_model_is_still_what_it_was() -> None:
    """Class, attributes and signature stay: training scripts read model.n_classes."""
    fused, _ = fuse(PaddingUNet())

    assert isinstance(fused, PaddingUNet)
    assert fused.n_classes == 2
    assert type(fused).__name__ == "FusedPaddingUNet"
    with torch.no_grad():
        assert fused.eval()(x=torch.ones(1, 3, 8, 8)).shape == (1, 2, 8, 8)


def test_the_given_model_is_left_alone() -> None:
    """It keeps its class, its mode and its hooks, whatever is done with the fused one."""
    model = PaddingUNet()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}

    fused, _ = fuse(model)
    fused.eval()
    outputs(fused, torch.ones(1, 3, 8, 8))
    fused.inc.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]

    assert type(model) is PaddingUNet
    assert {name: module.__dict__ for name, module in model.named_modules()} == before


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    """Compare the gradients of all parameters, bit by bit."""
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_originals_bit_by_bit(name: str) -> None:
    """Gradients and running statistics of a step in training mode are those of a copy that was not fused."""
    model, x = made(name)
    other = copy.deepcopy(model).train()
    fused, _ = fuse(model)
    fused.train()

    for each in (fused, other):
        total(each, x).backward()

    assert_same_gradients(model, other)
    assert all(torch.equal(*buffers) for buffers in zip(model.buffers(), other.buffers(), strict=True))


def test_a_model_that_was_trained_is_fused_for_evaluation() -> None:
    """The mode in which it is given does not matter, and both models have a mode of their own."""
    model, x = made("padding")
    model.train()

    fused, changes = fuse(model)
    was_training = fused.training
    fused.eval()

    assert was_training
    assert model.training
    assert len(ours(changes)) == 10
    assert_as_good(fused, model.eval(), x)


def test_gradients_in_evaluation_are_the_originals_and_a_warning_says_so() -> None:
    """Fine-tuning with frozen statistics works, and who forgets no_grad learns why nothing is faster."""
    model, x = made("padding")
    other = copy.deepcopy(model)
    fused, _ = fuse(model)

    with pytest.warns(RuntimeWarning, match=r"^FusedPaddingUNet runs as the original where gradients may be asked"):
        total(fused, x).backward()

    total(other, x).backward()
    assert_same_gradients(model, other)


def test_a_gradient_for_the_input_is_the_originals() -> None:
    """Frozen weights, as when looking for what a network sees."""
    model, x = made("padding")
    fused, _ = fuse(model.requires_grad_(False))

    with pytest.warns(RuntimeWarning, match="gradients may be asked for"):
        (gradient,) = torch.autograd.grad(total(fused, x.requires_grad_()), x)

    assert torch.equal(gradient, torch.autograd.grad(total(model, x), x)[0])


def test_frozen_weights_need_no_no_grad() -> None:
    """Where nothing can ask for a gradient the ops run, and the result has none."""
    model, x = made("dividing")
    fused, _ = fuse(model.requires_grad_(False), choose=lambda _call, _x: "triton")

    with Called() as called:
        result = fused(x)

    assert called.names
    assert not result.requires_grad


def test_a_norm_in_training_takes_the_batchs_statistics() -> None:
    """Also where the rest is in evaluation: result and running statistics are the original's."""
    model, x = made("padding")
    other = copy.deepcopy(model)
    fused, _ = fuse(model)
    for each in (fused, other):
        each.get_submodule("up1.conv.double_conv.1").train()

    results = [*outputs(fused, x), *outputs(other, x)]

    assert torch.equal(*results)
    assert all(torch.equal(*buffers) for buffers in zip(model.buffers(), other.buffers(), strict=True))


def changed(model: nn.Module) -> nn.Module:
    """Return a model of the same kind with other weights."""
    return trained(copy.deepcopy(model), seed=5)


def _load(model: nn.Module, fused: nn.Module) -> None:
    fused.load_state_dict(changed(model).state_dict())


def _assign(model: nn.Module, fused: nn.Module) -> None:
    fused.load_state_dict(changed(model).state_dict(), assign=True)


@torch.no_grad()
def _in_place(model: nn.Module, _fused: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.mul_(2)


def _step(model: nn.Module, fused: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    total(model, torch.ones(2, 3, 8, 8)).backward()
    optimizer.step()
    model.eval()
    fused.zero_grad()


def _data(model: nn.Module, fused: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)
    fused.eval()


def _wider(_model: nn.Module, fused: nn.Module) -> None:
    fused.double()


def _narrower(_model: nn.Module, fused: nn.Module) -> None:
    fused.bfloat16().float()


@pytest.mark.parametrize("change", [_load, _assign, _in_place, _step, _data, _wider, _narrower])
def test_results_follow_the_weights(change: Callable[[nn.Module, nn.Module], None]) -> None:
    """After loading, steps, writes and conversions on either of the two, the fused model is the model."""
    model, x = made("padding")
    fused, _ = fuse(model)
    before = outputs(fused, x)

    change(model, fused)

    x = x.to(next(model.parameters()).dtype)
    assert_as_good(fused, model, x)
    assert not torch.equal(outputs(fused, x)[0].float(), before[0])


def test_buffers_and_weights_move_with_the_model() -> None:
    """What is moved in one of the two is moved in both, so that none is left between two devices."""
    model, x = made("padding")
    fused, _ = fuse(model)
    outputs(fused, x)

    fused.to("meta")

    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"meta"}
    assert outputs(fused, x.to("meta"))[0].shape == (2, 2, 19, 22)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", ["padding", "branching", "resnet"])
def test_a_copy_is_fused_and_has_weights_of_its_own(duplicate: Callable[[nn.Module], nn.Module], name: str) -> None:
    """Deep copies and pickles, of models fused as a whole and of those fused inside."""
    model, x = made(name)
    fused, _ = fuse(model)
    expected = outputs(fused, x)

    twin = duplicate(fused)
    _in_place(model, fused)

    assert type(twin).__name__ == type(fused).__name__
    assert [type(each) for each in twin.modules() if isinstance(each, Rewired)] != []
    assert torch.equal(outputs(twin, x)[0], expected[0])
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_as_good(twin, changed(_loaded(twin, model)), x)


def _loaded(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Give the twin the weights that `changed` gives to models, and return a model."""
    twin.load_state_dict(changed(model).state_dict())
    return model


def test_results_are_laid_out_as_the_originals() -> None:
    """.view and .numpy work on them; channels_last inputs give channels_last results."""
    model, x = made("padding")
    fused, _ = fuse(model)

    plain, last = outputs(fused, x)[0], outputs(fused, x.contiguous(memory_format=torch.channels_last))[0]

    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def _compile(model: nn.Module, x: Tensor) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def _export(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model, (x,))
    assert all("skipcost" not in str(node.target) for node in program.graph.nodes)
    return program.module()(x)


def _script(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, (x,))(x)  # type: ignore[no-untyped-call]


def _symbolic(model: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(model)(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [_compile, _export, _script, _symbolic])
def test_compilers_and_tracers_see_the_original(way: Callable[[nn.Module, Tensor], Any]) -> None:
    """They get PyTorch's own operators, whole, and the result is the original's."""
    model, x = made("dividing")
    fused, _ = fuse(model)

    with torch.no_grad():
        result = way(fused, x)

    torch.testing.assert_close(result, *outputs(model, x))


def test_a_model_with_a_compiled_call_is_fused_all_the_same() -> None:
    """What `model.compile()` left on it calls the original, and stays with that."""
    model, x = made("dividing")
    model.compile(backend="eager")

    fused, _ = fuse(model, choose=lambda _call, _x: "triton")

    with Called() as called:
        outputs(fused, x)
    assert called.names
