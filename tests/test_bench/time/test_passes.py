"""Every pass of the eager program against what PyTorch dispatches: names, order, bytes and MACs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.time.passes import passes
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

CELLS = [f"{variant}/d2/w4/{skip}" for variant in VARIANTS for skip in SKIPS] + [
    "unet/d2/w4/concat/padding=valid",
    "unet/d2/w4/gated/norm=group/upsample=bilinear",
    "unet++/d2/w4/concat/head=deep/upsample=nearest",
    "unet++/d3/w4/sum/norm=none",
    "unet3+/d2/w4/gated/norm=instance",
    "unet3+/d2/w4/concat/head=deep",
    "unet3+/d2/w4/concat/head=guided/classes=1",
]
FORWARD = {  # operator to kind; `mul` and `sigmoid` are a gate's or a guided head's
    "convolution": "convolution", "native_batch_norm": "norm", "native_group_norm": "norm", "relu_": "relu",
    "max_pool2d_with_indices": "pool", "upsample_bilinear2d": "up-sampling", "upsample_nearest2d": "up-sampling",
    "cat": "merge", "add_": "merge", "add": "merge", "sigmoid": "output", "mul": "output", "amax": "output",
}  # fmt: skip
STATES = {"adamw": 2, "sgd": 1}  # exp_avg and exp_avg_sq; momentum_buffer
BACKWARD = {
    "convolution_backward": "convolution", "native_batch_norm_backward": "norm", "native_group_norm_backward": "norm",
    "threshold_backward": "relu", "max_pool2d_with_indices_backward": "pool",
    "upsample_bilinear2d_backward": "up-sampling", "upsample_nearest2d_backward": "up-sampling",
    "slice_backward": "gradient",
    "mul": "gate", "sum": "gate", "sigmoid": "gate", "sigmoid_backward": "gate",  # of both halves
}  # fmt: skip


def case_of(label: str, **values: Any) -> Case:
    """An odd size, so that maps are floored, padded up and cropped."""
    return Case(spec=ModelSpec.parse(label), height=61, width=50, batch=2, outputs="all", **values)


class Trace(TorchDispatchMode):
    """Operators with their operands and results, as (name, arguments, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen.append((func._schema.name.partition("::")[2], args, result))
        return result


def map_bytes(*values: object) -> int:
    """Bytes of everything with four dimensions: maps and weights, no vectors."""
    tensors = (each for each in tree_iter(values) if isinstance(each, torch.Tensor) and each.dim() == 4)
    return sum(each.numel() * each.element_size() for each in tensors)


def traced(call: Callable[[], object]) -> list[tuple[str, Any, Any]]:
    """What a call dispatches."""
    with Trace() as trace:
        call()
    return trace.seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("label", CELLS)
def test_inference_is_the_operators_that_torch_dispatches(label: str, precision: str) -> None:
    """One pass per operator, in order, with its bytes to the byte, and its kind."""
    case = case_of(label, precision=precision)
    subject = make_subject(case, "meta", traced=True)

    with torch.no_grad():
        seen = [each for each in traced(lambda: subject.network(subject.tensors[-1])) if map_bytes(each[1], each[2])]

    listed = passes(case)
    assert [map_bytes(args, result) for _, args, result in seen] == [each.bytes for each in listed]
    kinds = [FORWARD[name] for name, _, _ in seen]
    assert kinds == [_kind_by_name(each.kind, name) for each, (name, _, _) in zip(listed, seen, strict=True)]


def _kind_by_name(kind: str, operator: str) -> str:
    """A gate's own sum, ReLU, sigmoid and product are kinds of it; a transposed convolution is one to torch."""
    return FORWARD[operator] if kind in ("gate", "transposed convolution") else kind


@pytest.mark.parametrize("label", CELLS)
def test_macs_are_the_networks(label: str) -> None:
    """Forward once; in training three times, but for the gradient of the image."""
    inference, training = case_of(label), case_of(label, mode="training")
    forward = inference.batch * inference.graph().conv_macs(inference.height, inference.width)

    first = next(each for each in passes(inference) if each.macs)

    assert sum(each.macs for each in passes(inference)) == forward
    assert sum(each.macs for each in passes(training)) == 3 * forward - first.macs


@pytest.mark.parametrize("label", [label for label in CELLS if "guided" not in label])
def test_the_backward_pass_moves_what_torch_dispatches(label: str) -> None:
    """By kind to the byte: an operator that joins two gradients reads the shared one twice, as two would."""
    case = case_of(label, mode="training", optimizer="sgd")
    subject = make_subject(case, "meta", traced=True)

    seen: Counter[str] = Counter()
    for name, args, result in traced(subject.step):
        if name in BACKWARD:
            seen[BACKWARD[name]] += _backward_bytes(name, args, result)
        elif name in ("add", "add_") and _is_map(result, subject.network):
            seen["add"] += map_bytes(args, result)

    ours: Counter[str] = Counter()
    for each in passes(case):
        if each.name.startswith("gradients of") or (each.kind in ("merge", "gate") and "sum" in each.name):
            ours["add"] += each.bytes
        elif each.kind == "gate":
            if not each.name.endswith("relu"):
                ours["gate"] += each.bytes
            elif each.name.startswith("backward of"):
                ours["relu"] += each.bytes
        elif each.name.startswith("backward of") and each.kind != "loss":
            ours["convolution" if each.macs else each.kind] += each.bytes
    assert {kind: moved for kind, moved in seen.items() if moved} == dict(ours)


def _is_map(result: torch.Tensor, network: torch.nn.Module) -> bool:
    """Whether a sum is one of maps: the optimizer's are of weights."""
    return (
        result.dim() == 4
        and result.shape[0] == 2
        and tuple(result.shape) not in {tuple(each.shape) for each in network.parameters()}
    )


def _backward_bytes(name: str, args: Any, result: Any) -> int:
    """Operands and results; max-pool does not read its input again, a convolution's two gradients run one by one."""
    moved = map_bytes(args, result)
    if name == "max_pool2d_with_indices_backward":
        return moved - map_bytes(args[1])
    if name == "convolution_backward":
        return moved + (map_bytes(args[0]) if result[0] is not None else -map_bytes(args[2]))
    return moved


@pytest.mark.parametrize("label", CELLS)
@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_names_tell_passes_apart(label: str, mode: str) -> None:
    """Times are kept by name; only sums of gradients may share one."""
    names = [each.name for each in passes(case_of(label, mode=mode)) if not each.name.startswith("gradients of")]

    assert len(names) == len(set(names))


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_the_optimizer_reads_and_writes_parameters_and_state_once(optimizer: str) -> None:
    """Itself, its gradient and its states are read, itself and its states written; in fp32 under mixed precision."""
    states = STATES[optimizer]
    for precision, size in (("fp32", 4), ("bf16", 2), ("amp-bf16", 4)):
        case = case_of(CELLS[0], mode="training", optimizer=optimizer, precision=precision)

        last = passes(case)[-1]

        assert last.bytes == case.graph().params() * (3 + 2 * states) * size


def test_mixed_precision_is_16_bit_maps_with_casts() -> None:
    """Maps move as in bf16; what is added are the casts of weights, image and gradients, and fp32 parameters."""
    plain, mixed = (passes(case_of(CELLS[0], mode="training", precision=name)) for name in ("bf16", "amp-bf16"))

    assert [each for each in mixed if each.kind not in ("cast", "optimizer")] == [
        each for each in plain if each.kind != "optimizer"
    ]
    assert [each.name for each in mixed if each.kind == "cast"] == ["casts to 16 bits", "casts of gradients"]


def test_maps_grow_with_the_batch_and_weights_do_not() -> None:
    """Twice the batch is less than twice the bytes, by exactly the weights, which are read once."""
    one, two, three = (sum(each.bytes for each in passes(replace(case_of(CELLS[0]), batch=n))) for n in (1, 2, 3))

    weights = sum(conv.weights for conv in case_of(CELLS[0]).graph().convs())
    assert three - two == two - one
    assert 2 * one - two == 4 * weights


def test_a_size_that_leaves_no_pixel_is_refused() -> None:
    """The refusal is geometry's."""
    with pytest.raises(ValueError, match="leaves no pixel"):
        passes(replace(case_of("unet/d4/w4/concat/padding=valid"), height=32))
