"""The deterministic numbers are what they were: `golden/frozen` holds them, and here they are made again.

Asked through what does not move when modules do: the command line, in this process, and the tables of a store. The
files are JSON lines of [key, values], sorted. A sweep's key is a case as the store writes it, and the line of a case is
also what asks for it; SKIPCOST_UPDATE_GOLDEN=1 writes the values of all lines anew, and a new case is a line with {}.

cpu.jsonl, gpu.jsonl   arithmetic: each variant, skip scheme and depth together; in each, every two values meet
traced.jsonl           what PyTorch's dispatch tells; compared under the version of torch that its first line names
explain.jsonl, fit.jsonl, kernels_explain.jsonl   answers; an item of a list is a line, with its place

Left out is what a machine decides: whatever is timed, the reference line of a CPU (it is probed), fvcore's count (may
not be installed), a GPU's calibration. A GPU is named by a stand-in for its driver, whatever there is here. What was
published of a card decides some answers for it (`kernels explain`): new rows are a reason to write these anew. The
kernels' registers and shared memory are frozen elsewhere: `skipcost gate --kernels` compares them with its baseline.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FROZEN = ROOT / "tests" / "golden" / "frozen"
UPDATE = "SKIPCOST_UPDATE_GOLDEN"
SHOWN = 5  # differences in a message
TORCH = json.dumps("torch")  # the key of the version under which was traced
Frozen = dict[str, dict[str, Any]]  # values by the JSON of their key

COUNTED = ("params", "conv_macs", "activations", "executed_macs", "receptive_field")
PEAKS = ("peak_memory_predicted_bytes", "peak_memory_predicted_first_bytes")
OF_A_GPU = tuple(
    f"peak_memory_predicted_{figure}{step}_bytes"
    for figure in ("requested", "allocated", "reserved", "process")
    for step in ("", "_first")
)
ASKED = {
    "cpu": (*COUNTED, *PEAKS),
    "gpu": (*COUNTED, *PEAKS, "roofline_s", *OF_A_GPU),
    "traced": (*COUNTED, *PEAKS, "peak_memory_traced_bytes", "operators"),
}
DETAIL = ("low", "high", "fused_s", "standing", "workspace_bytes", "parameter_bytes", "by_operator")  # that is numbers
USUAL: dict[str, Any] = {  # what the store does not write of a case
    "batch": 1,
    "mode": "inference",
    "precision": "fp32",
    "layout": "contiguous",
    "backend": "eager",
    "outputs": "final",
    "optimizer": "adamw",
    "loss": "cross-entropy",
    "cudnn_benchmark": True,
    "threads": 1,
    "device": "cpu",
}
UNSAID = {  # what a label leaves out
    "in_channels": "1",
    "classes": "2",
    "padding": "same",
    "max_width": "none",
    "norm": "batch",
    "bias": "true",
    "upsample": "usual",
    "head": "single",
    "pruned_to": "none",
}
NEVER = {  # by one value those of other axes that no case has with it
    "mode=inference": ("optimizer=sgd", "loss=dice"),
    "outputs=all": ("variant=unet", "head=single", "pruned_to=1", "pruned_to=2"),
    "variant=unet": ("head=deep", "head=guided", "pruned_to=1", "pruned_to=2"),
    "variant=unet++": ("head=guided",),
    "variant=unet3+": ("upsample=bilinear", "pruned_to=1", "pruned_to=2"),  # bilinear is its usual one
    "head=guided": ("classes=2", "classes=5", "upsample=bilinear", "pruned_to=1", "pruned_to=2"),
    "head=deep": ("pruned_to=1", "pruned_to=2"),
    "pruned_to=1": ("depth=d1", "skip=none"),  # without skips UNet++ is U-Net
    "pruned_to=2": ("depth=d1", "depth=d2"),
}
DRIVER = '''
"""Stands where nvidia-ml-py would be imported from: a driver with one card."""

from types import SimpleNamespace

NVMLError = RuntimeError
NVML_CLOCK_SM = 1


def nvmlInit(): ...
def nvmlShutdown(): ...
def nvmlSystemGetDriverVersion(): return "570.1"
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(_): return "NVIDIA L4"
def nvmlDeviceGetMemoryInfo(_): return SimpleNamespace(total=24 * 2**30)
def nvmlDeviceGetPowerManagementLimit(_): return 72_000
def nvmlDeviceGetMaxClockInfo(*_): return 2040
'''
EXPLAIN = (
    "unet/d4/w64/concat",
    "unet/d3/w8/gated --size 61x90 --mode training --batch 2",
    "unet/d4/w16/sum/padding=valid/norm=none --size 188x204",
    "unet/d3/w12/none/upsample=bilinear --precision amp-bf16",
    "unet/d4/w8/concat/upsample=nearest/max_width=40 --size 100",
    "unet++/d4/w32/concat --size 96",
    "unet++/d3/w8/nearest/head=deep/norm=instance --size 75",
    "unet++/d3/w8/sum/pruned_to=2/bias=false --size 64",
    "unet3+/d4/w64/concat",
    "unet3+/d3/w8/gated/head=deep/norm=group --size 61x75 --batch 3",
    "unet3+/d3/w16/same/head=guided/classes=1 --precision fp16 --mode training",
    "unet3+/d2/w8/sum/padding=valid/upsample=nearest --size 93",
)
FIT = (
    "--device h100 --memory 3GiB --macs 8G --size 160 --mode training --set depth=2 --set width=8,16,24 --top 6",
    "--device t4 --params 400k --memory 2GiB --size 128 --batch 4 --set depth=1..2 --set width=8,12,16 --top 8",
    "--device cpu --equal macs unet/d3/w16/concat --size 96",
    "--device cpu --nnunet flat.json --set width=8,16 --set depth=2..3 --top 5",
)
KERNELS = (
    "unet/d3/w16/concat --size 128 --card h200",
    "unet/d4/w64/gated --precision fp16 --card t4",
    "unet++/d3/w32/concat --size 96x160 --batch 4 --card a100",
    "unet3+/d4/w64/concat --mode training --batch 8 --card h100",
    "unet3+/d2/w16/sum/norm=group --size 75 --precision fp32 --card l4",
    "unet/d3/w32/concat/upsample=bilinear/padding=valid --size 188 --precision tf32 --card rtx4090",
)
ANSWERS = {"explain": EXPLAIN, "fit": FIT, "kernels_explain": KERNELS}

pytestmark = [pytest.mark.slow, pytest.mark.sources]


def skipcost(*words: str) -> str:
    """What the console script prints, run in this process; it ends with 0."""
    (script,) = (each for each in importlib.metadata.entry_points(group="console_scripts") if each.name == "skipcost")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["skipcost", *words])
        plain = [each for each in sys.meta_path if not type(each).__module__.startswith("_pytest")]
        patch.setattr(sys, "meta_path", plain)  # pytest's own importer cannot run a module as a script
        with pytest.raises(SystemExit) as ended:
            script.load()()
    assert not ended.value.code, out.getvalue()
    return out.getvalue()


def known(name: str) -> Frozen:
    """The values of a file by the JSON of their keys, in its order."""
    lines = (FROZEN / f"{name}.jsonl").read_text().splitlines()
    return {json.dumps(key): values for key, values in map(json.loads, lines)}


def freeze(name: str, made: Frozen) -> None:
    """Write a file anew."""
    lines = sorted(made.items(), key=lambda item: (str(dict_of(item[0]).get("label", "")), item[0]))
    text = "".join(f"[{key}, {json.dumps(values)}]\n" for key, values in lines)
    (FROZEN / f"{name}.jsonl").write_text(text)


def dict_of(key: str) -> dict[str, Any]:
    """A case as JSON values; nothing for a key that is a text."""
    value = json.loads(key)
    return value if isinstance(value, dict) else {}


def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every value inside tables and lists with its path, as text: whole numbers and floats are told apart."""
    if value and isinstance(value, dict):
        inside = [(f"{path}.{name}", each) for name, each in value.items()]
    elif value and isinstance(value, list):
        inside = [(f"{path}[{place}]", each) for place, each in enumerate(value)]
    else:
        yield path, json.dumps(value)
        return
    for name, each in inside:
        yield from leaves(name, each)


def differences(old: Frozen, new: Frozen) -> list[str]:
    """A line for every value that is not exactly what it was."""
    found = []
    for key in {**old, **new}:
        before, after = (
            dict(leaf for name, value in each.get(key, {}).items() for leaf in leaves(name, value))
            for each in (old, new)
        )
        for path in {**before, **after}:
            was, now = before.get(path, "absent"), after.get(path, "absent")
            if was != now:
                found.append(f"{key} {path}: {was} -> {now}")
    return found


def grid(key: str, name: str) -> str:
    """A case as a table of a sweep, nothing left to what is usual."""
    case = USUAL | dict_of(key)
    by_trace = PEAKS if case["backend"] == "fused" and name != "traced" else ()  # there is no arithmetic for it
    case["metrics"] = [each for each in ASKED[name] if each not in by_trace]
    case |= {"image_height": case.pop("height"), "image_width": case.pop("width")}
    return "[[grid]]\n" + "".join(f"{field} = {json.dumps(value)}\n" for field, value in case.items())


def values_of(outcome: str, note: str, samples: str, detail: str) -> Any:
    """What is frozen of a row: its sample, with the numbers of its detail, or why there is none, or what is doubtful.

    One of them by itself where the others are empty.
    """
    numbers = {name: value for name, value in json.loads(detail).items() if name in DETAIL and value}
    parts = [*json.loads(samples), *filter(None, (numbers, "" if outcome == "ok" else outcome, note))]
    return parts[0] if len(parts) == 1 else parts


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """The values of every case of the three files, by one sweep."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "pynvml.py").write_text(DRIVER)
    grids = [grid(key, name) for name in ASKED for key in known(name) if dict_of(key)]
    (folder / "frozen.toml").write_text("\n".join(grids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        skipcost("sweep", str(folder / "frozen.toml"), "--device", "cpu", "-o", str(folder / "frozen.sqlite"))
    with contextlib.closing(sqlite3.connect(folder / "frozen.sqlite")) as store:
        rows = store.execute(
            "SELECT definition, metric, outcome, note, samples, detail FROM results JOIN cases USING (case_id)"
        ).fetchall()
    found: dict[str, Frozen] = {}
    for definition, metric, *row in sorted(rows):
        found.setdefault(json.dumps(json.loads(definition)), {})[metric] = values_of(*row)
    return found


def lines_of(asked: str, answer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An answer as lines: its own values, and each item of its lists of tables."""
    rest = {}
    for name, value in answer.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            yield from ((json.dumps(f"{asked}: {name} {place:02}"), each) for place, each in enumerate(value))
        else:
            rest[name] = value
    yield json.dumps(asked), rest


def hold(name: str, made: Frozen) -> None:
    """Compare what was made with the file, or write the file where the environment asks for it."""
    if os.environ.get(UPDATE):
        freeze(name, made)

    if found := differences(known(name), made):
        first = "\n  ".join(found[:SHOWN])
        pytest.fail(f"{len(found)} values of {name}.jsonl are others, frozen -> made:\n  {first}", pytrace=False)


@pytest.mark.parametrize("name", ASKED)
def test_a_sweeps_numbers_are_the_frozen_ones(name: str, measured: Frozen) -> None:
    """Counts, predictions, refusals and notes of some 250 cases, to the last digit."""
    keys, made = known(name), {}
    if name == "traced":
        made = {TORCH: {"version": version("torch").partition("+")[0]}}
        if keys[TORCH] != made[TORCH] and not os.environ.get(UPDATE):
            pytest.skip(f"traced under torch {keys[TORCH]['version']}")
    made |= {key: measured[key] for key in keys if key in measured}

    hold(name, made)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_the_frozen_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands that only work things out say for a program, to the last digit."""
    shutil.copy(ROOT / "tests" / "nnunet" / "flat.json", tmp_path)
    monkeypatch.chdir(tmp_path)  # away from what was calibrated here

    made: Frozen = {}
    for asked in ANSWERS[name]:
        told = skipcost(*name.split("_"), *asked.split(), "--json")
        made |= dict(lines_of(asked, json.loads(told)))

    hold(name, made)


def words_of(key: str) -> frozenset[str]:
    """A case as axis=value, but for the sides of its image."""
    case = USUAL | dict_of(key)
    variant, depth, width, skip, *others = case["label"].split("/")
    network = {"variant": variant, "depth": depth, "channels": width, "skip": skip}
    stated = {name: value for name, value in case.items() if name not in ("label", "height", "width")}
    return frozenset(
        f"{name}={value}"
        for name, value in (UNSAID | dict(each.split("=") for each in others) | network | stated).items()
    )


def test_every_pair_of_values_occurs() -> None:
    """Over all three files, any two values of two axes stand together in a case, but for those that never can."""
    cases = [words_of(key) for name in ASKED for key in known(name) if dict_of(key)]

    seen = {pair for case in cases for pair in combinations(sorted(case), 2)}
    pairs = combinations(sorted(frozenset().union(*cases)), 2)
    missing = {pair for pair in pairs if pair not in seen and pair[0].split("=")[0] != pair[1].split("=")[0]}

    assert missing == {
        pair for one, others in NEVER.items() for pair in (tuple(sorted((one, each))) for each in others)
    }
