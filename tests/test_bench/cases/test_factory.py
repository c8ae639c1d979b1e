"""A model of a user's own in a sweep: traced as the suite's are computed, known by its code, its failures rows."""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import invoke_cli
from custom_models import Tiny
from pairwise import each_value
from places import HELPERS

from skipcost.bench import cli
from skipcost.bench.cases.case import CASE_KEYS, SPEC_KEYS, Case
from skipcost.bench.cases.factory import Factory, code_of, make, sources_of
from skipcost.bench.cases.record import Result
from skipcost.bench.compare.baseline import baseline_of
from skipcost.bench.errors import SweepError, UnsupportedError
from skipcost.bench.measure.counting import fvcore_count, predicted_peaks
from skipcost.bench.measure.metrics import METRICS, default_metrics
from skipcost.bench.measure.subject import make_subject, maps_of
from skipcost.bench.measure.tracing import count_convolutions, count_operators, count_params
from skipcost.bench.store.store import create_store
from skipcost.bench.store.tables import wide_table
from skipcost.bench.sweeps.driver import Request, Server
from skipcost.bench.sweeps.plan import Plan, load_plan

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"seconds": 0.02, "noise": 0.1, "least": 3, "warmup_seconds": 0.02}


def case_of(path: str, arguments: dict[str, object] | None = None, **fields: object) -> Case:
    """A small case of one of the factories beside the tests."""
    return Case(spec=Factory(f"custom_models:{path}", json.dumps(arguments or {})), height=16, width=8, **fields)


def by_name(results: list[Result]) -> dict[str, Result]:
    """Results by their metrics."""
    return {result.metric: result for result in results}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One fork server, started where the factories lie."""
    before = Path.cwd()
    os.chdir(HELPERS)
    try:
        running = Server()
    finally:
        os.chdir(before)
    with running:
        yield running


def ask(server: Server, case: Case, *metrics: str) -> dict[str, Result]:
    """Measure a case as a sweep does."""
    return by_name(list(server.run(Request(case, metrics or default_metrics(case), SHORT, 60.0, None))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"path": "models.unet"},
            r"factory='models.unet' is not the path of a function: write package.module:function",
        ),
        ({"path": ":unet"}, "is not the path of a function"),
        ({"path": 3}, "factory=3 is not the path"),
        ({"path": "m:f", "arguments": "[1]"}, r"arguments='\[1\]' of m:f are not keyword arguments"),
        ({"path": "m:f", "arguments": '{"a b": 1}'}, "are not keyword arguments"),
        ({"path": "m:f", "arguments": "width=3"}, "are not keyword arguments"),
        ({"path": "m:f", "name": "unet/d4/w64/concat"}, "or is the label of a network of the suite"),
        ({"path": "m:f", "in_channels": 0}, "in_channels=0 is not a whole number from 1"),
        ({"path": "m:f", "classes": "2"}, "classes='2' is not a whole number from 1"),
    ],
)
def test_a_bad_factory_is_refused_when_it_is_made(values: dict[str, object], message: str) -> None:
    """Each field is checked, and the sentence says what is accepted."""
    with pytest.raises(ValueError, match=message):
        Factory(**values)


def test_equal_calls_are_equal_factories() -> None:
    """The order and spacing of arguments do not matter."""
    assert Factory("m:f", '{"b":1,  "a":[2]}') == Factory("m:f", '{"a": [2], "b": 1}')


def test_the_label_is_the_given_name_or_the_call() -> None:
    """Without a name the call stands for the model."""
    assert Factory("m:f").label == "m:f"
    assert Factory("m:f", '{"b": 1, "a": "x"}').label == "m:f(a='x', b=1)"
    assert Factory("m:f", name="Mine").label == "Mine"


@pytest.mark.parametrize(
    ("case", "known"),
    [
        (Case(), "fd9586ae2291af7b"),
        (case_of("Tiny"), None),
        (case_of("Tiny", {"form": "list"}, mode="training", batch=3), None),
    ],
    ids=["suite", "inference", "training"],
)
def test_a_case_survives_its_json(case: Case, known: str | None) -> None:
    """Cases with a factory are stored like the others, whose ids stay what they were before there were factories."""
    again = Case.from_json(case.to_json())

    assert again == case
    assert again.case_id == case.case_id
    assert known in (None, case.case_id)


def test_what_changes_the_number_is_the_identity() -> None:
    """Code, arguments, channels and, in training, classes tell cases apart; the name that a user gives does not."""
    case = case_of("Tiny", mode="training")
    factory = case.spec
    others = [
        replace(factory, code="1"), replace(factory, arguments='{"form": "list"}'), replace(factory, in_channels=2),
        replace(factory, classes=3), replace(factory, path="custom_models:suite"),
    ]  # fmt: skip

    ids = {case.with_spec(each).case_id for each in [factory, *others]}

    assert len(ids) == 6
    assert case.with_spec(replace(factory, name="Mine")).case_id == case.case_id


def test_an_edited_model_is_held_against_its_former_self(tmp_path: Path) -> None:
    """Its measurements are new ones, but the gate knows it by the same key, and takes the newest code's numbers."""
    with create_store(tmp_path / "s.sqlite") as store:
        for code, params in (("f00", 7), ("0ba", 9)):
            case = case_of("Tiny").with_spec(replace(case_of("Tiny").spec, code=code))
            store.add_case(case, [])
            run = store.add_run("now", "s", 0, {"fingerprint": "f"})
            store.add_result(run, case.case_id, Result("params", samples=(params,)))

        baseline = baseline_of(store)

    assert {key: entry.exact for key, entry in baseline.entries.items()} == {case_of("Tiny").key: {"params": 9}}
    assert Case().key == Case().to_json()


def test_classes_belong_to_training() -> None:
    """At inference nothing looks at them: equal work is one case."""
    three = replace(case_of("Tiny").spec, classes=3)

    assert case_of("Tiny").with_spec(three) == case_of("Tiny")
    assert case_of("Tiny", mode="training").with_spec(three) != case_of("Tiny", mode="training")


def test_a_model_has_no_graph_and_says_so() -> None:
    """What works on the suite's networks alone raises one sentence with the model's name."""
    with pytest.raises(ValueError, match="custom_models:Tiny is no network of the suite: it is traced"):
        case_of("Tiny").graph()


@pytest.mark.parametrize(("mode", "known"), [("inference", {"in_channels"}), ("training", {"in_channels", "classes"})])
def test_what_is_unknown_of_a_model_is_missing(mode: str, known: set[str], tmp_path: Path) -> None:
    """No field of a spec reads as U-Net's default, neither in the case nor in the wide table."""
    case = case_of("Tiny", mode=mode)
    environment = {"fingerprint": "f"}
    with create_store(tmp_path / "s.sqlite") as store:
        for each in (case, Case()):
            store.add_case(each, [])
            store.add_result(store.add_run("now", "s", 0, environment), each.case_id, Result("params", samples=(7,)))
        frame = wide_table(store, "f")

    own, ours = frame.loc[case.case_id], frame.loc[Case().case_id]

    assert {name for name in SPEC_KEYS if case.flat()[name] is not None} == known
    assert set(own[list(SPEC_KEYS)].dropna().index) == known
    assert set(own[list(CASE_KEYS)].dropna().index) == set(CASE_KEYS) - {"outputs"}
    assert (own["label"], own["factory"], own["params"]) == ("custom_models:Tiny", "custom_models:Tiny", 7)
    assert ours["label"] == Case().spec.label
    assert ours.isna()["factory"]
    assert (ours["depth"], ours["width"], ours["bias"]) == (4, 64, True)


@each_value
def test_traced_equals_computed(variant: str, skip: str, mode: str) -> None:
    """A network of the suite that comes as a factory costs what its graph says, to the operator and byte."""
    label = f"{variant}/d1/w4/{skip}"
    own = case_of("suite", {"label": label}, mode=mode, batch=2)
    ours = Case.from_json(json.dumps({"label": label, "height": 16, "width": 8, "mode": mode, "batch": 2}))
    graph = ours.graph()

    traced = by_name([count_params(own), *count_convolutions(own)])

    assert {name: result.samples[0] for name, result in traced.items()} == {
        "params": graph.params(),
        "conv_macs": 2 * graph.conv_macs(16, 8),
        "activations": 2 * graph.activations(16, 8),
    }
    assert {result.note for result in traced.values()} == {""}
    assert predicted_peaks(own) == predicted_peaks(ours)
    assert count_operators(own).samples == count_operators(ours).samples
    assert mode == "training" or fvcore_count(own).samples == fvcore_count(ours).samples


def test_all_heads_train_as_the_suite_s_do() -> None:
    """A list of maps is deep supervision: the step's bytes are those of head=deep."""
    label = "unet++/d2/w4/concat/head=deep"
    own = case_of("suite", {"label": label, "outputs": "all"}, mode="training")
    ours = Case.from_json(json.dumps({"label": label, "height": 16, "width": 8, "mode": "training", "outputs": "all"}))

    assert predicted_peaks(own) == predicted_peaks(ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
@pytest.mark.parametrize("loss", ["cross-entropy", "dice"])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("form", ["list", "tuple"])
def test_every_map_of_deep_supervision_is_trained(form: str, classes: int, loss: str, precision: str) -> None:
    """Maps of several sizes each have a target of their size: one step changes every parameter."""
    case = case_of("Tiny", {"form": form, "classes": classes}, mode="training", loss=loss, precision=precision, batch=2)
    case = case.with_spec(replace(case.spec, classes=classes))
    subject = make_subject(case, "cpu")
    before = [each.detach().clone() for each in subject.network.parameters()]

    subject.step()

    names = [name for name, _ in subject.network.named_parameters()]
    same = [n for n, a, b in zip(names, before, subject.network.parameters(), strict=True) if torch.equal(a, b)]
    assert same == []
    assert {tuple(each.shape[-2:]) for each in subject.tensors[-2:]} == {(16, 8), (8, 4)}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("dict", "returns a dict with 'out', 'aux': give a factory whose model returns the maps"),
        ("nested", r"returns a list of a tensor of shape \(1, 2, 16, 8\), a list of a tensor of shape \(1, 2, 8, 4\)"),
        ("stacked", r"returns a tensor of shape \(1, 2, 2, 16, 8\)"),
    ],
)
def test_an_output_that_the_loss_does_not_understand_is_named(form: str, message: str) -> None:
    """Training says what the model returned and what is accepted; inference runs whatever has a tensor in it."""
    case = case_of("Tiny", {"form": form})

    make_subject(case, "cpu").step()

    with pytest.raises(UnsupportedError, match=message):
        make_subject(replace(case, mode="training"), "meta")


def test_maps_of_other_channels_than_classes_are_refused() -> None:
    """The sentence says which number of classes would do."""
    with pytest.raises(UnsupportedError, match="maps of 5 channels, but classes=2: set classes=5"):
        maps_of(torch.zeros(1, 5, 4, 4), 2)


FAILURES = [
    ("nothere:unet", "unsupported", r"cannot import nothere \(No module named 'nothere'\): install it, or run where"),
    ("custom_models:Tinny", "unsupported", r"unknown factory in custom_models 'Tinny'; did you mean 'Tiny'\?"),
    ("custom_models:NOT_A_FUNCTION", "unsupported", "is a int, not a function: name what returns the model"),
    ("custom_models:no_module", "unsupported", "returns 'dict', not a torch.nn.Module: name a function"),
    ("custom_models:leaving", "unsupported", "leaves the program; a factory must return a torch.nn.Module"),
    (
        "custom_models:raising",
        "crash",
        r"RuntimeError: no weights here; raised by the factory custom_models:raising \(it printed: so far so good\)",
    ),
    ("custom_models:suite", "crash", "TypeError: .*missing 1 required positional argument: 'label'; raised by"),
]


@pytest.mark.parametrize(("path", "outcome", "note"), FAILURES, ids=[path for path, *_ in FAILURES])
def test_a_bad_factory_is_a_row_for_every_metric(server: Server, path: str, outcome: str, note: str) -> None:
    """Whatever a factory does instead of returning a module, each metric's row says it."""
    case = Case(spec=Factory(path), height=16, width=8)
    metrics = default_metrics(case)

    results = ask(server, case)

    assert tuple(results) == metrics
    assert {result.outcome for result in results.values()} == {outcome}
    for result in results.values():
        assert re.search(note, result.note), result.note


def test_a_model_has_every_metric_that_a_network_has(server: Server) -> None:
    """All that a sweep measures on a CPU is there, but what is worked out on a graph, which says why it is not."""
    results = ask(server, case_of("Tiny"))

    missing = {name for name, result in results.items() if result.outcome != "ok"}
    assert {"params", "conv_macs", "activations", "fvcore_flops", "operators", "latency_s"} <= set(results) - missing
    assert "peak_memory_predicted_bytes" not in missing
    assert results["receptive_field"].outcome == "unsupported"
    assert {results[name].note.partition(":")[0] for name in missing} == {"custom_models"}, (
        "each says that the model is no network of the suite"
    )


def test_a_model_that_cannot_run_keeps_its_parameters(server: Server) -> None:
    """What needs no forward pass is a number, the rest crashes with the model's own words."""
    results = ask(server, case_of("Failing"), "params", "conv_macs", "latency_s")

    assert results["params"].samples[0] == sum(each.numel() for each in Tiny().parameters())
    for name in ("conv_macs", "latency_s"):
        assert results[name].outcome == "crash"
        assert "RuntimeError: no 8 columns, please" in results[name].note


def test_what_a_factory_prints_is_kept_beside_its_numbers(server: Server) -> None:
    """Printing while a model is made makes no number doubtful; every row keeps it, and no row is corrupted by it."""
    results = ask(server, case_of("greeting"), "params", "latency_s")

    assert {result.outcome for result in results.values()} == {"ok"}
    assert {result.detail["printed"] for result in results.values()} == {'{"metric": "params"} hello'}
    assert results["params"].note == ""


def test_printing_while_it_runs_makes_a_latency_doubtful(server: Server) -> None:
    """A forward pass that prints is timed with its printing, and its row says so; counts do not care."""
    results = ask(server, case_of("Chatty"), "conv_macs", "latency_s")

    assert "the model prints while it runs, which takes time: forward! forward!" in results["latency_s"].note
    assert len(results["latency_s"].note) < 500
    assert results["conv_macs"].note == ""


def test_prints_stay_out_of_the_worker_s_lines() -> None:
    """The worker's stdout holds results alone, whatever a model writes there when it is made and when it runs."""
    case = case_of("Chatty", {"greet": True})
    request = {"case": json.loads(case.to_json()), "metrics": ["params", "conv_macs"], "budget": SHORT}

    done = subprocess.run(
        [sys.executable, "-m", "skipcost.bench.measure.worker"],
        input=json.dumps(request) + "\n", capture_output=True, text=True, check=True, cwd=HELPERS,
    )  # fmt: skip

    results = [Result.from_json(json.loads(line)) for line in done.stdout.splitlines()]
    assert [result.metric for result in results] == ["params", "conv_macs"]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_model_that_looks_at_values_is_counted_on_the_cpu(mode: str) -> None:
    """Where no trace without data is possible the numbers are the same, and each says how it was got."""
    peeking, plain = (case_of(name, mode=mode) for name in ("Peeking", "Tiny"))

    found, expected = (by_name([*count_convolutions(case), count_operators(case)]) for case in (peeking, plain))

    for name in ("conv_macs", "activations"):
        assert found[name].samples == expected[name].samples
    for result in found.values():
        assert "counted in a run on the CPU with random data, because it cannot be traced without" in result.note
    assert "counted in a run on the CPU with random data" in predicted_peaks(peeking)[2]["note"]
    assert "note" not in predicted_peaks(plain)[2]


def test_a_model_that_cannot_be_made_without_data_is_traced_all_the_same() -> None:
    """Numbers taken out of tensors while a model is made need the CPU; the trace does not, so nothing is doubtful."""
    found = by_name([count_params(case_of("Scheduled")), *count_convolutions(case_of("Scheduled"))])

    assert found["conv_macs"] == by_name(count_convolutions(case_of("Tiny")))["conv_macs"]
    assert {result.note for result in found.values()} == {""}
    assert next(make(case_of("Scheduled").spec, "meta")[0].parameters()).device.type == "meta"


def test_matrix_products_are_no_convolutions_and_the_row_says_so() -> None:
    """`conv_macs` stays what it is for every network; what it leaves out of a model is a note with the number."""
    found = by_name(count_convolutions(case_of("Mixing")))
    plain = by_name(count_convolutions(case_of("Tiny")))

    assert found["conv_macs"].samples == plain["conv_macs"].samples
    assert found["conv_macs"].note == "1.02e+03 MACs of matrix products are not in it"
    assert sum(found["conv_macs"].detail["other_macs"].values()) == 16 * 8 * 8
    assert found["activations"] == plain["activations"]


def test_the_fused_backend_does_not_take_a_model_in_silence(server: Server) -> None:
    """No number carries the name of kernels that did not run."""
    result = ask(server, case_of("Tiny", backend="fused"), "latency_s")["latency_s"]

    assert result.outcome == "unsupported"
    assert "have the factory return skipcost.kernels.fuse(model)[0]" in result.note


def test_code_is_hashed_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory's module and what it imports of its neighbours tell models apart; nothing of them is executed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodels.py").write_text("import sys\nimport myblocks\nraise SystemExit\n")
    (tmp_path / "myblocks.py").write_text("from mylayers.norms import x\n")
    (tmp_path / "mylayers").mkdir()
    (tmp_path / "mylayers" / "norms.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("")
    seen = [code_of("mymodels:unet")]

    for name, changes in (
        ("other.py", False),
        ("mylayers/norms.py", True),
        ("myblocks.py", True),
        ("mymodels.py", True),
    ):
        with (tmp_path / name).open("a") as file:
            file.write("# edited\n")
        seen.append(code_of("mymodels:unet"))
        assert (seen[-1] != seen[-2]) == changes, name

    assert "mymodels" not in sys.modules
    assert len(seen[0]) == 12
    assert code_of("nothere:unet") == ""


def test_code_of_a_package_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package is hashed whole, whichever of its modules is named, and wherever it lies the same."""
    codes = []
    for folder in ("one", "two"):
        (tmp_path / folder / "mypackage").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        for name in ("__init__", "nets", "blocks"):
            (tmp_path / folder / "mypackage" / f"{name}.py").write_text(f"name = {name!r}\n")
        codes.append(code_of("mypackage.nets:unet"))
    (tmp_path / "two" / "mypackage" / "blocks.py").write_text("")

    assert codes[0] == codes[1] != code_of("mypackage.nets:unet") != ""


@pytest.mark.parametrize("kind", ["site-packages", "dist-packages", "target", "links"])
def test_installed_packages_are_told_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of an installed package only itself is hashed, not all that lies beside it: that took minutes."""
    place = tmp_path / "lib" / ("site-packages" if kind == "links" else kind)
    for name in ("ownnets", "beside"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text("import beside\n")
    if kind == "target":  # as pip install --target leaves it
        (place / "beside-1.0.dist-info").mkdir()
    if kind == "links":
        (tmp_path / "path").mkdir()
        for name in ("ownnets", "beside"):
            (tmp_path / "path" / name).symlink_to(place / name)
    monkeypatch.syspath_prepend(str(tmp_path / "path" if kind == "links" else place))

    found = sources_of("ownnets:net")

    assert found is not None
    assert [each.relative_to(found.folder).as_posix() for each in found.files] == ["ownnets/__init__.py"]


def test_environments_inside_a_package_are_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace package, which is any folder, may hold a whole virtual environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("nets.py", ".venv/lib/site-packages/x.py", "env/lib/python3.11/site-packages/y.py", "env/z.py"):
        (tmp_path / "ownspace" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ownspace" / name).touch()

    found = sources_of("ownspace.nets:net")

    assert found is not None
    assert [each.relative_to(tmp_path).as_posix() for each in found.files] == ["ownspace/env/z.py", "ownspace/nets.py"]


@pytest.mark.parametrize("name", ["ownzipped.zip", "ownzipped.egg"])
def test_a_module_in_an_archive_is_known_by_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """There is no file of its own to hash; another archive is another state."""
    codes = []
    for text in ("a = 1", "a = 2"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("ownzipped/__init__.py", "")
            archive.writestr("ownzipped/nets.py", text)
        monkeypatch.syspath_prepend(str(tmp_path / name))
        codes.append(code_of("ownzipped.nets:net"))
    sys.path_importer_cache.pop(str(tmp_path / name), None)  # else Python opens it again with every import to come

    assert "" not in codes
    assert codes[0] != codes[1]


def test_a_compiled_module_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no source beside it; the hash of nothing would be the same for all of them."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"owncompiled{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    codes = []
    for text in ("one", "two"):
        file.write_text(text)
        codes.append(code_of("owncompiled:net"))

    assert codes[0] != codes[1]


def test_what_a_factory_read_is_part_of_its_key() -> None:
    """Another state is another case, of the same work; without it the JSON is what it was before anybody listened."""
    plain = case_of("Tiny")
    read = plain.of_factory(read='{"a.json": "0"}')

    assert read.case_id != plain.case_id
    assert (read.key, read.work) == (plain.key, plain.work)
    assert Case.from_json(read.to_json()) == read
    assert "read" not in plain.to_json()
    named = plain.of_factory(name="Mine")
    assert (named.work == plain.work, named.key == plain.key) == (True, False)


def plan_of(tmp_path: Path, text: str, models: tuple[str, ...] = (), **settings: list[str]) -> Plan:
    """Plan a sweep given as text."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_plan(str(path), settings, "cpu", 2, models)


def test_a_custom_table_is_crossed_like_a_grid(tmp_path: Path) -> None:
    """Its lists make cases, with its arguments, label and channels; what it does not say is usual."""
    plan = plan_of(
        tmp_path,
        '[[custom]]\nfactory = "custom_models:Tiny"\narguments = {classes = 3}\nlabel = "Mine"\nclasses = 3\n'
        'size = ["32x16", 64]\nmode = ["inference", "training"]\nmetrics = ["params", "latency_s"]\n',
    )

    assert [(each.case.spec.label, each.metrics) for each in plan.cases] == [("Mine", ("params", "latency_s"))] * 4
    assert {(each.case.height, each.case.width) for each in plan.cases} == {(32, 16), (64, 64)}
    assert {(each.case.mode, each.case.spec.classes) for each in plan.cases} == {("inference", 2), ("training", 3)}
    assert {each.case.spec.arguments for each in plan.cases} == {'{"classes": 3}'}
    assert {each.case.threads for each in plan.cases} == {2}


def test_settings_reach_a_model_as_far_as_they_concern_it(tmp_path: Path) -> None:
    """A setting of the case is taken, one of a spec is not."""
    plan = plan_of(tmp_path, '[[custom]]\nfactory = "m:f"\nsize = 64\n', size=["32"], batch=["2", "4"], depth=["1"])

    assert [(each.case.height, each.case.batch) for each in plan.cases] == [(32, 2), (32, 4)]


def test_a_model_is_measured_as_every_grid_of_the_sweep_measures(tmp_path: Path) -> None:
    """`--model` takes from each grid what is not of a spec, so that the rows stand side by side."""
    text = (
        '[[grid]]\nvariant = ["unet", "unet++"]\ndepth = 2\nsize = 64\nmetrics = ["params"]\noutputs = "all"\n'
        '[[grid]]\nlabel = "unet/d1/w8/none"\nsize = 32\nmode = "training"\nin_channels = 3\n'
    )

    plan = plan_of(tmp_path, text, ("custom_models:Tiny", "custom_models:greeting"))

    own = [each for each in plan.cases if each.case.factory]
    assert [(each.case.spec.label, each.case.height, each.case.mode, each.case.spec.in_channels) for each in own] == [
        ("custom_models:Tiny", 64, "inference", 1), ("custom_models:Tiny", 32, "training", 3),
        ("custom_models:greeting", 64, "inference", 1), ("custom_models:greeting", 32, "training", 3),
    ]  # fmt: skip
    assert own[0].metrics == ("params",)
    assert len(plan.cases) == 3 + 4


def test_a_model_needs_no_sweep() -> None:
    """Alone it is measured at what is usual; without it and a sweep there is nothing to do."""
    plan = load_plan(None, {"size": ["32"]}, "cpu", 2, ["custom_models:Tiny"])

    assert plan.name == "Tiny"
    assert [(each.case.spec.label, each.case.height, each.case.mode) for each in plan.cases] == [
        ("custom_models:Tiny", 32, "inference")
    ]
    with pytest.raises(SweepError, match=r"name a sweep .* or a model with --model package.module:factory"):
        load_plan(None, {}, "cpu", 2)


def test_one_model_under_two_names_is_measured_once(tmp_path: Path) -> None:
    """The second label becomes an alias, as with networks of the suite."""
    plan = plan_of(tmp_path, "".join(f'[[custom]]\nfactory = "m:f"\nlabel = "{label}"\n' for label in ("One", "Two")))

    assert [(each.case.spec.label, each.aliases) for each in plan.cases] == [("One", ("Two",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[custom]]\nlabel = 'x'\n", "factory='' is not the path of a function: write package.module:function"),
        ("[[custom]]\nfactory = ['m:f']\n", "is not the path of a function"),
        ("[[custom]]\nfactory = 'm:f'\nvariant = 'unet'\n", r"unknown key in a \[\[custom\]\] 'variant'"),
        ("[[custom]]\nfactory = 'm:f'\noutputs = 'all'\n", r"unknown key in a \[\[custom\]\] 'outputs'"),
        ("[[custom]]\nfactory = 'm:f'\narguments = [1]\n", "are not keyword arguments"),
        ("[[custom]]\nfactory = 'm:f'\nmode = 'infer'\n", "did you mean 'inference'"),
        ("[[custom]]\nfactory = 'm:f'\nclasses = 0\n", "no case is left: classes=0 is not a whole number"),
        ("custom = 3\n", r"needs at least one \[\[custom\]\] table, and nothing else under that name"),
        (
            "[[custom]]\nfactory = 'm:f'\nlabel = 'x'\n[[custom]]\nfactory = 'm:g'\nlabel = 'x'\n",
            "label='x' is given to two models, m:f and m:g",
        ),
    ],
)
def test_a_wrong_custom_table_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    """What is wrong with a sweep's models is said before anything runs."""
    with pytest.raises(SweepError, match=message):
        plan_of(tmp_path, text)


@pytest.mark.slow
def test_the_command_line_measures_a_model_beside_the_suite(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` says which factory is not there; `sweep` makes it rows; `show` names what is measured."""
    sweep = tmp_path / "mine.toml"
    sweep.write_text(
        "[timing]\nseconds=0.02\nleast=3\nwarmup_seconds=0.02\n[[grid]]\ndepth=1\nwidth=4\nsize=16\n"
        'metrics=["params", "latency_s"]\n[[custom]]\nfactory="nothere:unet"\nlabel="Absent"\nsize=16\n'
    )

    monkeypatch.chdir(HELPERS)
    monkeypatch.setattr(cli, "Server", lambda: contextlib.nullcontext(server))

    def run(*words: str) -> str:
        return invoke_cli(words, catch_exceptions=False).stdout

    model = ("--model", "custom_models:Tiny", "--device", "cpu")
    planned = json.loads(run("plan", str(sweep), *model, "--json"))["cases"]
    run("sweep", str(sweep), *model, "-o", str(tmp_path / "s.sqlite"))
    shown = json.loads(run("show", str(tmp_path / "s.sqlite"), "--format", "json"))

    notes = {each["label"]: each["note"] for each in planned}
    assert notes["unet/d1/w4/concat"] == notes["custom_models:Tiny"] == ""
    assert notes["Absent"].startswith("cannot import nothere")
    rows = {row["label"]: row for row in shown}
    assert rows["Absent"]["outcome"].startswith("unsupported: activations, conv_macs")
    assert rows["custom_models:Tiny"]["latency_s"] > 0
    assert rows["custom_models:Tiny"]["variant"] is None
    assert set(METRICS) <= set(rows["Absent"])
