"""The best network at a row of limits: each line is what looking at every network gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_store import make_store

from skipcost.bench.units import parse_bytes, parse_count, parse_seconds
from skipcost.reports.data import Data, load
from skipcost.reports.grid import Cell
from skipcost.reports.sections.choose import MOST, Choice, choose_context
from skipcost.reports.sections.provenance import raw

MEMORY, LATENCY, TRAINING = 0, 1, 2  # the tables of the small store, in their order
METRICS = ("peak_memory_predicted_bytes", "latency_s", "peak_memory_predicted_bytes")
READERS = {"bytes": parse_bytes, "seconds": parse_seconds, "count": parse_count, "macs": parse_count}
MODES = ("inference", "inference", "training")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small store: one latency doubtful, one failed, everything else exact."""
    return make_store(tmp_path_factory.mktemp("choose") / "tiny.sqlite")


@pytest.fixture(scope="module")
def data(path: Path) -> Data:
    """The store without scores."""
    return load(path)


def choices_of(data: Data) -> list[Choice]:
    """The section's tables."""
    found: list[Choice] = choose_context(data)["choices"]
    return found


def lines_of(choice: Choice) -> list[dict[str, Cell]]:
    """A table's lines, by column."""
    return [dict(zip(choice.table.columns, row, strict=True)) for row in choice.table.rows]


def test_the_form_asks_for_what_has_rows(data: Data) -> None:
    """Memory by mode, latency, then what is counted; each example is a limit that some networks keep and some break."""
    fields = choose_context(data)["fields"]

    assert [field.key for field in fields] == ["memory", "training-memory", "latency", "parameters", "MACs"]
    for field in fields:
        values = data.networks(field.cost.mode)[field.cost.metric]
        assert values.min() <= READERS[field.cost.unit](field.example) <= values.max()


def test_rows_say_where_they_belong(data: Data) -> None:
    """What the page carries tells a case's network and setting, so that its script needs no second copy."""
    carried = raw(data)

    frame = data.frame[data.frame["same_as"] == ""].set_index("case_id")
    assert set(carried["cases"]) == set(frame.index)
    for case_id, found in carried["cases"].items():
        row = frame.loc[case_id]
        assert found["axes"] == [row["variant"], row["depth"], row["width"], row["skip"]]
        assert (found["label"], found["setting"]) == (row["label"], row["setting"])
    assert carried["settings"] == data.settings


@pytest.mark.parametrize("at", [MEMORY, LATENCY, TRAINING])
def test_each_line_is_the_best_network_that_keeps_its_limit(data: Data, at: int) -> None:
    """By loops over all rows: the farthest field, then the widest, of sound ones with the papers' own skip scheme."""
    metric = METRICS[at]
    sound = data.sound[(data.sound["mode"] == MODES[at]) & (data.sound["skip"] == "concat")]
    lines = lines_of(choices_of(data)[at])

    for line in lines:
        kept = sound[sound[metric] <= line["at most"].order]
        best = kept.sort_values(["receptive_field", "width"]).iloc[-1]
        assert (line["best network"].text, line["sees"].order) == (best["label"], best["receptive_field"])

    assert lines[-1]["at most"].order is not None
    assert lines[-1]["at most"].order >= sound[metric].max()
    assert 1 < len(lines) <= MOST


def test_limits_are_round_and_a_line_is_another_network(data: Data) -> None:
    """Powers of two of bytes; 1, 2 and 5 of seconds."""
    memory, latency, _ = (lines_of(each) for each in choices_of(data))

    assert all(math.log2(line["at most"].order or 0).is_integer() for line in memory)
    assert {f"{line['at most'].order:.0e}"[0] for line in latency} <= {"1", "2", "5"}
    assert all(len({line["best network"].text for line in lines}) == len(lines) for lines in (memory, latency))


def test_a_doubtful_latency_limits_nothing_and_has_its_mark_elsewhere(data: Data) -> None:
    """Its network, else the best of all, is chosen by its memory, which is exact."""
    best = "unet3+/d3/w16/concat"
    case_id = data.networks("inference").set_index("label").loc[best, "case_id"]
    doubtful = replace(data.results[case_id]["latency_s"], note="held up: it waited")
    told = data.results | {case_id: data.results[case_id] | {"latency_s": doubtful}}

    memory, latency, _ = (lines_of(each) for each in choices_of(replace(data, results=told)))

    assert [line["latency"].text[:2] for line in memory if line["best network"].text == best] == ["~ "]
    assert best not in [line["best network"].text for line in latency]
    assert best in [line["best network"].text for line in lines_of(choices_of(data)[LATENCY])]


def test_one_step_more_is_what_the_next_of_the_line_takes(data: Data) -> None:
    """Wider at the same depth, deeper at the same width; nothing behind the last."""
    first, *_, last = lines_of(choices_of(data)[MEMORY])
    rows = data.networks("inference").set_index("label")["peak_memory_predicted_bytes"]

    wider, deeper = first["one step more"].text.split("; ")

    assert wider.startswith("wider (width 12): ")
    assert parse_bytes(wider.partition(": ")[2].replace(" ", "")) == pytest.approx(rows["unet/d2/w12/concat"], rel=5e-3)
    assert parse_bytes(deeper.partition(": ")[2].replace(" ", "")) == pytest.approx(rows["unet/d3/w8/concat"], rel=5e-3)
    assert last["one step more"].text == ""


def test_scores_go_before_what_a_network_sees(path: Path, tmp_path: Path) -> None:
    """Then every skip scheme may win, and the score is in the line."""
    scores = tmp_path / "scores.csv"
    scores.write_text("label,score\nunet/d2/w8/none,0.9\nunet3+/d3/w16/concat,0.5\n")

    context = choose_context(load(path, scores))

    lines = lines_of(context["choices"][MEMORY])
    assert context["scores"] == "scores.csv"
    assert [(line["best network"].text, line["score"].text) for line in lines] == [("unet/d2/w8/none", "0.9")]


def test_two_networks_are_no_choice(data: Data) -> None:
    """Without a latency or a memory of three there is no table."""
    few = data.frame[data.frame["label"].isin(["unet/d2/w8/concat", "unet/d2/w12/concat"])]

    context = choose_context(replace(data, frame=few))

    assert context["choices"] == []
