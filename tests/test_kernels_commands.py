"""`skipcost kernels`: what the commands say, write and return, run on the CPU with tiny networks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from skipcost.kernels import bench, check, journal, measuring, stepping, table, tiles, tune
from skipcost.kernels.__main__ import COMMANDS, main
from skipcost.kernels.calls import Call
from skipcost.kernels.check import print_rows, tell_left_out
from skipcost.kernels.configurations import need, settings
from skipcost.kernels.console import Progress, write_table
from skipcost.kernels.errors import MachineError
from skipcost.kernels.jobs import Row, failed
from skipcost.kernels.journal import Journal, identity
from skipcost.kernels.judging import part_of
from skipcost.kernels.networks import parse_case, wanted
from skipcost.kernels.tiles import Tile, default_tile, tile_for
from skipcost.kernels.timing import Budget
from skipcost.kernels.ways import WAYS
from skipcost.kernels.winners import own_file, read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = "unet/d1/w2/concat/bias=false@8"
LABEL = "unet/d1/w2/concat/bias=false"
QUICK: dict[str, Any] = {
    "device": "cpu",
    "copied_bytes": 2**16,
    "side": 16,
    "budget": Budget(seconds=0.01, noise=1.0, least=3, warmup_seconds=0.01),
}
ORIGIN: dict[str, Any] = {"device": {"name": "a card"}, "versions": {"torch": "1", "triton": "2", "cuda": "3"}}
CALL = Call("conv_bn_relu", 1, ((64, 32, 32),), 64)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results and this machine's map of winners out of the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPCOST_KERNELS", str(tmp_path / "own"))


def rows_of(path: Path) -> list[Row]:
    """The rows of a file."""
    return list(read_rows(path.read_text()))


# The command line


def test_every_command_is_listed_and_has_help() -> None:
    """The list names each, and each explains its own options."""
    listed = subprocess.run(
        [sys.executable, "-m", "skipcost.kernels", "--help"], capture_output=True, text=True, check=True
    )

    assert all(f"  {name} " in listed.stdout for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0


def test_help_loads_neither_torch_nor_triton() -> None:
    """A command's module is imported when the command is chosen."""
    script = "import sys; from skipcost.kernels.__main__ import main; main(['--help']); print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "Usage"),
        (("chek",), 2, "unknown command 'chek'; accepted: check"),
        (("check", "--ops", "conv"), 2, "unknown op 'conv'"),
        (("check", "--networks", "unet"), 2, "is not a label"),
        (("bench", "--ops", "conv"), 2, "unknown op 'conv'"),
        (("tune", "--ops", "crop_concat"), 2, "unknown op 'crop_concat'"),
        (("check", "--device", "cuda"), 4, "sees no CUDA GPU"),
        (("check", "--device", "cpu"), 4, "TRITON_INTERPRET=1"),
        (("bench",), 4, "sees no CUDA GPU"),
        (("tune",), 4, "sees no CUDA GPU"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_code(
    words: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 for usage, 4 for the machine, nothing on stdout."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    returned = main(list(words))

    heard = capsys.readouterr()
    assert returned == code
    assert said in heard.err
    assert heard.out == ""


def test_an_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells take it for what it is."""

    def interrupted(_argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "main", interrupted)

    assert main(["check"]) == 130


# What is told


def test_progress_tells_the_time_left_and_never_more_than_there_is() -> None:
    """Half of the work in ten seconds leaves ten more, or what the limit leaves."""
    progress = Progress("check", 10, until=1e12)
    progress.began = time.time() - 10
    progress.done, progress.failed = 5, 2

    assert progress.line(progress.began + 10) == "check: 5/10, 2 failed, 0:10 left"
    progress.until = progress.began + 13
    assert progress.line(progress.began + 10).endswith("0:03 left")


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Words to the left, numbers to the right, each with three digits or as a whole."""
    write_table(("op", "us"), [("a", 1.23456), ("bcd", 12345.6), ("e", "-")])

    assert capsys.readouterr().out.splitlines() == ["op      us", "a     1.23", "bcd  12346", "e        -"]


def test_a_check_tells_failures_refusals_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Each op and implementation once, with how many, and the worst as the example."""
    common = {
        "op": CALL.op,
        "call": CALL.key,
        "precision": "bf16",
        **part_of("triton", default_tile(need(CALL), "pointer")),
    }
    rows = [
        common | {"outcome": "ok", "note": "", "worst": 0.5},
        common | failed("wrong", "out is off by 7 times") | {"worst": 7.0},
        common | failed("wrong", "out is off by 9 times") | {"worst": 9.0},
        common | failed("unsupported", "no such form"),
        common | failed("left out", "there was no time"),
    ]

    print_rows(rows)
    tell_left_out(rows, 5)

    heard = capsys.readouterr()
    assert heard.out.splitlines()[1].split() == ["conv_bn_relu", "triton", "bf16", "1", "1", "1", "1", "2", "9"]
    assert "failed: conv_bn_relu triton: 2 wrong" in heard.out
    assert "out is off by 9 times" in heard.out
    assert "not run: conv_bn_relu triton: 1 unsupported" in heard.out
    assert "1 configurations left out, since --seconds 5 were over: 1 of conv_bn_relu bf16" in heard.err


def test_a_check_without_time_fails_nothing_and_names_everything() -> None:
    """Every configuration has a row even if none was run."""
    calls = [CALL, replace(CALL, batch=2)]

    rows = check.run(calls, "cpu", 0.0)

    assert len(rows) == len(calls) * len(check.DATA) * 2  # PyTorch's two: ours take a GPU or the interpreter
    assert {row["outcome"] for row in rows} == {"left out"}


# Rows


def test_rows_are_written_as_they_come_and_never_twice(tmp_path: Path) -> None:
    """The second journal of the same machine knows them; another machine's, or other code's, does not."""
    path = tmp_path / "deep" / "rows.jsonl"
    row = {"op": CALL.op, "call": CALL.key, "precision": "bf16", **part_of("triton", None), "outcome": "ok"}

    Journal(path, ORIGIN, tmp_path / "copy.jsonl").add(row)

    assert identity(row) in Journal(path, ORIGIN).known
    assert Journal(path, ORIGIN | {"device": {"name": "another"}}).known == set()
    assert Journal(path, ORIGIN | {"versions": {"torch": "2"}}).rows == []
    assert rows_of(path)[0].items() >= (row | ORIGIN).items()
    assert rows_of(tmp_path / "copy.jsonl") == rows_of(path)


def test_a_row_that_was_torn_off_costs_only_itself(tmp_path: Path) -> None:
    """The next row does not continue its line; a line that only lacks its end is kept."""
    path = tmp_path / "rows.jsonl"
    row = {"op": CALL.op, "call": CALL.key, "precision": "bf16", **part_of("triton", None), "outcome": "ok"}
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

    with pytest.raises(MachineError, match=r"cannot write results/rows\.jsonl"):
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


# bench


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
    opened = bench.open_bench(Path("rows.jsonl"), "kernels", seconds=60, **QUICK)
    left = replace(opened, until=0.0).time_calls("calls", bench.shipped([CALL], "cpu"))

    assert left == 2
    assert opened.journal.rows == []
    assert "verifying" not in capsys.readouterr().err


def test_networks_are_verified_and_timed_in_every_way_that_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are found by label, case, precision and way; what a CPU cannot run says so in its row."""
    rows_wanted = wanted(settings([NETWORK], [(1, "inference"), (2, "training")]), slow=False)
    opened = bench.open_bench(Path("rows.jsonl"), "kernels", seconds=600, **QUICK)

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


def test_the_order_is_calls_first_and_what_compiles_last() -> None:
    """Networks on our kernels run by what their calls have measured; compiling takes what time is left."""
    opened = bench.open_bench(Path("rows.jsonl"), "kernels", seconds=60, **QUICK)
    asked = settings([NETWORK], bench.BATCHES)

    everything = [title for title, _ in bench.stages(opened, asked, ("up_conv",), None)]
    networks_only = [title for title, _ in bench.stages(opened, asked, ("up_conv",), "networks")]

    assert everything == ["calls at inference", "networks", "calls in training", "networks, compiled"]
    assert networks_only == ["networks", "networks, compiled"]


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

    honest, wrong = stepping.take(what, [{"implementation": "eager"}, {"implementation": "folded"}])

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

    first, second = stepping.take(what, [{"implementation": "folded"}, {"implementation": "eager"}])

    assert (first["outcome"], second["outcome"]) == ("crash", "ok")
    assert "no kernel image" in first["note"]


def test_a_case_is_read_back() -> None:
    """Batch, height, width, mode."""
    (row,) = wanted(settings(["unet/d1/w2/concat@10"], [(8, "training")]), slow=True)

    assert parse_case(row["case"]) == (8, 10, 10, "training")
    assert row["implementation"] == "compile"  # freezing weights is no way to train them


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


# tune


def timing(call: Call, tile: Tile, microseconds: float, outcome: str = "ok") -> Row:
    """A row as tuning leaves it in its journal."""
    row = measuring.call_row((call, "triton", tile)) | ORIGIN | {"time": "2026-01-02T03:04:05+00:00", "cache": "hot"}
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
    monkeypatch.setattr(tiles.resources, "files", lambda _package: tmp_path)
    untouched = Call("up_conv", 1, ((8, 8, 8),), 8)
    tune.write(tune.winners([timing(untouched, SMALL, 10)]), path)

    tune.write(tune.winners([timing(CALL, OTHER, 10)]), path)

    tiles._tuned.cache_clear()
    assert tile_for(need(CALL), "pointer", "sm12") == OTHER
    assert tile_for(need(untouched), "pointer", "sm12") == SMALL
    assert tile_for(need(CALL), "pointer", "") == default_tile(need(CALL), "pointer") != OTHER
    tiles._tuned.cache_clear()


def test_code_is_part_of_what_was_measured() -> None:
    """A changed kernel is measured again."""
    assert len(journal.code_hash()) == 12
    assert journal.code_hash() == journal.code_hash()
