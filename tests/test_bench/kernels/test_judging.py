"""Judging configurations: right ones pass, and each way of being wrong has its outcome and its reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from skipcost.bench.errors import LostDeviceError
from skipcost.bench.kernels import judging
from skipcost.bench.kernels.jobs import Job, Row
from skipcost.bench.kernels.judging import (
    FAILURES,
    INFINITE,
    by_image,
    job_bytes,
    limits_for,
    part_of,
    reason,
    same_bits,
    watched,
    what_of,
)
from skipcost.bench.measure.machine import machine_of
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.verify import table
from skipcost.kernels.verify.table import KERNELS, Operands, Results, operands

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = Call("conv_bn_relu", 2, ((4, 6, 5),), 3, precision="fp32")
STEP = Call("conv_bn_relu_train", 4, ((4, 6, 5),), 3, precision="fp32", mode="training")
Doctor = Callable[[Results], Results]


def judged(call: Call, *names: str) -> list[Row]:
    """The rows of implementations of a call, none with a tile."""
    return list(judging.verify(what_of(call, "cpu"), [part_of(name, None) for name in names]))


@pytest.fixture
def doctored(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call, Doctor], None]:
    """Let "triton" be the PyTorch reference with its results doctored."""

    def put(call: Call, doctor: Doctor) -> None:
        honest = KERNELS[call.op].implementations["reference"]
        ways = {
            "reference": honest,
            "triton": lambda given, tile: doctor(honest(given, tile)),
            "tma": lambda given, tile: doctor(honest(given, tile)),
        }
        monkeypatch.setitem(table.KERNELS, call.op, replace(KERNELS[call.op], implementations=ways))

    return put


def raises(error: Exception) -> Doctor:
    """A kernel that raises."""

    def doctor(_results: Results) -> Results:
        raise error

    return doctor


def one_off(image: int) -> Doctor:
    """A kernel that is wrong in a single element of one image."""

    def doctor(results: Results) -> Results:
        results[0][image, -1, -1, -1] += 0.01
        return results

    return doctor


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        STEP,
        Call("up_conv", 2, ((4, 6, 5),), 3),
        Call("tap_first", 2, ((4, 6, 5),), 3, factor=4),
        Call("crop_concat", 2, ((4, 6, 5), (3, 5, 6)), 0),
    ],
)
def test_the_reference_passes(call: Call) -> None:
    """PyTorch itself is within the bound, so the bound is no fiction."""
    (row,) = judged(call, "reference")

    assert row["outcome"] == "ok"
    assert 0 <= row["worst"] <= 1


@pytest.mark.parametrize("image", [0, -1])
@pytest.mark.parametrize("call", [CALL, STEP])
def test_one_wrong_element_fails(call: Call, image: int, doctored: Callable[[Call, Doctor], None]) -> None:
    """In whichever image it is; the row says of what and by how much."""
    doctored(call, one_off(image))

    honest, wrong = judged(call, "reference", "triton")

    assert honest["outcome"] == "ok"
    assert wrong["outcome"] == "wrong"
    assert wrong["worst"] > 1
    assert "is off by" in wrong["note"]


def test_not_a_number_fails_with_a_number(doctored: Callable[[Call, Doctor], None]) -> None:
    """JSON has no infinity, so a finite one stands for it."""
    doctored(CALL, lambda results: (results[0] * float("nan"),))

    (row,) = judged(CALL, "triton")

    assert (row["outcome"], row["worst"]) == ("wrong", INFINITE)


def test_bits_that_change_from_run_to_run_fail(doctored: Callable[[Call, Doctor], None]) -> None:
    """Even where both runs are within the bound: here one bit differs."""
    runs = itertools.count()

    def drift(results: Results) -> Results:
        results[0].view(torch.int32)[0, 0, 0, 0] ^= next(runs) % 2
        return results

    doctored(CALL, drift)

    (row,) = judged(CALL, "triton")

    assert row["outcome"] == "unrepeatable"


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (ValueError("no such form; take another"), "unsupported", "no such form; take another"),
        (RuntimeError("an illegal\n  memory access"), "crash", "RuntimeError: an illegal memory access"),
        (torch.OutOfMemoryError("too much"), "out_of_memory", "too much"),
        (type("OutOfResources", (Exception,), {})("shared memory"), "unsupported", "OutOfResources: shared memory"),
    ],
)
def test_what_is_raised_is_a_row_and_the_next_is_judged(
    error: Exception, outcome: str, said: str, doctored: Callable[[Call, Doctor], None]
) -> None:
    """A refusal before the launch is no failure; a crash is."""
    doctored(CALL, raises(error))

    broken, next_one = judged(CALL, "triton", "reference")

    assert broken["outcome"] == outcome
    assert said in broken["note"]
    assert (outcome in FAILURES) == (outcome == "crash")
    assert next_one["outcome"] == "ok"


def test_how_far_the_work_is_can_be_seen(
    doctored: Callable[[Call, Doctor], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts that are done, and of them those that failed; every part is handed on."""
    doctored(CALL, one_off(0))
    todo = [Job(what_of(CALL, "cpu"), (part_of("triton", None), part_of("reference", None)))]

    done = list(watched("check", todo, judging.verify, limits_for("cpu", 1e12)))

    assert [each.row["outcome"] for each in done if each.row] == ["wrong", "ok"]
    assert capsys.readouterr().err == "check, 1 failed: 2 of 2 done, 0:00 left\n"


def test_operands_that_cannot_be_made_are_the_outcome_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration has a row, whatever happens before the first."""

    def broken(*_: Any) -> Operands:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(table, "operands", broken)

    assert [row["outcome"] for row in judged(CALL, "reference", "triton")] == ["out_of_memory"] * 2


def test_equal_bits_are_judged_once(doctored: Callable[[Call, Doctor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 is slow: a second tile with the same bits has the first one's error; PyTorch's have their own bound."""
    asked = []
    doctored(CALL, lambda results: results)
    kernel = table.KERNELS[CALL.op]

    def counted(*arguments: Any) -> dict[str, float]:
        asked.append(arguments[2])
        return kernel.errors(*arguments)

    monkeypatch.setitem(table.KERNELS, CALL.op, replace(kernel, errors=counted))

    rows = judged(CALL, "reference", "triton", "tma")

    assert asked == [False] * CALL.batch + [True] * CALL.batch
    assert rows[1]["worst"] == rows[2]["worst"]


def test_a_device_that_is_lost_is_told_after_the_row(
    doctored: Callable[[Call, Doctor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of what broke it comes first, then nothing more from this process."""
    doctored(CALL, raises(RuntimeError("an illegal memory access")))
    machine = machine_of("cpu")

    def broken() -> None:
        message = "the context is gone"
        raise RuntimeError(message)

    monkeypatch.setattr(judging, "machine_of", lambda _device: replace(machine, synchronize=broken))
    rows = judging.verify(what_of(CALL, "cpu"), [part_of("triton", None)] * 2)

    assert next(rows)["outcome"] == "crash"
    with pytest.raises(LostDeviceError):
        next(rows)


def test_images_are_taken_one_by_one_but_for_a_step() -> None:
    """Each with its own maps and results, together all of them."""
    given = operands(CALL, "cpu")
    results = KERNELS[CALL.op].implementations["reference"](given, None)
    step = operands(STEP, "cpu")

    split = list(by_image(given, results))

    assert [each.call.batch for each, _ in split] == [1, 1]
    assert torch.equal(torch.cat([each.maps[0] for each, _ in split]), given.maps[0])
    assert torch.equal(torch.cat([each[0] for _, each in split]), results[0])
    assert next(by_image(step, ()))[0] is step


def test_memory_is_estimated_by_what_is_held_at_a_time() -> None:
    """More images hardly matter where they are judged one by one, and not at all in a step, of which two are run."""
    few, many = (replace(CALL, batch=batch, sources=((64, 512, 512),), out_channels=64) for batch in (1, 8))

    assert job_bytes(few) < job_bytes(many) < 8 * job_bytes(few)
    assert job_bytes(replace(STEP, batch=2)) == job_bytes(replace(STEP, batch=64))


def test_bits_tell_what_values_do_not() -> None:
    """NaN equals itself; zeros of different sign, types and shapes differ."""
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)

    assert same_bits([nan], [nan.clone()])
    assert not same_bits([zero], [-zero])
    assert not same_bits([zero], [zero.double()])
    assert not same_bits([zero], [zero, zero])
    assert not same_bits([zero], [torch.zeros(2)])


def test_a_long_reason_is_cut() -> None:
    """Compilers quote whole kernels."""
    assert len(reason(RuntimeError("x" * 10_000))["note"]) < 500
