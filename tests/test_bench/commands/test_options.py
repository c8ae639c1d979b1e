"""Every number that a command takes: out of range, no number at all, or of digits that are not ASCII's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest
from command_line import invoke_cli

from skipcost.bench import cli
from skipcost.bench.console import settings_of
from skipcost.bench.errors import BenchError
from skipcost.bench.kernels.__main__ import main as kernels
from skipcost.bench.sweeps.plan import load_plan

LABEL = "unet/d1/w4/concat"
OPTIONS = {  # command and option -> lowest and highest number that is taken
    ("sweep", "--seed"): (0, 2**32 - 1),
    ("explain", "--batch"): (1, 65536),
    ("rewritings", "--batch"): (1, 65536),
    ("rewritings", "--threads"): (1, 1024),
    ("counters", "--batch"): (1, 65536),
    ("counters", "--in-channels"): (1, 65536),
    ("fit", "--batch"): (1, 65536),
    ("fit", "--top"): (1, 1000),
    ("ab", "--effect"): (0, 10),
    ("ab", "--pairs"): (3, 1000),
    ("ab", "--seconds"): (0.01, 3600),
    ("ab", "--runs"): (1, 1000),
    ("ab", "--slowdown"): (0, 1),
}
ARGUMENTS = {"sweep": "quick", "ab": "main"}  # of the others a label
NO_NUMBERS = ("nan", "inf", "-inf", "1e300", "", " ", "abc", "1x", "\u0664", "9" * 5000)
UNITS = {  # options of texts with a unit
    ("explain", "--size"): "is not an image size: write 512",
    ("rewritings", "--size"): "is not an image size: write 512",
    ("counters", "--size"): "is not an image size: write 512",
    ("fit", "--size"): "is not an image size: write 512",
    ("fit", "--memory"): "is not a size in bytes: write 8GiB",
    ("fit", "--latency"): "is not a length of time: write 15ms",
    ("fit", "--macs"): "is not a count: write 50G",
    ("fit", "--params"): "is not a count: write 50G",
}


def refused(command: str, option: str, text: str) -> str:
    """The sentence with which a command refuses an option's text; nothing has been started by then."""
    words = [command, ARGUMENTS.get(command, LABEL), f"{option}={text}"]
    if command == "fit":
        words = [command, f"{option}={text}"]
    with pytest.raises(BenchError) as caught:
        invoke_cli(words, catch_exceptions=False)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_number_option_of_every_command_is_in_the_table() -> None:
    """A new one is checked, too, and is made by the one function that knows ranges."""
    numbers = {
        (each.name or each.callback.__name__, f"--{name.replace('_', '-')}")
        for each in cli.app.registered_commands
        if each.callback
        for name, hint in get_type_hints(each.callback).items()
        if re.search(r"\b(int|float)\b", str(hint))
    }

    assert numbers == set(OPTIONS)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_number_out_of_range_is_refused_with_the_range(command: str, option: str) -> None:
    """One below, one above, far above, nan and infinities, and no number: the option, the text, what is accepted."""
    low, high = OPTIONS[command, option]

    for text in (*NO_NUMBERS, str(low - 1), str(high + 1), "-1", str(10**11)):
        sentence = refused(command, option, text)
        assert re.fullmatch(f"{option} .+ is not a (whole )?number from {low} to {high}", sentence), text


@pytest.mark.parametrize(("command", "option"), UNITS)
def test_a_text_that_is_not_a_number_with_its_unit_is_refused(command: str, option: str) -> None:
    """What was received and how it is written."""
    for text in (*NO_NUMBERS, "-1", "-1GiB", "1GiBs", "1 2"):
        sentence = refused(command, option, text)
        assert repr(text) in sentence
        assert UNITS[command, option] in sentence


@pytest.mark.parametrize("text", ["0", "65537", "100000000", "480x0", "70000x480"])
@pytest.mark.parametrize("command", ["explain", "rewritings", "counters", "fit"])
def test_a_size_out_of_range_is_refused_with_the_range(command: str, text: str) -> None:
    """A side has one pixel to 65,536."""
    assert refused(command, "--size", text).endswith("1 to 65536 a side")


@pytest.mark.parametrize("effect", ["0", "0.001", "0.01"])
def test_an_effect_that_is_too_small_to_matter_is_refused(effect: str) -> None:
    """It has to be above the change that is taken for none."""
    assert "is not above 0.01, which is the change that is too small" in refused("ab", "--effect", effect)


@pytest.mark.parametrize(
    ("option", "accepted"), [("--batch", "not a whole number from 1 to 65536"), ("--size", "write 512, or 480x640")]
)
def test_kernels_explain_takes_the_same_numbers(option: str, accepted: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and what is accepted."""
    for text in (*NO_NUMBERS, "0", "-1", "65537", "100000000", "31x"):
        code = kernels(["explain", LABEL, f"{option}={text}"])
        said = capsys.readouterr()
        assert code == 2, text
        assert repr(text) in said.err
        assert accepted in said.err
        assert not said.out


@pytest.mark.parametrize("command", ["check", "bench", "tune"])
def test_seconds_without_end_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With nan nothing would ever be over."""
    for text in ("nan", "inf", "-1", "1e300", "", "abc"):
        assert kernels([command, f"--seconds={text}"]) == 2
        assert f"--seconds {text!r} is not a number from 0 to 1000000" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["batch", "threads", "image_height", "depth", "width", "classes", "in_channels"])
def test_a_number_of_set_out_of_range_is_refused(key: str) -> None:
    """In a sweep as on the command line: the key, the value and the range."""
    for text in (*NO_NUMBERS, "0", "-1", "100000000", "\u00b2"):
        with pytest.raises(BenchError, match=rf"no case is left: {key}=.* is not a whole number"):
            load_plan("quick", settings_of([f"{key}={text} "]), "cpu", 1)


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (["depth=4", "depth=5"], {"depth": ["4", "5"]}),
        (["depth=4", "width=8", "depth=5,6"], {"depth": ["4", "5", "6"], "width": ["8"]}),
        (["depth=4, 5"], {"depth": ["4", "5"]}),
        (None, {}),
    ],
)
def test_set_given_again_adds_values(texts: list[str] | None, settings: dict[str, list[str]]) -> None:
    """Nothing that was asked for is dropped."""
    assert settings_of(texts) == settings


def test_plan_refuses_a_store_that_is_not_there(tmp_path: Path) -> None:
    """What it has could not be left out: a typing error would show a plan of everything."""
    with pytest.raises(BenchError, match="there is no store at"):
        invoke_cli(["plan", "quick", "-o", str(tmp_path / "x.sqlite")], catch_exceptions=False)
