"""Tests of kernels in the interpreter are found and selected like others, and none passes without having run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import HELPERS

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'skipcost[gpu]'", allow_module_level=True)

from faithful import UnfaithfulError, install

WRITTEN = """
import pytest
import triton

def test_right(): assert triton.knobs.runtime.interpret

def test_wrong(): assert 1 == 2

@pytest.mark.skip(reason="not today")
def test_skipped(): pass

@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False

@pytest.mark.parametrize("case", [])
def test_without_cases(case): pass

@pytest.mark.parametrize("case", [1, 2, 3])
def test_of_three(case): assert case != 2
"""


def outcomes(folder: Path, text: str, *options: str) -> tuple[dict[str, str], str]:
    """Run a file of tests by a pytest that does not interpret: what became of each test, and all that was said."""
    (folder / "test_written_interpreted.py").write_text(text)
    (folder / "conftest.py").write_text("from interpreter import *")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HELPERS), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", str(folder), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\S* \S+::(\S+)", done.stdout, re.MULTILINE)
    return {name: word for word, name in found}, done.stdout


def test_only_what_ran_and_was_right_passes(tmp_path: Path) -> None:
    """Not what was skipped, expected to fail or without cases; each fails with its reason."""
    found, said = outcomes(tmp_path, WRITTEN)

    passed = {name for name, word in found.items() if word == "PASSED"}
    assert passed == {"test_right", "test_of_three[1]", "test_of_three[3]"}
    assert set(found) - passed == {
        *("test_wrong", "test_skipped", "test_expected_to_fail", "test_of_three[2]", "test_without_cases[NOTSET]"),
    }
    assert "assert 1 == 2" in said
    assert "not today" in said


def test_what_is_selected_is_what_runs(tmp_path: Path) -> None:
    """By -k, as for any test: the others are not run beside it."""
    found, said = outcomes(tmp_path, WRITTEN, "-k", "right")

    assert found == {"test_right": "PASSED"}
    assert "5 deselected" in said or "7 deselected" in said


def test_tests_around_have_their_fixtures_ended(tmp_path: Path) -> None:
    """What a test before made for its file or folder is let go of before another's is made."""
    ordinary = "import pytest\n@pytest.fixture(scope='module')\ndef made(): yield 1\ndef test_{0}(made): assert made\n"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_1_{folder}.py").write_text(ordinary.format(f"before_{folder}"))
        (tmp_path / folder / f"test_2_{folder}_interpreted.py").write_text(f"def test_between_{folder}(): pass")

    found, said = outcomes(tmp_path, "def test_last(): pass")

    assert set(found.values()) == {"PASSED"}, said
    assert set(found) == {"test_before_a", "test_between_a", "test_before_b", "test_between_b", "test_last"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\ndef test_it(): os.abort()", r"ended with -6 before this test had"),
        (
            "import triton\nif triton.knobs.runtime.interpret:\n    import nothing_of_that_name\ndef test_it(): pass",
            r"ended with \d before this test had\n.*nothing_of_that_name",
        ),
        (
            (
                "import triton\nif triton.knobs.runtime.interpret:\n    from triton.runtime import interpreter as i\n"
                "    del i.InterpreterBuilder.cast_impl\n    import kernel_checks\ndef test_it(): pass"
            ),
            r"UnfaithfulError: triton \S+ has no InterpreterBuilder\.cast_impl",
        ),
    ],
    ids=["crash", "import", "unfaithful"],
)
def test_a_file_that_cannot_run_fails_its_tests(text: str, message: str, tmp_path: Path) -> None:
    """The process died, an import failed, this triton is unknown: each test fails with what was said."""
    found, said = outcomes(tmp_path, text)

    assert found == {"test_it": "FAILED"}
    assert re.search(rf"(?s)the interpreter's pytest .*{message}", said)


def test_without_the_interpreter_nothing_is_replaced() -> None:
    """In a process where triton compiles, installing is an error, since tests there would run on a GPU."""
    with pytest.raises(
        UnfaithfulError, match=r"does not interpret: set TRITON_INTERPRET=1 before it is first imported"
    ):
        install()
