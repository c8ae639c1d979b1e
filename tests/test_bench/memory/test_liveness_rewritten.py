"""Live bytes of `backend=rewritten` by arithmetic equal a trace and a run, to the byte, whatever is rewritten."""

from __future__ import annotations

import gc
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_cells import Followed, cells, changes, covering, pairs, turns
from places import ROOT
from profiled import profiled

from skipcost.bench.cases.case import CHOICES, Case
from skipcost.bench.errors import BenchError
from skipcost.bench.fitting.lattice import lattice, read_axes
from skipcost.bench.fitting.search import widest
from skipcost.bench.measure.counting import predicted_peaks
from skipcost.bench.measure.live_bytes import LiveBytes
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.subject import AUTOCAST, Subject, make_subject
from skipcost.bench.measure.timing import Budget
from skipcost.bench.measure.tracing import trace
from skipcost.bench.memory import liveness, schedule
from skipcost.bench.memory.liveness import (
    Timeline,
    at_peak,
    envelope,
    lives,
    moments,
    peak_bytes,
    peaks_of,
    timeline,
    tracks,
    why_no_envelope,
    workspace_bytes,
)
from skipcost.kernels.dispatch.low_resolution import Choice, choose, choose_composed, folds, rewritings
from skipcost.kernels.low_resolution import costs as tap_costs
from skipcost.kernels.low_resolution import tap_first
from skipcost.kernels.low_resolution.axis import Axis
from skipcost.kernels.rewriting import low as rewritten
from skipcost.unet_models import SKIPS, VARIANTS, ModelSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # what keeps weights looks at it
]

# Networks small enough for tests would mostly be left as they are: other rules than counting take more of the calls.
RULES: dict[str, Callable[[Choice], bool]] = {
    "counted": lambda choice: choice.taken,
    "all": lambda _: True,
    "some": lambda choice: choice.tap_macs % 3 > 0,
}


def _rewritten(seed: int) -> Iterator[Case]:
    """Cases over all tables, without end."""
    return (replace(case, backend="rewritten") for case in cells(seed))


def _runs(case: Case) -> bool:
    """Whether the step can be predicted: random weights in fp16 overflow, and a scaler then leaves a step out."""
    return "fp16" not in case.precision or case.mode == "inference"


def _transposed(seed: int) -> Iterator[tuple[Case, str]]:
    """Cases at inference in which transposed convolutions may be composed, with the rule that does so."""
    return (
        (case, "all") for case in _rewritten(seed) if case.spec.upsample == "transpose" and case.mode == "inference"
    )


def _pairs(ruled: tuple[Case, str]) -> set[Any]:
    """Pairs of values of a case, each value with the rule, too."""
    case, rule = ruled
    met = pairs(case)
    return met | {(value, rule) for pair in met for value in pair}


TRACED = [
    *covering(zip(itertools.islice(_rewritten(10), 100), itertools.cycle(RULES), strict=False), _pairs),
    *itertools.islice(_transposed(12), 12),
]
RUN = [
    *zip(itertools.islice(filter(_runs, _rewritten(11)), 15), itertools.cycle(RULES), strict=False),
    *itertools.islice(_transposed(13), 8),
]
CELLS = [
    (variant, skip, upsample, padding, mode)
    for variant, skip, padding, mode in itertools.product(VARIANTS, SKIPS, ("same", "valid"), CHOICES["mode"])
    for upsample in VARIANTS[variant].upsamples
]


def _twos(cell: tuple[tuple[str, ...], str]) -> set[Any]:
    """Every two values of a cell, with their places."""
    return set(itertools.combinations(enumerate((*cell[0], cell[1])), 2))


EVERY = list(itertools.product(CELLS, ("fp32", "bf16", "amp-bf16")))
GRID = covering(random.Random(0).sample(EVERY, len(EVERY)), _twos)  # noqa: S311 - an order, nothing secret


@pytest.fixture
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose by one of RULES, in the ops and in the arithmetic."""

    def ruled(rows: Axis, columns: Axis, channels: tuple[int, int], _batch: int = 1, **given: str) -> Choice:
        choice = choose(rows, columns, channels, **given)
        return replace(choice, taken=RULES[request.param](choice))

    def composed(*call: Any, mode: str = "inference", alone: bool = False, **given: Any) -> Choice:
        choice = choose_composed(*call, mode=mode, alone=alone, **given)
        return replace(choice, taken=mode == "inference" and not alone and RULES[request.param](choice))

    def folded(weights: int, outputs: int) -> bool:
        each = Choice(weights, outputs, 0, 0, 0, 0, taken=folds(weights, outputs), why="")
        return RULES[request.param](each)

    for module in (rewritten, schedule):
        monkeypatch.setattr(module, "folds", folded)
    for module in (rewritten, liveness):
        monkeypatch.setattr(module, "choose", ruled)
        monkeypatch.setattr(module, "choose_composed", composed)
    _forget()
    yield
    _forget()


def _forget() -> None:
    rewritten._counted.cache_clear()
    liveness._taken.cache_clear()


def _steps(line: Timeline) -> int:
    """How many steps a timeline has: two where the first makes what stays."""
    return 1 + any(0 < start < line.steady_from for start, _ in line.moments)


def _traced(case: Case, steps: int) -> tuple[tuple[int, int], list[int]]:
    """Peaks of the first step and the last, and the course of live bytes."""

    def follow(subject: Subject) -> tuple[list[int], list[int]]:
        peaks = []
        with Followed(subject.tensors) as tracker:
            for _ in range(steps):
                tracker.peak = tracker.live
                subject.step()
                peaks.append(tracker.peak)
            return peaks, turns(tracker.changes)

    peaks, course = trace(case, follow)[0]
    return (peaks[0], peaks[-1]), course


@pytest.mark.parametrize(("case", "rule"), TRACED, ids=lambda each: getattr(each, "name", each), indirect=["rule"])
@pytest.mark.usefixtures("rule")
def test_the_arithmetic_equals_the_trace(case: Case) -> None:
    """First and steady peak, and every turn that live bytes take where the precision is not mixed, as for eager."""
    line = timeline(case, traced=True)
    peaks, course = _traced(case, _steps(line))

    assert peaks_of(line) == peak_bytes(case, traced=True) == peaks
    if case.precision not in AUTOCAST:
        assert turns(changes(line)) == course


@pytest.mark.parametrize("rule", ["all"], indirect=True)
@pytest.mark.parametrize(("cell", "precision"), GRID, ids=str)
@pytest.mark.usefixtures("rule")
def test_every_cell_of_the_grid_does(cell: tuple[str, str, str, str, str], precision: str) -> None:
    """Both peaks, where everything that can be is rewritten, in 32 bits, in 16, or mixed; odd sizes are cropped.

    Of all cells, in a random order, those in which two values of the axes meet that met in none before.
    """
    variant, skip, upsample, padding, mode = cell
    spec = ModelSpec(variant, 1 if padding == "valid" else 2, 4, skip, padding=padding, upsample=upsample)
    case = Case(spec, height=23, width=30, mode=mode, precision=precision, backend="rewritten")

    first, steady, _ = predicted_peaks(case)

    assert peak_bytes(case, traced=True) == (first, steady)


@pytest.mark.parametrize(("case", "rule"), RUN, ids=lambda each: getattr(each, "name", each), indirect=["rule"])
@pytest.mark.usefixtures("rule")
def test_the_arithmetic_equals_a_run(case: Case) -> None:
    """On the CPU, watched by the profiler alone: both peaks, and the course.

    What an operator makes and frees itself is its own, tap-first's blocks included, and left out; so are the matrices
    of its bands, which the first run makes and later ones find.
    """
    case = replace(case, device="cpu")
    make_subject(case, "cpu").step()

    line = timeline(case)
    real = profiled(case, _steps(line))

    assert peaks_of(line) == peak_bytes(case) == (real.peaks[0], real.peaks[-1])
    assert turns(changes(line)) == real.turns


@pytest.mark.parametrize("rule", ["all"], indirect=True)
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("rule")
def test_layouts_decide_what_is_copied(channels: int, norm: str, mode: str) -> None:
    """Norms copy what tap-first answers in channels-last, and autograd its gradients; of one channel there is one."""
    spec = ModelSpec("unet3+", 2, channels, max_width=channels, norm=norm)
    case = Case(spec, 2, 16, 20, mode, layout="channels_last", backend="rewritten")
    line, traced = timeline(case), timeline(case, traced=True)
    make_subject(case, "cpu").step()

    real, (peaks, course) = profiled(case), _traced(case, _steps(traced))

    assert (peaks_of(line), turns(changes(line))) == ((real.peaks[0], real.peaks[-1]), real.turns)
    assert (peaks_of(traced), turns(changes(traced))) == (peaks, course)


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counting_decides_as_in_the_network(variant: str, mode: str) -> None:
    """By counting, without a rule of a test: the traced peaks of a network of which some edges are rewritten."""
    case = Case(ModelSpec(variant, 2, 24, upsample="bilinear"), height=48, width=32, mode=mode, backend="rewritten")

    first, steady, _ = predicted_peaks(case)

    assert peak_bytes(case, traced=True) == (first, steady)
    assert any(each.choice.taken for each in rewritings(case.graph(), case.height, case.width))


@pytest.mark.parametrize("precision", CHOICES["precision"])
@pytest.mark.parametrize("device", CHOICES["device"])
def test_what_is_rewritten_is_what_is_listed(precision: str, device: str) -> None:
    """The moments of a timeline have no up-sampling on the edges that `rewritings` takes, and one on the others."""
    spec = ModelSpec("unet3+", 3, 16)
    case = Case(spec, 2, 64, 48, precision=precision, device=device, backend="rewritten")
    made = rewritings(case.graph(), 64, 48, batch=2, precision=precision, device=device)

    up_sampled = {moment for moment in moments(timeline(case)) if moment.endswith(": up-sampling")}

    assert {f"{each.edge}: up-sampling" for each in made if not each.choice.taken} == {
        moment for moment in up_sampled if not moment.startswith("head")
    }


@pytest.mark.parametrize("rule", ["all"], indirect=True)
@pytest.mark.usefixtures("rule")
def test_no_up_sampled_map_is_kept() -> None:
    """In training UNet 3+ keeps small maps where eager keeps enlarged ones; nothing rewritten costs more."""
    eager = Case(ModelSpec("unet3+", 3, 8), 2, 64, 64, mode="training")
    case = replace(eager, backend="rewritten")

    kept, kept_small = ({each.name for each in timeline(it).storages if each.kind == "saved"} for it in (eager, case))

    assert any(name.endswith("up-sampling") for name in kept)
    assert not any(name.endswith("up-sampling") for name in kept_small)
    assert peak_bytes(case)[1] < peak_bytes(eager)[1]


@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize(("case", "rule"), TRACED[:9], ids=lambda each: getattr(each, "name", each), indirect=["rule"])
@pytest.mark.usefixtures("rule")
def test_a_timeline_keeps_its_promises(case: Case, mode: str) -> None:
    """One life for each storage, a course that ends as it began, a peak that adds up, an envelope over batches."""
    case = replace(case, mode=mode)
    line = timeline(case)

    moment, alive = at_peak(line)

    assert sorted(event for event in line.events if event > 0) == list(range(1, len(line.storages) + 1))
    assert all(each.start < each.end for each in tracks(line))
    assert sum(each.bytes for each in alive) == peak_bytes(case)[1] == peaks_of(line)[1]
    assert moment in moments(line)
    assert all(life.first <= life.last for life in lives(line))
    if not why_no_envelope(case):
        peaks = {batch: max(peak_bytes(replace(case, batch=batch))) for batch in (1, 2, 5, 100)}
        assert {batch: envelope(case).peak(batch) for batch in peaks} == peaks


def test_the_batch_decides_what_is_composed() -> None:
    """Weights that are kept are weighed against a map's bytes, so there is no line over batches, and it says so."""
    case = Case(ModelSpec("unet", 2, 16), height=32, width=32, backend="rewritten")

    with pytest.raises(ValueError, match=r"the batch decides which transposed convolutions.*upsample=bilinear"):
        envelope(case)


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_the_row_is_counted(mode: str) -> None:
    """A sweep's figure is the arithmetic's, without a note, and says what a call adds inside; eager's has no such."""
    case = Case(ModelSpec("unet3+", 2, 24), height=32, width=32, mode=mode, backend="rewritten")
    row = METRICS["peak_memory_predicted_bytes"]

    (result, *_), (plain, *_) = (row.measure(it, Budget()) for it in (case, replace(case, backend="eager")))

    assert result.samples[0] == peak_bytes(case)[1]
    assert not result.note
    assert result.detail["workspace_bytes"] == workspace_bytes(case) > 0
    assert "workspace_bytes" not in plain.detail


DOCUMENTED = {"UNet 3+": ("unet3+", None), "UNet++": ("unet++", "transpose"), "U-Net": ("unet", "transpose")} | {
    "UNet++, bilinear": ("unet++", "bilinear"),
    "U-Net, bilinear": ("unet", "bilinear"),
}


@pytest.mark.sources
def test_the_documented_peaks_are_these() -> None:
    """Every peak in the tables of docs/rewritten.md, eager and rewritten, to the MiB."""
    text = (ROOT / "docs" / "rewritten.md").read_text()
    row = re.compile(r"^\| ([^|]+) \| (\d+)x\d+ \|[^|]+\|((?: \d+ -> \d+ MiB \([\d.]+\) \|)+)$", re.MULTILINE)

    rows = row.findall(text)

    assert sorted(name for name, *_ in rows) == sorted(2 * [*DOCUMENTED])
    for name, side, peaks in rows:
        variant, upsample = DOCUMENTED[name]
        spec = ModelSpec(variant, 4, 64, upsample=upsample)
        documented = re.findall(r"(\d+) -> (\d+) MiB", peaks)
        for mode, pair in zip(CHOICES["mode"], documented, strict=False):
            eager = Case(spec, 1, int(side), int(side), mode)
            cases = eager, replace(eager, backend="rewritten")
            assert tuple(f"{peak_bytes(case)[1] / 2**20:.0f}" for case in cases) == pair


FIXED = {"device": "cpu", "mode": "training", "size": "128", "precision": "fp32"}
CHOSEN = {"variant": ["unet3+"], "skip": ["concat"], "depth": ["3"], "width": ["8..64"]}


def test_fit_finds_the_widest_rewritten_network() -> None:
    """Width by width, since what is rewritten depends on it; at least as wide as the widest under eager."""
    (eager, line) = lattice(read_axes({**CHOSEN, "backend": ["eager", "rewritten"]}), FIXED, 2).lines
    limit = max(peak_bytes(eager.at(32)))

    found = widest(line, line.widths, lambda case: max(peak_bytes(case)) <= limit)

    fitting = [width for width in line.widths if max(peak_bytes(line.at(width))) <= limit]
    assert line.uneven
    assert line.widths[found] == max(fitting) > 32


@pytest.mark.parametrize(
    ("backend", "device", "sentence"),
    [
        ("compile", "cpu", "backend=compile cannot be predicted by arithmetic"),
        ("compile", "cuda", "what a GPU reports of backend=compile is not predicted.*use backend=eager or rewritten"),
        ("fastest", "cpu", "unknown backend 'fastest'.*accepted: eager"),
    ],
)
def test_fit_refuses_what_nobody_can_tell(backend: str, device: str, sentence: str) -> None:
    """A backend without arithmetic, or without what a GPU's kernels take, is refused with the reason."""
    with pytest.raises(BenchError, match=sentence):
        lattice(read_axes({**CHOSEN, "backend": [backend]}), FIXED | {"device": device}, 1)


AXES = [
    *((5, 6, 2, 7, 3, 1), (2, 2, 2, 48, 32, 1), (40, 9, 2, 16, 8, 1), (33, 20, 4, 5, 6, 0), (17, 5, 8, 1, 2, 1)),
    *((33, 64, 8, 3, 64, 1), (20, 20, 16, 2, 40, 1)),  # sums in several parts
]


@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize(("height", "width", "factor", "in_channels", "out_channels", "padding"), AXES)
def test_the_workspace_of_a_call_is_counted(
    height: int,
    width: int,
    factor: int,
    in_channels: int,
    out_channels: int,
    padding: int,
    dtype: torch.dtype,
    backward: bool,  # noqa: FBT001 - a parameter of the table
) -> None:
    """Bytes that a call has alive inside, beyond what goes in and comes out, followed tensor by tensor."""
    settings = factor, "bilinear", False, padding, (0, 0, height * factor, width * factor)
    x = torch.randn(2, in_channels, height, width, dtype=dtype)
    weight = torch.randn(out_channels, in_channels, 3, 3, dtype=dtype)
    rows, columns = tap_first.axes((height, width), (3, 3), *settings)
    gradient = torch.randn(2, out_channels, rows.output, columns.output, dtype=dtype)

    def call() -> Any:
        if backward:
            return tap_first._tap_first_backward._init_fn(gradient, x, weight, *settings, True, True)
        return tap_first._tap_first._init_fn(x, weight, None, *settings)

    call()  # makes the matrices of the bands
    with LiveBytes(_tensors()) as tracker:
        before = tracker.live
        result = call()
        inside, left = tracker.peak - before, tracker.live - before

    counted = tap_costs.workspace_bytes(
        rows, columns, (in_channels, out_channels), dtype.itemsize, backward=backward
    )  # fmt: skip
    assert left == sum(each.nbytes for each in (result if backward else [result]))
    assert inside - left == counted


def _tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows of, those too that conftest hides from the garbage collector."""
    gc.unfreeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what looking at a deprecated object says
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    gc.freeze()
    return found
