"""`skipcost kernels check` and `tune` on our kernels, run by Triton's interpreter.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_bench/kernels/test_commands_interpreted.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcost.bench.kernels import check, tune
from skipcost.bench.kernels.__main__ import main
from skipcost.bench.kernels.judging import FAILURES
from skipcost.bench.measure.timing import Budget
from skipcost.kernels.ops import conv_bn_relu
from skipcost.kernels.ops.launch import Launch
from skipcost.kernels.ops.tiles import CANDIDATES, Tile
from skipcost.kernels.verify import table

# 16 channels so that descriptors can move the maps; 6 pixels a side so that tiles hang over the edge, pooling included.
NETWORK = "unet/d1/w16/concat@6"
QUICK: dict[str, Any] = {
    "device": "cpu",
    "copied_bytes": 2**16,
    "side": 16,
    "budget": Budget(seconds=0.01, noise=1.0, least=2, warmup_seconds=0.01),
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The tree may be worked on while tests run; that other code is measured again is another test's.
    monkeypatch.setattr("skipcost.bench.kernels.measuring.code_hash", lambda: "this code")
    monkeypatch.setattr(check, "INTERPRETED", ("fp32",))
    monkeypatch.setattr(check, "BATCHES", ((2, "inference"), (2, "training")))
    monkeypatch.setattr(check, "DATA", ("positive",))


def test_every_op_passes_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a user runs it: nothing fails, and each of our implementations has run."""
    code = main(["check", "--device", "cpu", "--networks", f"{NETWORK},unet3+/d1/w2/concat@6", "--json"])

    heard = capsys.readouterr()
    rows = json.loads(heard.out)
    ran = {(row["op"], row["implementation"]) for row in rows if row["outcome"] == "ok"}
    assert code == 0, [row for row in rows if row["outcome"] in FAILURES]
    assert ran == {(op, name) for op, kernel in table.KERNELS.items() for name in kernel.implementations}
    assert {row["data"] for row in rows} == {"positive"}
    assert "fp32 only" in heard.err


def test_a_wrong_kernel_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel whose channels are rolled by one: exit code 1, and the line says which."""
    honest = conv_bn_relu.launches

    def rolled(maps: Any, *arguments: Any, **options: Any) -> list[Launch]:
        return honest([each.roll(1, 1) for each in maps], *arguments, **options)

    monkeypatch.setattr(conv_bn_relu, "launches", rolled)

    code = main(["check", "--device", "cpu", "--networks", NETWORK, "--ops", "conv_bn_relu_pool"])

    out = capsys.readouterr().out
    assert code == 1
    assert "failed: conv_bn_relu_pool triton: " in out
    assert "failed: conv_bn_relu_pool tma: " in out
    assert "failed: conv_bn_relu_pool reference" not in out


def test_tuning_writes_a_tile_for_each_shape_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates of each form; the second run finds everything in the journal and writes the same file."""
    monkeypatch.setattr(tune, "PRECISIONS", ("fp16",))
    monkeypatch.setattr(tune, "BATCHES", ((1, "inference"),))
    for form, tiles in list(CANDIDATES.items()):
        monkeypatch.setitem(CANDIDATES, form, tiles[:2])
    words = ["-o", "tuned.json", "--journal", "rows.jsonl", "--networks", NETWORK, "--ops", "conv_bn_relu_pool,up_conv"]

    first = tune.main(words, **QUICK)
    tuned, rows = Path("tuned.json").read_text(), Path("rows.jsonl").read_text()
    again = tune.main(words, **QUICK)

    found = json.loads(tuned)["rows"]
    assert (first, again) == (0, 0)
    assert {Tile(**row["tile"]).form for row in found} == {"pointer", "tma"}
    assert {row["key"].partition(" ")[0] for row in found} == {"conv_bn_relu", "up_conv"}
    assert all(row["seconds"] > 0 for row in found)
    assert (Path("tuned.json").read_text(), Path("rows.jsonl").read_text()) == (tuned, rows)


def test_a_wrong_tile_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row says why, and another tile wins however slow it is."""
    fast = CANDIDATES["pointer"][1]
    honest = table.KERNELS["up_conv"]

    def broken(given: table.Operands, tile: Tile | None) -> table.Results:
        (out,) = honest.implementations["triton"](given, tile)
        return (torch.zeros_like(out) if tile == fast else out,)

    ways = {"reference": honest.implementations["reference"], "triton": broken}
    monkeypatch.setitem(table.KERNELS, "up_conv", replace(honest, implementations=ways))
    monkeypatch.setitem(CANDIDATES, "pointer", CANDIDATES["pointer"][:2])
    monkeypatch.setattr(tune, "PRECISIONS", ("fp16",))
    monkeypatch.setattr(tune, "BATCHES", ((1, "inference"),))

    code = tune.main(["-o", "t.json", "--journal", "r.jsonl", "--networks", NETWORK, "--ops", "up_conv"], **QUICK)

    rows = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if row["outcome"] == "wrong"]
    assert code == 1
    assert {Tile(**row["tile"]) for row in wrong} == {fast}
    assert all(not row["seconds"] for row in wrong)
    assert all(Tile(**row["tile"]) != fast for row in json.loads(Path("t.json").read_text())["rows"])
