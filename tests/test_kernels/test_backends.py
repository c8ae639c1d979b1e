from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import skipcost.kernels
from skipcost.kernels import BACKENDS, KERNELS, Backend, backends
from skipcost.kernels.backends import WAYS
from skipcost.kernels.devices import device_named
from skipcost.kernels.dispatch import winners
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.unet_models import REFERENCE, ModelSpec, build

DEVICES = ("cpu", "cuda")
Machine = Callable[[pytest.MonkeyPatch], None]


def _with_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(backends, "find_spec", lambda _name: object())
    patch.setattr(backends, "which", lambda name: f"/usr/bin/{name}")
    patch.setattr(torch, "compile", lambda module, **_: module)
    for name in ("CC", "CXX", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        patch.delenv(name, raising=False)


def _without_gpu(patch: pytest.MonkeyPatch) -> None:
    _with_gpu(patch)
    patch.setattr(torch.cuda, "is_available", lambda: False)


def _without_triton(patch: pytest.MonkeyPatch) -> None:
    _with_gpu(patch)
    patch.setattr(backends, "find_spec", lambda _name: None)


def _without_compiler(patch: pytest.MonkeyPatch) -> None:
    _with_gpu(patch)
    patch.setattr(backends, "which", lambda _name: None)


def _without_the_named_compiler(patch: pytest.MonkeyPatch) -> None:
    _with_gpu(patch)
    patch.setenv("CXX", "no-such-c++")
    patch.setattr(backends, "which", lambda name: None if name == "no-such-c++" else name)


def _with_compiling_off(patch: pytest.MonkeyPatch) -> None:
    _with_gpu(patch)
    patch.setenv("TORCH_COMPILE_DISABLE", "1")


def _with_a_python_too_new(patch: pytest.MonkeyPatch) -> None:
    def refuse(_module: nn.Module, **_options: object) -> nn.Module:
        message = "torch.compile is not supported on Python 3.99+"
        raise RuntimeError(message)

    _with_gpu(patch)
    patch.setattr(torch, "compile", refuse)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_a_title_of_one_line(name: str) -> None:
    """Tables and help show it."""
    title = BACKENDS[name].title

    assert title == title.strip()
    assert len(title.splitlines()) == 1


def test_eager_is_the_plain_reference() -> None:
    """It is what every other backend is compared with: the reference ops, and the network itself."""
    network = nn.Identity()

    assert BACKENDS["eager"].ops() is REFERENCE
    assert BACKENDS["eager"].wrap(network) is network


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own, importing Inductor
def test_compile_is_the_reference_under_torch_compile() -> None:
    """The ops are the reference's, and the weights stay the network's own."""
    network = nn.Conv2d(1, 2, 1)

    compiled = BACKENDS["compile"].wrap(network)

    assert BACKENDS["compile"].ops() is REFERENCE
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert [id(each) for each in compiled.parameters()] == [id(each) for each in network.parameters()]


def test_fused_joins_steps_and_leaves_the_rest() -> None:
    """What has a kernel, or is remembered, has a function of its own; four joined ops are added."""
    fused = BACKENDS["fused"].ops()

    other = {kind for kind, function in fused.functions.items() if REFERENCE.functions.get(kind) != function}
    assert other - set(REFERENCE.functions) == {"layer", "layer_pool", "join_layer", "join_up"}
    assert other & set(REFERENCE.functions) == {"join", "pool", "up_conv", "up_sample"}


def test_every_network_has_ops_of_its_own() -> None:
    """What training files for its backward pass is filed per network."""
    first, second = BACKENDS["fused"].ops(), BACKENDS["fused"].ops()

    assert first.functions["layer"] != second.functions["layer"]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "compile"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_every_backend_computes_the_same_network(name: str, padding: str) -> None:
    """On a CPU, where kernels leave the work to the reference, the outputs are equal to the bit."""
    spec = ModelSpec(depth=1, width=2, padding=padding)
    reference = build(spec)
    network = build(spec, BACKENDS[name].ops())
    network.load_state_dict(reference.state_dict())
    image = torch.randn(1, 1, 24, 24)

    assert torch.equal(BACKENDS[name].wrap(network)(image), reference(image))


@pytest.mark.parametrize(
    ("name", "device", "machine", "reason"),
    [
        ("eager", "cpu", _without_gpu, ""),
        ("eager", "cpu", _without_compiler, ""),
        ("eager", "cuda", _with_gpu, ""),
        ("eager", "cuda", _without_gpu, "this PyTorch sees no CUDA GPU: "),
        ("compile", "cpu", _without_triton, ""),
        ("compile", "cpu", _without_compiler, "torch.compile finds no C++ compiler 'g++': "),
        ("compile", "cpu", _without_the_named_compiler, "torch.compile finds no C++ compiler 'no-such-c++': "),
        ("compile", "cpu", _with_compiling_off, "TORCH_COMPILE_DISABLE=1 makes torch.compile run eagerly: "),
        (
            "compile",
            "cpu",
            _with_a_python_too_new,
            "torch.compile refuses (torch.compile is not supported on Python 3.9",
        ),
        ("compile", "cuda", _with_gpu, ""),
        ("compile", "cuda", _without_gpu, "this PyTorch sees no CUDA GPU: "),
        ("compile", "cuda", _without_triton, "triton is not installed: "),
        ("compile", "cuda", _without_compiler, "triton finds no C compiler: "),
        ("fused", "cpu", _with_gpu, "the fused kernels need a CUDA GPU, not device 'cpu': "),
        ("fused", "cuda", _with_gpu, ""),
        ("fused", "cuda", _without_gpu, "this PyTorch sees no CUDA GPU: "),
        ("fused", "cuda", _without_triton, "triton is not installed: "),
        ("fused", "cuda", _without_compiler, "triton finds no C compiler: "),
    ],
)
def test_a_backend_says_why_a_machine_cannot_run_it(
    name: str, device: str, machine: Machine, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty where it can; else one sentence that begins with the reason and ends with what to do."""
    machine(monkeypatch)

    answer = BACKENDS[name].why_not(device)

    assert answer.startswith(reason)
    assert bool(answer) == bool(reason)
    assert "\n" not in answer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_this_machine_gets_an_answer(name: str, device: str) -> None:
    """Whatever it lacks, the answer is one line and no exception."""
    assert len(BACKENDS[name].why_not(device).splitlines()) <= 1


def test_a_backend_is_a_value() -> None:
    """Rows are frozen, and a new one can be made of an old one."""
    row = dataclasses.replace(BACKENDS["eager"], title="another")

    assert isinstance(row, Backend)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.title = "changed"  # type: ignore[misc]


def test_the_package_exports_what_it_says() -> None:
    """Every public name can be had, and an unknown one is an AttributeError with that name in it."""
    for name in skipcost.kernels.__all__:
        assert getattr(skipcost.kernels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
        _ = skipcost.kernels.unheard_of


@pytest.mark.parametrize("op", KERNELS)
def test_every_kernel_says_what_it_is_worth(op: str) -> None:
    """The file of an op opens with what is fused, what that saves, when it loses, and on which GPUs it was tried."""
    folder = Path(skipcost.kernels.__path__[0])

    texts = [path.read_text() for path in folder.rglob("*.py")]
    (words,) = (text for text in texts if f"\ndef {op}(" in text and '"skipcost::' in text)

    assert all(each in words for each in ("What is fused", "Bytes saved", "When it loses", "Tried on"))


def _measured(label: str, case: str, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    for name, value in seconds.items():
        row = {"network": label, "case": case, "precision": "bf16", "implementation": name, "seconds": [value]}
        yield {**row, "outcome": "ok", "device": {"name": CARD.name}}


CARD = device_named("h200")
LABEL = "unet/d1/w2/concat"


@pytest.mark.parametrize(
    ("seconds", "way", "why"),
    [
        ({"fused": 1e-3, "eager": 2e-3}, "fused", "measured 1 ms (eager 2 ms)"),
        ({"fused": 3e-3, "eager": 2e-3, "compile-max": 1e-3}, "compile-max", "measured 1 ms (fused 3 ms, eager 2 ms)"),
        ({"fused": 3e-3, "folded": 2e-3}, "folded", "measured 2 ms (fused 3 ms)"),
        ({"fused": 3e-3}, "fused", "nobody measured this network at this size on this card: layer by layer"),
        ({}, "fused", "nobody measured this network at this size on this card: layer by layer"),
    ],
)
def test_a_network_runs_in_the_way_that_won(
    seconds: dict[str, float], way: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the same card at the same size and precision; where nothing of ours wins, what does."""
    rows = _measured(LABEL, backends.case_name(1, 8, 8, training=False), seconds)
    monkeypatch.setenv(winners.FOLDER, str(tmp_path))
    winners.own_file().write_text("".join(json.dumps(row) + "\n" for row in rows))
    winners.networks.cache_clear()
    network = ModelSpec.parse(LABEL).graph()

    choices = [
        backends.choose_way(network, case, "bf16", CARD)
        for case in ("n1 8x8 inference", "n1 8x8 training", "n2 8x8 inference")
    ]
    winners.networks.cache_clear()

    assert (choices[0].implementation, choices[0].why) == (way, why)
    assert {each.implementation for each in choices[1:]} == {"fused"}


@pytest.mark.parametrize("name", [name for name in WAYS if not name.startswith("compile")])
def test_every_way_runs_the_same_network(name: str) -> None:
    """The weights are shared, not copied, and the outputs agree within rounding."""
    network = build(ModelSpec.parse("unet++/d2/w4/concat"), FusedOps().ops()).eval()
    image = torch.randn(1, 1, 16, 16)

    other = WAYS[name](network)

    assert {id(each) for each in other.parameters()} == {id(each) for each in network.parameters()}
    with torch.inference_mode():
        torch.testing.assert_close(other(image), network(image), rtol=1e-4, atol=1e-4)


def test_a_fused_network_says_which_way_it_took() -> None:
    """Once per size, type and mode; on a CPU there is nothing to choose."""
    network = BACKENDS["fused"].wrap(build(ModelSpec.parse(LABEL), BACKENDS["fused"].ops()))

    for size in (8, 8, 16):
        network.eval()(torch.randn(1, 1, size, size))
    network.train()(torch.randn(2, 1, 8, 8))

    assert [case for case, _ in network.why] == ["n1 8x8 inference", "n1 16x16 inference", "n2 8x8 training"]
    assert all(choice.origin == "rule" for choice in network.why.values())
