"""The suite from Python: a sweep that goes on, its table, what a GPU would report, what fits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from skipcost.bench import Case, fit, load_plan, open_store, predict, sweep, wide_table
from skipcost.bench.errors import BenchError
from skipcost.unet_models import ModelSpec

SMALL = {"variant": ["unet"], "depth": ["2"], "width": ["8"], "skip": ["concat", "sum"], "metrics": ["params"]}


@pytest.mark.slow
def test_a_sweep_goes_on_and_its_table_is_what_was_asked_for(tmp_path: Path) -> None:
    """A second plan measures what is new, and its table has its own cases alone; the store has all."""
    path, told = tmp_path / "mine.sqlite", []
    one = load_plan("quick", SMALL | {"skip": ["concat"]}, "cpu", 1)
    both = load_plan("quick", SMALL, "cpu", 1)

    first = sweep(both, path)
    again = sweep(one, str(path), tell=lambda planned, _: told.append(planned))

    assert set(first["label"]) == {"unet/d2/w8/concat", "unet/d2/w8/sum"}
    assert set(again["label"]) == {"unet/d2/w8/concat"}
    assert told == []
    with open_store(path) as store:
        pd.testing.assert_frame_equal(wide_table(store)[list(first)].drop(columns="asked"), first.drop(columns="asked"))


def test_a_gpu_is_predicted_by_its_name() -> None:
    """With its ends in order; another name is refused with what there is."""
    case = Case(spec=ModelSpec(depth=2, width=8), mode="training", device="cuda")

    reserved = predict(case, "h100").steady.reserved

    assert 0 < reserved.low <= reserved.likely <= reserved.high
    with pytest.raises(ValueError, match=r"h999"):
        predict(case, "h999")


def test_what_fits_is_ranked_within_its_limits() -> None:
    """As the command does it: the widest below the limit, and the next wider breaks it."""
    rows = fit("l4", limits={"params": "1M"}, settings=["variant=unet", "depth=2", "skip=concat"], size="64", batch=1)

    assert rows[0]["params"] <= 1_000_000 < rows[0]["outside"]["params"]
    assert rows[0]["outside"]["breaks"] == ["params"]
    with pytest.raises(BenchError, match="'many' is not a count"):
        fit("l4", limits={"params": "many"})
