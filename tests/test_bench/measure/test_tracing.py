"""What is counted of anybody's module, by both doors: a row of a sweep and `assert_cost` tell the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import custom_models
import pytest
import torch
from torch import nn

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.cases.modules import parameter_bytes
from skipcost.bench.cases.record import Result
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.measure.budget import Cost, cost_of, passed
from skipcost.bench.measure.counting import predicted_peaks, traced_peaks
from skipcost.bench.measure.run import latency
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.timing import Budget
from skipcost.bench.measure.tracing import count_convolutions, count_operators, count_params

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
IMAGE = torch.zeros(1, 1, 16, 8)
PIXELS = 16 * 8
TWO = {"params": 98, "conv_macs": 88 * PIXELS, "activations": 10 * PIXELS}
BRIEF = Budget(seconds=0.01, noise=0.5, least=2, warmup_seconds=0.01)


def case_of(path: str, arguments: dict[str, object] | None = None, **fields: Any) -> Case:
    """A small case of one of the factories beside the tests."""
    return Case(spec=Factory(f"custom_models:{path}", json.dumps(arguments or {})), height=16, width=8, **fields)


def made(path: str, arguments: dict[str, object] | None = None) -> nn.Module:
    """What a user would hand to `assert_cost`."""
    return getattr(custom_models, path)(**(arguments or {}))  # type: ignore[no-any-return]


def counted(case: Case) -> dict[str, Result]:
    """The rows of what is counted, by metric."""
    return {each.metric: each for each in (count_params(case), *count_convolutions(case))}


def both(path: str, arguments: dict[str, object] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The counts of a sweep's rows and those of `assert_cost`."""
    rows = {name: row.samples[0] for name, row in counted(case_of(path, arguments)).items()}
    totals = cost_of(made(path, arguments), [IMAGE]).totals
    return rows, {name: totals[name] for name in rows}


SHARED = [("Tied", 9, 36), ("Views", 18, 72), ("Overlapping", 18, 36)]


@pytest.mark.parametrize(("path", "params", "size"), SHARED, ids=[path for path, *_ in SHARED])
def test_a_shared_weight_counts_once_and_runs_as_often_as_it_runs(path: str, params: int, size: int) -> None:
    """Parameters count by the parameter, bytes by the memory behind them, MACs by the run, wherever it is made."""
    rows, totals = both(path)

    assert rows == totals == {"params": params, "conv_macs": 18 * PIXELS, "activations": 2 * PIXELS}
    assert predicted_peaks(case_of(path))[2] == {"parameter_bytes": size}
    peak = cost_of(made(path), [IMAGE]).totals["peak_bytes"]
    assert peak == predicted_peaks(case_of(path))[0] == size + 4 * 3 * PIXELS


WAYS = {
    "functional": TWO,
    "spectral_norm": TWO,
    "weight_norm": TWO | {"params": 106},
    "orthogonal": TWO,
    "old_weight_norm": TWO | {"params": 106},
    "lock": TWO,
    "recurrent": TWO | {"params": 98 + 2 * (4 * 8 * 8 + 4 * 8)},
    "lazy": TWO,
    "looking": TWO,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_convolution_counts_however_it_is_written(way: str) -> None:
    """By the operator, not by the type of a module; what cannot be copied or has no sizes yet is counted, too."""
    rows, totals = both("Two", {"way": way})

    assert rows == totals == WAYS[way]


@pytest.mark.parametrize("by", ["DataParallel", "script", "trace", "compile", "compile in place", "compiled part"])
def test_a_wrapped_model_costs_what_is_in_it(by: str) -> None:
    """Wrappers, scripts and compilers change no count."""
    assert both("wrapped", {"by": by}) == (TWO, TWO)


@pytest.mark.parametrize("by", ["spectral_norm", "functional", "script", "compiled part"])
def test_layers_add_up_to_the_total(by: str) -> None:
    """Every convolution belongs to the layer that runs it, and what runs in none to the module itself, by its name."""
    outside = "Two, outside its layers"
    expected = {"functional": {outside: 88}, "script": {"Sequential, outside its layers": 88}}.get(
        by, {"a": 72, "b": 16}
    )
    path = "wrapped" if by in {"script", "compiled part"} else "Two"

    cost = cost_of(made(path, {"by" if path == "wrapped" else "way": by}), [IMAGE])

    assert cost.layers["conv_macs"] == {name: macs * PIXELS for name, macs in expected.items()}
    assert sum(cost.layers["activations"].values()) == cost.totals["activations"]
    assert list(cost.layers["params"].values()) == [80, 18]
    called = {name: 4 * maps * PIXELS for name, maps in (("a", 8), ("b", 2)) if name in expected}
    assert cost.layers["peak_bytes"] == called, "what a leaf returns, and not what computes its weight"


def test_a_budget_of_activations_is_passed_in_sight() -> None:
    """The sentence names the layer, though its weight is computed."""
    said = passed(cost_of(made("Two", {"way": "spectral_norm"}), [IMAGE]), {"activations": 600}, "Two")

    assert said == [
        "Two has activations = 1,280 (1.28 k), 113.3% over its budget of 600 (600); a costs most, 1,024 (1.02 k)"
    ]


def test_the_model_that_cannot_be_copied_is_as_it_was() -> None:
    """It is run itself, on stand-ins for its tensors: not a value, a mode or an attribute is another afterwards."""
    model = made("Two", {"way": "old_weight_norm"}).eval()
    before, attributes = dict(model.state_dict(keep_vars=True)), dict(vars(model.a))
    values = {name: each.clone() for name, each in before.items()}

    cost_of(model, [IMAGE], "training")

    after = dict(model.state_dict(keep_vars=True))
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert {name: id(each) for name, each in vars(model.a).items()} == {n: id(each) for n, each in attributes.items()}
    assert not model.training
    assert all(each.grad is None for each in model.parameters())


def test_a_forward_that_is_an_object_s_own_reads_what_is_counted() -> None:
    """A function in the place of forward holds on to the model that it was written for: that one is run."""
    model = made("Two")
    model.forward = lambda image: model.b(torch.relu(model.a(image)))  # type: ignore[method-assign, operator]

    cost = cost_of(model, [IMAGE])

    assert {name: cost.totals[name] for name in TWO} == TWO
    assert cost.remarks["params"] == ""
    assert {each.device.type for each in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("way", ["lock", "looking", "recurrent"])
def test_a_run_leaves_gradients_and_weights_alone(way: str) -> None:
    """With data or without, what a user's model holds stays; its gradients are not counted as new ones would be."""
    model = made("Two", {"way": way})
    fresh = cost_of(model, [IMAGE], "training").totals
    for each in model.parameters():
        each.grad = torch.ones_like(each)

    again = cost_of(model, [IMAGE], "training").totals

    assert again == fresh
    assert all(bool((each.grad == 1).all()) for each in model.parameters() if each.grad is not None)
    assert isinstance(model(IMAGE), torch.Tensor)


def test_no_convolution_is_none() -> None:
    """A network of pooling and resizing has 0 MACs and 0 activations, by both doors."""
    assert both("Pooling") == ({"params": 0, "conv_macs": 0, "activations": 0},) * 2


def test_quantised_convolutions_count_and_their_weights_are_said_to_be_packed() -> None:
    """Int8 convolutions multiply as often as others; a transposed one by its input; 0 parameters is explained."""
    rows, cost = counted(case_of("int8")), cost_of(made("int8"), [IMAGE])

    assert rows["conv_macs"].samples[0] == cost.totals["conv_macs"] == (72 + 8 * 12) * PIXELS
    assert rows["activations"].samples[0] == cost.totals["activations"] == (8 + 3 * 4) * PIXELS
    note = "packed weights are no parameters and not in it: Conv2d (1), ConvTranspose2d (1)"
    assert (rows["params"].samples, rows["params"].note, cost.remarks["params"]) == ((0,), note, note)


def test_a_frozen_script_says_where_its_weights_are() -> None:
    """0 parameters of a model that convolves is told."""
    row = count_params(case_of("wrapped", {"by": "frozen"}))

    assert list(row.samples) == [0]
    assert "what a ScriptModule holds as constants" in row.note


def test_a_convolution_without_a_formula_is_named_and_held_to_no_budget() -> None:
    """Its outputs count; MACs that are not known let no budget hold."""
    rows, cost = counted(case_of("Uncounted")), cost_of(made("Uncounted"), [IMAGE])

    said = "convolutions whose MACs are not known are not in it: aten::conv_tbc (1)"
    assert (rows["conv_macs"].samples, rows["conv_macs"].note) == ((0,), said)
    assert rows["activations"].samples[0] == cost.totals["activations"] == PIXELS
    assert passed(cost, {"conv_macs": 10**9}, "Mine") == [f"Mine cannot be held to conv_macs=1,000,000,000: {said}"]


@pytest.mark.parametrize("way", ["plain", "looking"])
def test_parameters_that_nothing_reads_are_told(way: str) -> None:
    """Beside the number stand how many are in layers that never ran, and in which; those of training ran there."""
    case = case_of("Cut", {"way": way})

    row, trained = count_params(case), count_params(case_of("Cut", {"way": way}, mode="training"))

    assert list(row.samples) == list(trained.samples) == [98 + 4672 + 128 + 6]
    assert row.note == "4.81 k of 4.90 k parameters are in layers that never ran: encoder, aux"
    assert row.detail["never_ran"] == {"encoder": 4800, "aux": 6}
    assert trained.detail["never_ran"] == {"encoder": 4800}
    said = passed(cost_of(made("Cut", {"way": way}), [IMAGE]), {"params": 100}, "Cut")
    assert said[0].endswith("encoder.0 costs most, 4,672 (4.67 k); " + row.note)


def test_a_shared_weight_that_one_of_two_layers_reads_is_read() -> None:
    """What never ran is told by the memory that operators read, not by the layer."""
    assert cost_of(made("Once"), [IMAGE]).remarks["params"] == count_params(case_of("Once")).note == ""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_complex_weights_stay_complex(precision: str) -> None:
    """A precision is about real numbers: 32 complex ones have 256 bytes in any."""
    case = case_of("Spectral", precision=precision)

    assert parameter_bytes(make_subject(case, "meta").network) == 32 * 8 + 4 * (4 if precision == "fp32" else 2)
    if precision == "fp32":
        assert predicted_peaks(case)[0] == cost_of(made("Spectral"), [IMAGE]).totals["peak_bytes"]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("dtype", "precision"), [("float16", "fp32"), ("float64", "fp32"), ("bfloat16", "bf16")])
def test_weights_of_another_type_take_the_case_s(dtype: str, precision: str, mode: str) -> None:
    """A half or double factory runs in both modes; where its type is not the case's, the rows say so."""
    case = case_of("of_type", {"name": dtype}, precision=precision, mode=mode)
    make_subject(case, "cpu").step()

    row = traced_peaks(case)[0]

    said = f"the factory's weights are {dtype}: made float32, as precision=fp32 says"
    assert row.note == (said if precision == "fp32" else "")
    assert row.detail["parameter_bytes"] == 98 * (4 if precision == "fp32" else 2)
    assert said in latency(case, BRIEF).note or precision != "fp32"


COMPILED = [("wrapped", {"by": by}) for by in ("compile", "compile in place", "compiled part", "compiled forward")]


@pytest.mark.parametrize(("path", "arguments"), [*COMPILED, ("WithCompiledFunction", {})], ids=str)
@pytest.mark.parametrize("first", [count_convolutions, count_operators, traced_peaks], ids=lambda each: each.__name__)
def test_what_is_counted_first_is_compiled_later(
    first: Callable[[Case], object], path: str, arguments: dict[str, object]
) -> None:
    """Counting runs what was written and compiles nothing; a later call of the same code is compiled."""
    torch.compiler.reset()
    custom_models.MARKS.clear()
    case = case_of(path, arguments)

    first(case)
    counted_marks = len(custom_models.MARKS)
    make_subject(case, "cpu").step()

    assert (counted_marks, len(custom_models.MARKS) > 0) == (0, True)


@pytest.mark.parametrize(("path", "arguments"), [("wrapped", {"by": "compile"}), ("fused", {})])
def test_rows_that_compiling_would_change_say_what_they_are_of(path: str, arguments: dict[str, object]) -> None:
    """Operators and peaks are those of the model as written; MACs are the same either way and need no word."""
    case = case_of(path, arguments)

    said = "counted on the model as it is written: what torch.compile, fuse or rewrite makes of it is not in it"
    assert count_operators(case).note == traced_peaks(case)[0].note == said
    assert counted(case)["conv_macs"].note == ""


@pytest.mark.parametrize(("form", "word"), [("text", "str"), ("empty", "a list of nothing")])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_forward_without_a_tensor_has_no_numbers(form: str, word: str, mode: str) -> None:
    """What returns no tensor may have run nothing: every row says what came instead, those of time and of counts."""
    case = case_of("Tiny", {"form": form}, mode=mode)
    calls = (count_params, count_convolutions, count_operators, predicted_peaks, lambda each: latency(each, BRIEF))

    for call in calls:
        with pytest.raises(UnsupportedError, match=f"the model returned {word}, no tensor: have its forward return"):
            call(case)
    with pytest.raises(ValueError, match=f"the model returned {word}, no tensor"):
        cost_of(made("Tiny", {"form": form}), [IMAGE], mode)


def test_training_without_parameters_is_refused_in_a_sentence() -> None:
    """An optimizer has nothing to do there."""
    case = case_of("Pooling", mode="training")
    with pytest.raises(UnsupportedError, match="the model has no parameters, so there is nothing to train"):
        make_subject(case.with_spec(replace(case.spec, in_channels=2)), "cpu")


def test_a_training_step_needs_a_gradient() -> None:
    """`assert_cost` in training says what it was given where no part of an output can be trained."""
    with pytest.raises(
        UnsupportedError, match=r"returned a tensor of shape \(1, 1, 16, 8\), no part of which has a grad"
    ):
        cost_of(made("Pooling"), [IMAGE], "training")


def test_a_lazy_model_is_trained_and_timed() -> None:
    """Layers take their sizes from the case's image, before anything is measured."""
    case = case_of("Two", {"way": "lazy"}, mode="training")

    assert latency(case, BRIEF).outcome == "ok"
    assert predicted_peaks(case) == predicted_peaks(case_of("Two", mode="training"))


def test_attention_counts_its_products_where_it_runs_on_data() -> None:
    """PyTorch's fast path is one operator without a formula: it is not taken in a count, and left as it was."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    image = torch.randn(1, 4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cost: Cost = cost_of(attention, [image, image, image])

    assert cost.totals["conv_macs"] == 0
    assert torch.backends.mha.get_fastpath_enabled()
