"""`skipcost kernels bench` with tiny networks, on a CPU: no row is unverified, doubled, or missing without a word."""

from __future__ import annotations

import importlib
import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import bench, jobs, judging, measuring, networks
from skipcost.bench.kernels.cases import need, settings
from skipcost.bench.kernels.jobs import Row
from skipcost.bench.kernels.judging import part_of
from skipcost.bench.kernels.measuring import open_bench
from skipcost.bench.kernels.networks import QUICK_WAYS, SLOW_WAYS, parse_case, wanted
from skipcost.bench.measure import journal
from skipcost.bench.measure.journal import Journal, identity
from skipcost.bench.measure.timing import Budget
from skipcost.kernels.backends import WAYS
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.winners import own_file, read_rows
from skipcost.kernels.ops.tiles import default_tile
from skipcost.kernels.outputs import OutputError
from skipcost.kernels.verify import table

pytestmark = pytest.mark.usefixtures("one_thread")

LABEL = "unet/d1/w2/concat/bias=false"
NETWORK = f"{LABEL}@8"
QUICK: dict[str, Any] = {
    "device": "cpu",
    "copied_bytes": 2**16,
    "side": 16,
    "budget": Budget(seconds=0.01, noise=1.0, least=3, warmup_seconds=0.01),
}
ORIGIN: dict[str, Any] = {"device": {"name": "a card"}, "versions": {"torch": "1"}}
GOOD: dict[str, Any] = {"outcome": "ok", "seconds": [1e-3]}
CALL = Call("conv_bn_relu", 1, ((64, 32, 32),), 64)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results and this machine's map of winners out of the way."""
    monkeypatch.chdir(tmp_path)
    # The tree may be worked on while tests run; that other code is measured again is another test's.
    monkeypatch.setattr("skipcost.bench.kernels.measuring.code_hash", lambda: "this code")
    monkeypatch.setenv("SKIPCOST_KERNELS", str(tmp_path / "own"))


def rows_of(path: Path) -> list[Row]:
    """The rows of a file."""
    return list(read_rows(path.read_text()))


def test_rows_are_written_as_they_come_and_never_twice(tmp_path: Path) -> None:
    """The second journal of the same machine knows them; another machine's, or other code's, does not."""
    path = tmp_path / "deep" / "rows.jsonl"
    row = {"op": CALL.op, "call": CALL.key, "precision": "bf16", **part_of("triton", None), "outcome": "ok"} | {
        "seconds": [1e-3]
    }

    first = Journal(path, ORIGIN, tmp_path / "copy.jsonl")
    first.add(row)

    assert identity(row) in first.known
    assert identity(row) in Journal(path, ORIGIN).known
    assert Journal(path, ORIGIN | {"device": {"name": "another"}}).known == set()
    assert Journal(path, ORIGIN | {"versions": {"torch": "2"}}).rows == []
    assert rows_of(path)[0].items() >= (row | ORIGIN).items()
    assert rows_of(tmp_path / "copy.jsonl") == rows_of(path)


def test_a_row_that_was_torn_off_costs_only_itself(tmp_path: Path) -> None:
    """The next row does not continue its line; a line that only lacks its end is kept."""
    path = tmp_path / "rows.jsonl"
    row = {"op": CALL.op, "call": CALL.key, "precision": "bf16", **part_of("triton", None), "outcome": "ok"} | {
        "seconds": [1e-3]
    }
    Journal(path, ORIGIN).add(row)
    path.write_text(path.read_text() + '{"op": "conv_bn')

    Journal(path, ORIGIN).add(row | {"call": "another"})

    assert [each["call"] for each in Journal(path, ORIGIN).rows] == [CALL.key, "another"]
    path.write_text(path.read_text().rstrip())
    assert [each["call"] for each in Journal(path, ORIGIN).rows] == [CALL.key, "another"]
    assert path.read_text().endswith("\n")


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(tmp_path: Path) -> None:
    """Not after an hour of measuring."""
    (tmp_path / "results").write_text("mine")

    with pytest.raises(OutputError, match=r"cannot write results/rows\.jsonl"):
        Journal(Path("results/rows.jsonl"), ORIGIN)


def test_tiles_make_different_measurements() -> None:
    """And the same ones the same, whatever the order of their fields."""
    tile = asdict(default_tile(need(CALL), "pointer"))
    row = {"call": CALL.key, "implementation": "triton", "tile": tile}

    assert identity(row) == identity(row | {"tile": dict(reversed(tile.items()))})
    assert identity(row) != identity(row | {"tile": tile | {"warps": 16}})
    assert identity(row) != identity(row | {"tile": None})


def test_chunks_keep_a_calls_configurations_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their operands are made once; none is lost."""
    monkeypatch.setattr(measuring, "CHUNK", 3)
    todo = [(replace(CALL, batch=batch), name, None) for batch in (1, 2, 3) for name in ("a", "b")]

    chunks = list(measuring._chunks(todo))

    assert [each for chunk in chunks for each in chunk] == todo
    assert [len(chunk) for chunk in chunks] == [4, 2]


def test_code_is_part_of_what_was_measured() -> None:
    """A changed kernel is measured again."""
    assert len(journal.code_hash()) == 12
    assert journal.code_hash() == journal.code_hash()


def test_calls_are_verified_timed_written_and_not_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's implementations on the CPU: a row for each cache, with all that the map of winners reads."""
    monkeypatch.setattr(bench, "PRECISION", "fp32")  # which CPUs are fast at
    words = ["-o", "rows.jsonl", "--networks", NETWORK, "--only", "calls", "--ops", "conv_bn_relu_pool,up_conv"]

    first = bench.main(words, **QUICK)
    rows = rows_of(Path("rows.jsonl"))
    again = bench.main(words, **QUICK)

    assert (first, again) == (0, 0)
    assert rows_of(Path("rows.jsonl")) == rows
    assert {row["op"] for row in rows} == {"conv_bn_relu_pool", "up_conv"}
    assert {row["implementation"] for row in rows} == {"reference", "cudnn"}
    assert {row["cache"] for row in rows} == {"hot", "cold"}
    for row in rows:
        assert row["outcome"] == "ok"
        assert len(row["seconds"]) >= 3
        assert min(row["seconds"]) > 0
        assert 0 <= row["worst"] <= 1
        assert row["fraction_of_copy"] > 0
        assert row["fraction_of_matmul"] > 0
        assert {"device", "versions", "time", "graph", "precision", "tile", "note"} <= set(row)
        assert Call.parse(row["call"]).precision == row["precision"]
    assert rows_of(own_file()) == rows
    assert f"{len(rows)} rows of this machine are in rows.jsonl" in capsys.readouterr().err


def test_what_is_wrong_is_a_row_and_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no samples, is final, is printed, and makes the command fail; the map of winners does not get it."""
    kernel = table.KERNELS["up_conv"]
    honest = kernel.implementations["reference"]
    ways = {"reference": honest, "triton": lambda given, tile: (honest(given, tile)[0] * 2,)}
    monkeypatch.setitem(table.KERNELS, "up_conv", replace(kernel, implementations=ways))
    monkeypatch.setattr(bench, "implementations", lambda call, _device: list(table.KERNELS[call.op].implementations))
    words = ["-o", "rows.jsonl", "--networks", NETWORK, "--only", "calls", "--ops", "up_conv"]

    code = bench.main(words, **QUICK)

    wrong = [row for row in rows_of(Path("rows.jsonl")) if row["implementation"] == "triton"]
    assert code == 1
    assert {row["outcome"] for row in wrong} == {"wrong"}
    assert all(row["seconds"] == [] and row["cache"] is None and row["tile"] for row in wrong)
    assert "failed: up_conv triton" in capsys.readouterr().out
    assert all(row["implementation"] == "reference" for row in rows_of(own_file()))


def test_what_there_is_no_time_for_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves no row behind, so that the next run measures it."""
    words = ["-o", "rows.jsonl", "--networks", NETWORK, "--only", "calls", "--ops", "up_conv", "--seconds", "0"]

    with pytest.raises(MachineError, match="--seconds 0 were over"):
        bench.main(words, **QUICK)
    opened = open_bench(Path("rows.jsonl"), "kernels", seconds=60, **QUICK)
    left = replace(opened, until=0.0).time_calls("calls", bench.shipped([CALL], "cpu"))

    assert left == 2
    assert opened.journal.rows == []
    assert "verifying" not in capsys.readouterr().err


def test_networks_are_verified_and_timed_in_every_way_that_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are found by label, case, precision and way; what a CPU cannot run says so in its row."""
    rows_wanted = wanted(settings([NETWORK], [(1, "inference"), (2, "training")]), QUICK_WAYS)
    opened = open_bench(Path("rows.jsonl"), "kernels", seconds=600, **QUICK)

    left = bench.time_networks(opened, "networks", rows_wanted)
    bench.print_networks(opened.journal.rows)

    found = {(row["case"], row["precision"], row["implementation"]): row for row in opened.journal.rows}
    assert left == 0
    assert {key: row["outcome"] for key, row in found.items()} == {
        ("n1 8x8 inference", "bf16", "eager"): "ok",
        ("n1 8x8 inference", "bf16", "folded"): "ok",
        ("n1 8x8 inference", "bf16", "fused"): "unsupported",
        ("n2 8x8 training", "amp-bf16", "eager"): "ok",
        ("n2 8x8 training", "amp-bf16", "fused"): "unsupported",
    }
    for row in opened.journal.rows:
        assert row["network"] == LABEL
        assert "call" not in row
        if row["outcome"] == "ok":
            assert row["seconds"]
            assert 0 < row["worst"] <= 1
            assert row["fraction_of_matmul"] > 0
    assert "need a CUDA GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_kinds_of_rows() -> None:
    """As on a GPU: all that is asked and answered goes through JSON, each function is found by its name; one is run."""
    call = Call("up_conv", 1, ((4, 3, 3),), 2, precision="fp32")
    brief = asdict(QUICK["budget"])
    shared = {"call": call.key, "device": "cpu", "kind": "normal", "caches": ["hot", "cold"], "budget": brief}
    network = {"network": LABEL, "case": "n1 8x8 inference", "device": "cpu", "budget": brief}
    sizes = {"device": "cpu", "sizes": {"copied_bytes": 2**16, "side": 16}, "budget": brief}
    work = {
        judging.verify: (shared, part_of("reference", None)),
        measuring.take: (shared, part_of("reference", None)),
        measuring.survey: (sizes, {}),
        networks.take: (network, {"implementation": "eager"}),
    }

    until, rows = time.time() + 120, {}
    for each, (what, part) in work.items():
        out, asked = io.StringIO(), json.dumps({"what": what, "parts": [part], "until": until})
        jobs.serve(getattr(importlib.import_module(each.__module__), each.__name__), io.StringIO(asked), out)
        rows[each] = json.loads(out.getvalue().splitlines()[0])["row"]
    what, part = work[judging.verify]
    outside = next(jobs.run([jobs.Job(what, (part,))], judging.verify, jobs.Limits(until))).row

    assert {each: row.get("outcome", "ok") for each, row in rows.items()} == dict.fromkeys(work, "ok")
    assert outside == rows[judging.verify]


def test_the_order_is_calls_first_and_what_compiles_last() -> None:
    """Networks on our kernels run by what their calls have measured; compiling takes what time is left."""
    opened = open_bench(Path("rows.jsonl"), "kernels", seconds=60, **QUICK)
    asked = settings([NETWORK], bench.BATCHES)

    everything = [title for title, _ in bench.stages(opened, asked, ("up_conv",), None)]
    networks_only = [title for title, _ in bench.stages(opened, asked, ("up_conv",), "networks")]

    assert everything == [
        "calls at inference",
        "networks",
        "calls in training",
        "networks, compile",
        "networks, compile-max",
    ]
    assert networks_only == ["networks", "networks, compile", "networks, compile-max"]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_network_that_computes_something_else_is_not_timed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the error of eager PyTorch is allowed, not another result."""

    def off(network: nn.Module) -> nn.Module:
        class Off(nn.Module):
            def forward(self, image: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = WAYS["eager"](network)(image)
                return result * 1.1

        return Off()

    monkeypatch.setitem(WAYS, "folded", off)
    what = {"network": LABEL, "case": f"n2 8x8 {mode}", "device": "cpu", "budget": asdict(QUICK["budget"])}

    honest, wrong = networks.take(what, [{"implementation": "eager"}, {"implementation": "folded"}])

    assert honest["outcome"] == "ok"
    assert honest["worst"] == pytest.approx(0.5, rel=0.01)  # its own error is half of what is allowed
    assert wrong["outcome"] == "wrong"
    assert "off by" in wrong["note"]


def test_a_network_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ways are timed all the same."""

    def broken(_network: nn.Module) -> nn.Module:
        message = "no kernel image"
        raise RuntimeError(message)

    monkeypatch.setitem(WAYS, "folded", broken)
    what = {"network": LABEL, "case": "n1 8x8 inference", "device": "cpu", "budget": asdict(QUICK["budget"])}

    first, second = networks.take(what, [{"implementation": "folded"}, {"implementation": "eager"}])

    assert (first["outcome"], second["outcome"]) == ("crash", "ok")
    assert "no kernel image" in first["note"]


def test_a_case_is_read_back() -> None:
    """Batch, height, width, mode."""
    (row,) = wanted(settings(["unet/d1/w2/concat@10"], [(8, "training")]), SLOW_WAYS)

    assert parse_case(row["case"]) == (8, 10, 10, "training")
    assert row["implementation"] == "compile"  # freezing weights is no way to train them
    assert {*QUICK_WAYS, *SLOW_WAYS} == set(WAYS)


def test_losses_are_printed_as_plainly_as_wins(capsys: pytest.CaptureFixture[str]) -> None:
    """Losses first, each call once with the best of both sides."""
    rows = [
        {
            **measuring.call_row((replace(CALL, batch=batch), name, None)),
            "outcome": "ok",
            "cache": "hot",
            "seconds": [microseconds * 1e-6],
            "fraction_of_copy": 0.5,
            "fraction_of_matmul": None,
        }
        for batch, times in ((1, (40, 30, 20, 10)), (2, (10, 20, 30, 40)))
        for name, microseconds in zip(("reference", "cudnn", "triton", "tma"), times, strict=True)
    ]

    bench.print_calls(rows)

    loss, win, summary = capsys.readouterr().out.splitlines()[1:4]
    assert loss.split()[1:] == [
        *replace(CALL, batch=2).key.split()[1:],
        "reference",
        "10",
        "triton",
        "30",
        "0.333",
        "50%",
        "-",
    ]
    assert win.split()[-7:] == ["cudnn", "30", "tma", "10", "3", "50%", "-"]
    assert summary == "ours is faster in 1 of 2 calls, not in the others; mean 1.00x"
