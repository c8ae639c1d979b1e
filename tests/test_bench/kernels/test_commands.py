"""`skipcost kernels`: what the command line says and returns, and what a check tells."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from skipcost.bench.kernels import check
from skipcost.bench.kernels.__main__ import COMMANDS, main
from skipcost.bench.kernels.cases import need
from skipcost.bench.kernels.check import print_rows, tell_left_out
from skipcost.bench.kernels.jobs import failed
from skipcost.bench.kernels.judging import part_of
from skipcost.bench.streams import Progress, how_far, write_table
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.errors import Stopped
from skipcost.kernels.ops.tiles import CANDIDATES, default_tile
from skipcost.kernels.verify import table

CALL = Call("conv_bn_relu", 1, ((64, 32, 32),), 64)


def test_every_command_is_listed_and_has_help() -> None:
    """The list names each, and each explains its own options."""
    listed = subprocess.run(
        [sys.executable, "-m", "skipcost.bench.kernels", "--help"], capture_output=True, text=True, check=True
    )

    assert all(f"  {name} " in listed.stdout for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0


def test_help_loads_neither_torch_nor_triton() -> None:
    """A command's module is imported when the command is chosen."""
    script = (
        "import sys; from skipcost.bench.kernels.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    )

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
        (("check", "--device", "cpu"), 4, "TRITON_INTERPRET=1" if find_spec("triton") else "triton is not installed"),
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
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(check, "main", interrupted)

    assert main(["check"]) == 130


def test_progress_tells_the_time_left_and_never_more_than_there_is() -> None:
    """Half of the work in ten seconds leaves ten more, or what the limit leaves."""
    progress = Progress("check", 10, until=1e12)
    progress.began = time.time() - 10
    progress.done, progress.failed = 5, 2

    assert progress.line(progress.began + 10) == "check, 2 failed: 5 of 10 done, 0:10 left"
    progress.until = progress.began + 13
    assert progress.line(progress.began + 10).endswith("0:03 left")
    assert how_far(0, 10, 5.0) == "0 of 10 done"


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


def test_the_most_useful_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: every call as it ships, on normal data, then on positive data, then with all other tiles."""
    monkeypatch.setattr(check, "architecture_of", lambda _device: "sm90")
    calls = [CALL, replace(CALL, batch=2), Call("crop_concat", 1, ((8, 6, 6), (8, 4, 4)), 0)]

    todo = check.make_jobs(calls, "cuda")

    assert [job.what["kind"] for job in todo] == ["normal"] * 3 + ["positive"] * 3 + ["normal"] * 2
    assert [part["implementation"] for part in todo[0].parts] == list(table.KERNELS[CALL.op].implementations)
    assert len(todo[6].parts) > len(CANDIDATES["tma"])
    assert all(job.memory > 0 for job in todo)
