"""Tuned tiles: which of several wins, how they are written down, and that the ops then take them."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.kernels import tune
from skipcost.bench.kernels.cases import need
from skipcost.bench.kernels.jobs import Row
from skipcost.bench.kernels.measuring import call_row
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.ops import tiles
from skipcost.kernels.ops.tiles import Tile, default_tile, tile_for

CALL = Call("conv_bn_relu", 1, ((64, 32, 32),), 64)
ORIGIN: dict[str, Any] = {"device": {"name": "a card"}, "versions": {"torch": "1", "triton": "2", "cuda": "3"}}


def timing(call: Call, tile: Tile, microseconds: float, outcome: str = "ok") -> Row:
    """A row as tuning leaves it in its journal."""
    row = call_row((call, "triton", tile)) | ORIGIN | {"time": "2026-01-02T03:04:05+00:00", "cache": "hot"}
    return row | {"outcome": outcome, "seconds": [microseconds * 1e-6] if outcome == "ok" else [], "note": ""}


SMALL, LARGE, OTHER = Tile("pointer", 64, 64, 64), Tile("pointer", 128, 64, 64), Tile("pointer", 128, 32, 64)


def test_shapes_that_share_a_tile_get_the_one_that_loses_least() -> None:
    """LARGE is best on one and bad on the other, SMALL is nearly best on both, OTHER was wrong on one."""
    first, second = replace(CALL, batch=4), replace(CALL, batch=5)
    rows = [timing(first, LARGE, 10), timing(first, SMALL, 11), timing(first, OTHER, 5)]
    rows += [timing(second, LARGE, 30), timing(second, SMALL, 12), timing(second, OTHER, 0, "wrong")]

    (row,) = tune.winners(rows)

    assert tiles.tuning_key(need(first), "pointer") == tiles.tuning_key(need(second), "pointer")
    assert Tile(**row["tile"]) == SMALL
    assert row["seconds"] == 11e-6
    assert (row["device"], row["triton"], row["date"]) == ("a card", "2", "2026-01-02")


def test_nothing_is_tuned_where_no_tile_is_right_for_all() -> None:
    """The default stays."""
    rows = [timing(replace(CALL, batch=4), LARGE, 10), timing(replace(CALL, batch=5), SMALL, 10)]

    assert tune.winners(rows) == []


def test_winners_are_the_same_from_the_same_timings_in_any_order(tmp_path: Path) -> None:
    """So that a file that was written again shows no differences but real ones."""
    rows = [timing(replace(CALL, batch=batch), tile, 10) for batch in (1, 4, 64) for tile in (LARGE, SMALL)]

    tune.write(tune.winners(rows), tmp_path / "one.json")
    tune.write(tune.winners(rows[::2] + rows[1::2]), tmp_path / "two.json")

    text = (tmp_path / "one.json").read_text()
    keys = [json.loads(line.rstrip(","))["key"] for line in text.splitlines()[1:-1]]
    assert text == (tmp_path / "two.json").read_text()
    assert keys == sorted(keys)
    assert len(keys) == 3


def test_the_ops_take_the_tile_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read by the table of tiles; rows for other shapes stay in it."""
    path = tmp_path / "configs" / "sm12.json"
    monkeypatch.setattr(importlib.resources, "files", lambda _package: tmp_path)
    untouched = Call("up_conv", 1, ((8, 8, 8),), 8)
    tune.write(tune.winners([timing(untouched, SMALL, 10)]), path)

    tune.write(tune.winners([timing(CALL, OTHER, 10)]), path)

    tiles._tuned.cache_clear()
    assert tile_for(need(CALL), "pointer", "sm12") == OTHER
    assert tile_for(need(untouched), "pointer", "sm12") == SMALL
    assert tile_for(need(CALL), "pointer", "") == default_tile(need(CALL), "pointer") != OTHER
    tiles._tuned.cache_clear()
