"""Where a user's model is looked for: in the current folder last, so that nothing there takes a library's place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from skipcost.bench.cases.factory import Factory, check_reachable, code_of, locate, make, search_path
from skipcost.bench.errors import UnsupportedError
from skipcost.bench.sweeps.plan import load_plan

NETWORK = "from torch import nn\ndef net(): return nn.Conv2d(1, 2, 3)\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, and one beside it that stands for site-packages."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "installed").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    return here


@pytest.mark.parametrize("first", ["", "the current folder"])
def test_the_current_folder_is_last(here: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python was started so that it comes first."""
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", [first and str(here), *before])

    assert search_path() == [*before, str(here)]


@pytest.mark.parametrize("named", ["{here}", ".", "/elsewhere:{here}"])
def test_pythonpath_may_name_the_current_folder(here: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then somebody wants it where it is."""
    monkeypatch.setenv("PYTHONPATH", named.format(here=here))
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])

    assert search_path() == sys.path


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        (["here/random.py"], "random", "the name random is that of a module of Python itself"),
        ([], "json", "the name json is that of a module of Python itself"),
        (["here/torch.py"], "torch", "two modules are called torch: .*installed and comes first, and .*here/torch.py"),
        (["here/skipcost/__init__.py"], "skipcost", "two modules are called skipcost"),
        (["here/net.py", "installed/net.py"], "net", "two modules are called net: .*installed/net.py.*here/net.py"),
        (["here/net/__init__.py", "installed/net.py"], "net", "two modules are called net"),
    ],
)
def test_a_name_that_means_another_module_is_refused(here: Path, files: list[str], name: str, said: str) -> None:
    """Whatever lies here under the name of Python's own or of an installed library would not be what runs."""
    for each in files:
        (here.parent / each).parent.mkdir(exist_ok=True)
        (here.parent / each).write_text(NETWORK)

    for call in (lambda: check_reachable(name), lambda: code_of(f"{name}:net")):
        with pytest.raises(UnsupportedError, match=said):
            call()


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        (["here/net.py"], "here/net.py"),
        (["installed/net.py"], "installed/net.py"),
        (["here/net/weights.txt", "installed/net.py"], "installed/net.py"),
    ],
)
def test_a_name_that_means_one_module_is_found(here: Path, files: list[str], origin: str) -> None:
    """Here, or installed; a folder of data of that name hides nothing."""
    for each in files:
        (here.parent / each).parent.mkdir(exist_ok=True)
        (here.parent / each).write_text(NETWORK)

    check_reachable("net")

    found = locate("net")
    assert found is not None
    assert found.origin == str(here.parent / origin)


def test_planning_refuses_what_the_worker_could_not_reach(here: Path) -> None:
    """The sentence comes before anything runs, and none of the file is executed."""
    (here / "random.py").write_text("raise SystemExit(9)\n")

    with pytest.raises(Exception, match="--model: the name random is that of a module of Python itself"):
        load_plan(None, {}, "cpu", 1, ["random:net"])


def test_a_file_here_takes_no_place_in_what_a_model_imports(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that imports a library gets the library, though a file of its name lies beside the model."""
    (here.parent / "installed" / "pathlib_like.py").write_text("where = 'installed'\n")
    (here / "pathlib_like.py").write_text("where = 'here'\n")
    (here / "own_net.py").write_text(f"import pathlib_like\n{NETWORK}")
    monkeypatch.delitem(sys.modules, "pathlib_like", raising=False)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)

    make(Factory("own_net:net"), "cpu")

    assert sys.modules["pathlib_like"].where == "installed"
    assert str(here) not in sys.path
    assert os.getcwd() == str(here)  # noqa: PTH109 - as a text


@pytest.mark.parametrize("label", ["bell\x07", "two\nlines", "nothing\x00", "half\udcff", "tab\t", " ", "a" * 101])
def test_a_label_can_stand_in_a_table(label: str) -> None:
    """What no table, file or terminal can show is refused where the label is made."""
    with pytest.raises(ValueError, match="cannot stand in a table: write 1 to 100 letters"):
        Factory("net:net", name=label)
