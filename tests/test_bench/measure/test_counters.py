"""Counters side by side: arithmetic holds for any model, and each counter is asked, its gaps named to the operator."""

from __future__ import annotations

import json
from collections import Counter as Tally
from dataclasses import replace
from typing import Any

import pytest
import torch
from command_line import invoke_cli
from custom_models import Mixing, Tiny
from torch import Tensor, nn

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.commands.counters import examine
from skipcost.bench.measure import counters
from skipcost.bench.measure.arithmetic import CONVOLUTION, PRODUCT, TRANSPOSED, Place, arithmetic
from skipcost.bench.measure.counters import BEYOND, COUNTERS, Count, Counter, Part, ask, ask_all, judge
from skipcost.bench.measure.subject import make_subject
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec, lower, sizes

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = Case(spec=ModelSpec.parse("unet/d2/w4/concat"), height=16, width=24, batch=2)


def kinds_of(places: list[Place]) -> dict[str, int]:
    """MACs by kind of operator."""
    sums: Tally[str] = Tally()
    for place in places:
        sums[place.kind] += place.macs
    return dict(sums)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_arithmetic_on_operators_is_arithmetic_on_the_graph(variant: str, skip: str) -> None:
    """The shapes that operators are called with give the graph's MACs, transposed convolutions apart from others."""
    case = replace(UNET, spec=ModelSpec.parse(f"{variant}/d2/w4/{skip}"))
    subject = make_subject(case, "meta")
    expected: Tally[str] = Tally()
    for placed in sizes.placed(lower(case.graph()), (case.height, case.width)):
        expected[TRANSPOSED if placed.conv.transposed else CONVOLUTION] += case.batch * placed.macs

    places = arithmetic(subject.network, subject.tensors[-1])

    assert kinds_of(places) == dict(expected)
    assert sum(place.macs for place in places) == case.batch * case.graph().conv_macs(case.height, case.width)
    modules = dict(subject.network.named_modules())
    assert {type(modules[place.layer]) for place in places} <= {nn.Conv2d, nn.ConvTranspose2d}


@pytest.mark.parametrize(
    ("layer", "shape", "kind", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), CONVOLUTION, 2 * 64 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (1, 4, 9, 9), CONVOLUTION, 16 * 8 * 2 * 9),
        (nn.Conv2d(1, 1, 3, dilation=2), (1, 1, 8, 8), CONVOLUTION, 16 * 9),
        (nn.Conv1d(3, 5, 4), (1, 3, 7), CONVOLUTION, 4 * 5 * 3 * 4),
        (nn.Conv3d(2, 3, 1), (1, 2, 2, 3, 4), CONVOLUTION, 24 * 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 4, 5, 5), TRANSPOSED, 3 * 25 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), TRANSPOSED, 25 * 4 * 3 * 9),
        (nn.Linear(7, 5), (3, 7), PRODUCT, 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), PRODUCT, 6 * 7 * 5),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_arithmetic_of_single_layers(layer: nn.Module, shape: tuple[int, ...], kind: str, macs: int) -> None:
    """Strides, groups, dilation, dimensions and biases: what each layer multiplies, and the counter of torch agrees."""
    places = arithmetic(nn.Sequential(layer), torch.zeros(shape))

    assert [(place.layer, place.kind, place.macs) for place in places] == [("0", kind, macs)]
    assert COUNTERS["FlopCounterMode"].count(layer, torch.zeros(shape)).total == 2 * macs


def test_a_layer_that_runs_twice_is_one_place() -> None:
    """Its MACs are summed up under its one name."""
    layer = nn.Conv2d(2, 2, 1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(self.layer(image))

    assert arithmetic(Twice(), torch.zeros(1, 2, 3, 3)) == [Place("layer", CONVOLUTION, 72)]


def test_an_operator_without_a_layer_belongs_to_the_module_that_calls_it() -> None:
    """A product of two tensors in `forward` has its module's path; at the top that is empty."""

    class Squared(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image @ image

    places = arithmetic(nn.Sequential(Squared()), torch.zeros(1, 4, 4))

    assert places == [Place("0", PRODUCT, 64)]


@pytest.mark.parametrize("upsample", ["transpose", "bilinear"])
def test_the_counters_that_come_with_the_suite_part_where_they_are_known_to(upsample: str) -> None:
    """FlopCounterMode is exact, fvcore exact on convolutions, and torch.profiler leaves transposed ones out."""
    case = replace(UNET, spec=ModelSpec.parse("unet/d2/w4/concat").with_fields(upsample=upsample))

    places, answers = ask_all(case)

    exact = case.batch * case.graph().conv_macs(case.height, case.width)
    said = {each.counter: each for each in answers}
    assert said["FlopCounterMode"].macs == exact
    assert said["FlopCounterMode"].parts == ()
    others = {part.kind for part in said["fvcore"].parts}
    assert others == ({"batch_norm"} if upsample == "transpose" else {"batch_norm", "upsample_bilinear2d"})
    transposed = kinds_of(places).get(TRANSPOSED, 0)
    assert said["torch.profiler"].macs == exact - transposed
    assert said["torch.profiler"].parts == ((Part(TRANSPOSED, 0, transposed),) if transposed else ())
    assert (transposed > 0) == (upsample == "transpose")


def counting(total: float = 0, **kinds: float) -> Counter:
    """A counter of torch's that always says the same."""
    return Counter("torch", "FLOPs", 2, lambda _network, _image: Count(total, kinds=kinds))


PLACES = [Place("a", CONVOLUTION, 100), Place("b", CONVOLUTION, 50), Place("up", TRANSPOSED, 10)]


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (Count(320, {"a": 200, "b": 100, "up": 20}), ()),
        (Count(300, kinds={CONVOLUTION: 300}), (Part(TRANSPOSED, 0, 10),)),
        (
            Count(400, {"a": 200, "b": 100, "up": 80, "bn": 20}),
            (Part(TRANSPOSED, 40, 10, (("up", 40, 10),)), Part("BatchNorm2d", 10, 0, (("bn", 10, 0),))),
        ),
        (
            Count(320, {"a": 100, "b": 200, "up": 20}),
            (Part(CONVOLUTION, 150, 150, (("a", 50, 100), ("b", 100, 50))),),
        ),
        (Count(330, {"a": 200, "b": 100, "up": 20}), (Part(BEYOND, 5, 0),)),
        (
            Count(200, {"a": 200}),
            (Part(CONVOLUTION, 100, 150, (("b", 0, 50),)), Part(TRANSPOSED, 0, 10, (("up", 0, 10),))),
        ),
        (
            Count(330, {"a": 200, "b": 120}, alone=True),
            (Part(CONVOLUTION, 160, 150, (("b", 60, 50),)), Part(BEYOND, 5, 10)),
        ),
        (Count(320, {"a": 200, "b": 100}, alone=True), ()),
        (Count(7), (Part(CONVOLUTION, 0, 150), Part(TRANSPOSED, 0, 10), Part("not said where", 3.5, 0))),
    ],
    ids=["equal", "left out", "too much", "moved", "outside", "missing", "alone", "alone and equal", "total"],
)
def test_a_count_is_judged_by_kind_and_layer(count: Count, parts: tuple[Part, ...]) -> None:
    """The largest difference first; kinds that are equal are not named unless their layers differ."""
    assert judge(count, 2, PLACES, {"bn": "BatchNorm2d"}) == parts


def test_a_counter_that_names_no_place_is_asked_layer_by_layer() -> None:
    """A total says nothing of where: each layer is counted by itself, with the input that it has in the network."""

    def total(network: nn.Module, image: Tensor) -> Count:
        places = arithmetic(network, image)
        return Count(sum(place.macs * (4 if place.kind == TRANSPOSED else 1) for place in places) + 3)

    case = Case(spec=Factory("custom_models:Tiny"), height=8, width=8)
    places, _ = ask_all(case)

    answer = ask("mine", Counter("torch", "MACs", 1, total), case, places)

    worst = answer.parts[0]
    up = next(place.macs for place in places if place.kind == TRANSPOSED)
    assert (worst.kind, worst.layers) == (TRANSPOSED, (("up", 4 * up + 3, up),))


@pytest.mark.parametrize("form", ["list", "keyword", "mha"])
def test_a_layer_is_asked_alone_as_the_network_calls_it(form: str) -> None:
    """With a list, by keyword or with several inputs: what the counter then says is its own, to the layer."""

    def total(network: nn.Module, image: Tensor) -> Count:
        return Count(sum(place.macs for place in arithmetic(network, image)))

    case = Case(spec=Factory("custom_models:Between", json.dumps({"form": form})), height=8, width=8)
    places, _ = ask_all(case)

    answer = ask("mine", Counter("torch", "MACs", 1, total), case, places)

    assert (answer.parts, answer.note) == ((), "")
    assert answer.macs == sum(place.macs for place in places)


def test_a_layer_that_runs_twice_is_asked_alone_for_both() -> None:
    """Nothing is left over that would be told as an operator outside of layers."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(self.layer(image)[..., :2])

    image = torch.zeros(1, 1, 4, 4)

    alone = counters.layers_alone(Twice(), image)

    assert {name: sum(each.macs for each in arithmetic(layer, image)) for name, layer in alone.items()} == {"layer": 24}


def test_a_counter_of_one_image_is_asked_for_one() -> None:
    """What it documents as the cost of an image is no fault of a batch of three."""
    seen: list[int] = []

    def total(network: nn.Module, image: Tensor) -> Count:
        seen.append(len(image))
        return Count(sum(place.macs for place in arithmetic(network, image)))

    case = Case(spec=Factory("custom_models:Tiny"), height=8, width=8, batch=3)
    places, _ = ask_all(case)

    answer = ask("mine", Counter("torch", "MACs", 1, total, per_image=True), case, places)

    assert set(seen) == {1}
    assert (answer.parts, answer.macs) == ((), sum(place.macs for place in places))


@pytest.mark.parametrize("form", ["attention", "mha", "encoder"])
def test_a_counter_is_not_blamed_for_products_that_it_has(form: str) -> None:
    """torch.profiler has every matrix product that PyTorch runs as such, those inside of whole layers too."""
    case = Case(spec=Factory("custom_models:Between", json.dumps({"form": form})), height=8, width=8)

    said = {each.counter: each for each in ask_all(case)[1]}

    missing = {"attention": {"attention"}, "mha": set(), "encoder": {"matrix product with activation"}}
    left_out = {part.kind for part in said["torch.profiler"].parts if part.macs < part.arithmetic}
    assert left_out == missing[form]


def test_layers_under_several_names_are_counted_once_and_told() -> None:
    """A counter that is exact is so in each layer, and a decoder that holds the encoder is told."""
    facts = examine(Case(spec=Factory("custom_models:Holding"), height=8, width=8))

    said = {each["counter"]: each for each in facts["counters"]}
    assert said["FlopCounterMode"]["difference"] == 0
    assert said["FlopCounterMode"]["parts"] == []
    assert said["fvcore"]["parts"] == []
    assert facts["aliases"] == {"encoder": ["decoder.encoder"]}
    assert set(facts["arithmetic"]["layers"]) == {"encoder.0", "decoder.last"}


def test_layers_under_several_names_are_printed() -> None:
    """In a line of its own above the table."""
    done = run("--model", "custom_models:Holding", "--size", "8")

    assert "counted once, under the first: encoder is also decoder.encoder" in done.output


def test_a_sum_with_differences_inside_is_not_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are off that make up for each other, the sum alone is exact."""

    def moved(_network: nn.Module, _image: Tensor) -> Count:
        return Count(256, {"encoder.0": 64, "decoder.last": 192})

    monkeypatch.setattr(counters, "COUNTERS", {"mine": Counter("torch", "MACs", 1, moved)})

    done = run("--model", "custom_models:Holding", "--size", "4")

    assert "in sum exact" in done.output


def test_a_number_beside_nothing_has_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to multiply, what a counter says all the same is neither exact nor a share."""
    monkeypatch.setattr(counters, "COUNTERS", {"mine": replace(counting(10), per_mac=1)})

    facts = examine(Case(spec=Factory("torch.nn:ReLU"), height=4, width=4))

    assert facts["arithmetic"]["macs"] == 0
    assert (facts["counters"][0]["macs"], facts["counters"][0]["difference"]) == (10, None)


def test_a_counter_that_is_not_installed_says_how_to_get_it() -> None:
    """The row has the pip line and no number."""
    answer = ask("mine", replace(counting(), package="not-installed-anywhere"), UNET, PLACES)

    assert (answer.macs, answer.note) == (None, "not installed: pip install not-installed-anywhere")


def test_a_counter_that_fails_says_so_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    """What it raises is its sentence, what it prints is swallowed, and the others are asked all the same."""

    def fail(_network: nn.Module, _image: Tensor) -> Count:
        print("loud")  # noqa: T201 - what is tested
        message = "no such layer"
        raise KeyError(message)

    answer = ask("mine", replace(counting(), count=fail), UNET, PLACES)

    assert answer.note == "fails: KeyError: 'no such layer'"
    assert answer.macs is None
    assert capsys.readouterr().out == ""


def test_every_counter_starts_from_a_network_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that leaves its buffers in a model does not disturb the next."""
    seen: list[nn.Module] = []

    def keep(network: nn.Module, _image: Tensor) -> Count:
        seen.append(network)
        return Count(2, kinds={CONVOLUTION: 2})

    monkeypatch.setattr(counters, "COUNTERS", dict.fromkeys(("one", "two"), replace(counting(), count=keep)))

    ask_all(UNET)

    assert len({id(network) for network in seen}) == 2
    assert {network.training for network in seen} == {False}


@pytest.mark.parametrize("model", [Tiny, Mixing], ids=["convolutions", "with a product"])
def test_a_model_of_ones_own_is_judged_by_arithmetic_too(model: type[nn.Module]) -> None:
    """`--model` is counted operator by operator, products included, as FlopCounterMode does."""
    facts = examine(Case(spec=Factory(f"custom_models:{model.__name__}"), height=16, width=8))

    said = {each["counter"]: each for each in facts["counters"]}
    assert said["FlopCounterMode"]["difference"] == 0
    assert set(facts["arithmetic"]["kinds"]) == {CONVOLUTION, TRANSPOSED} | ({PRODUCT} if model is Mixing else set())
    assert said["torch.profiler"]["parts"][0]["words"].startswith("leaves transposed convolution out (-")


def run(*words: str) -> Any:
    """Call the command as from a shell."""
    return invoke_cli(["counters", *words])


def test_the_command_prints_a_row_for_every_counter() -> None:
    """Each is named with its conversion, and where it parts in words."""
    done = run("unet/d1/w4/concat", "--size", "16")

    assert done.exit_code == 0, done.output
    for name in COUNTERS:
        assert f"\n{name} " in done.output
    assert "FLOPs / 2" in done.output
    assert "leaves transposed convolution out" in done.output
    assert "exact" in done.output


def test_the_command_gives_programs_everything() -> None:
    """JSON has arithmetic by kind and layer, and every part of every counter."""
    facts = json.loads(run("unet/d1/w4/concat", "--size", "16x32", "--batch", "3", "--json").output)

    case = Case(spec=ModelSpec.parse("unet/d1/w4/concat"), height=16, width=32, batch=3)
    assert facts["arithmetic"]["macs"] == 3 * case.graph().conv_macs(16, 32)
    assert sum(facts["arithmetic"]["layers"].values()) == facts["arithmetic"]["macs"]
    assert (facts["network"], facts["size"], facts["batch"]) == (case.spec.label, [16, 32], 3)
    assert [each["counter"] for each in facts["counters"]] == list(COUNTERS)
    for each in facts["counters"]:
        assert (each["macs"] is None) == bool(each["note"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name one network: a label such as unet/d4/w32/concat, or --model"),
        (("unet/d1/w4/concat", "--model", "m:f"), "name one network"),
        (("unett/d1/w4/concat",), "did you mean 'unet'"),
        (("unet/d4/w4/concat", "--size", "4"), "leaves no pixel"),
        (("unet/d1/w4/concat", "--batch", "0"), "--batch '0' is not a whole number"),
        (("--model", "models.unet"), "is not the path of a function"),
        (("--model", "nothere:unet"), "cannot be counted: cannot import nothere"),
        (("--model", "custom_models:raising"), "no weights here; raised by the factory custom_models:raising"),
        (("--model", "custom_models:Failing", "--size", "8"), "cannot be counted: no 8 columns, please"),
    ],
)
def test_a_wrong_question_gets_one_sentence(words: tuple[str, ...], message: str) -> None:
    """What is wrong with the network or the model is said before any counter is asked."""
    done = run(*words)

    assert done.exit_code != 0
    assert message in str(done.exception)
