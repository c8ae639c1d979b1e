"""What a factory opens is part of its key: heard when it is made and run once, and looked at again where it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory, code_of, sources_of
from skipcost.bench.cases.opened import ABSENT, Present, digests, listening
from skipcost.bench.measure.worker import run_case

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = {"seconds": 0.02, "noise": 0.1, "least": 3, "warmup_seconds": 0.02}
HEAD = "import importlib.resources, json, os, pathlib\nimport numpy, torch\nfrom torch import nn\n"
HEAD += "def text(name, mode='r'):\n    with open(name, mode) as f:\n"
HEAD += "        return f.read() if mode == 'r' else f.write('x')\n"
HERE = "pathlib.Path(__file__).parent"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with files to read; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "sub/a.json"):
        (tmp_path / name).write_text("8")
    (tmp_path / "link.json").symlink_to("sub/a.json")
    np.save(tmp_path / "a.npy", np.ones(2))
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    yield tmp_path
    for name in [
        each for each in sys.modules if each.partition(".")[0] in ("ownnet", "ownpackage", "helper", "blocks")
    ]:
        del sys.modules[name]


def factory(body: str, forward: str = "", **arguments: Any) -> Factory:
    """The factory of a model that is made by `body` and runs `forward` before its one convolution."""
    Path("ownnet.py").write_text(
        f"{HEAD}class Net(nn.Module):\n    def __init__(self, **k):\n        super().__init__()\n"
        f"        {body or 'pass'}\n        self.conv = nn.Conv2d(1, 2, 1)\n"
        f"    def forward(self, x):\n        {forward or 'pass'}\n        return self.conv(x)\n"
    )
    return Factory("ownnet:Net", json.dumps(arguments), code=code_of("ownnet:Net"))


def examined(own: Factory, *metrics: str, **fields: Any) -> list[Any]:
    """Results of a small case, by the worker in this process."""
    case = Case(spec=own, height=8, width=8, threads=len(os.sched_getaffinity(0)), **fields)
    request = {"case": json.loads(case.to_json()), "metrics": metrics or ("params",), "budget": BUDGET}
    return list(run_case(request))


OPENED = {
    "nothing": ("", "", set()),
    "pathlib, beside the module": (f"({HERE} / 'a.json').read_text()", "", {"a.json"}),
    "open, from the current folder": ("text('sub/a.json')", "", {"sub/a.json"}),
    "a descriptor": ("text(os.open('a.json', os.O_RDONLY))", "", {"a.json"}),
    "numpy": ("numpy.load('a.npy')", "", {"a.npy"}),
    "torch": ("torch.load('a.pt')", "", {"a.pt"}),
    "torch, mapped": ("torch.load('a.pt', mmap=True)", "", {"a.pt"}),
    "a link": ("text('link.json')", "", {"link.json"}),
    "a question": ("os.path.exists('b.json')", "", set()),
    "another's module": ("import sys; sys.path.append('sub'); import helper", "", {"sub/helper.py"}),
    "a list of a folder": ("sorted(pathlib.Path('sub').glob('*.json'))", "", {"sub/"}),
    "a list of a folder by os": ("os.listdir('sub')", "", {"sub/"}),
    "later, when it runs": ("", "text('a.json')", {"a.json"}),
    "later, in training": ("", "self.training or text('a.json')", {"a.json"}),
    "what it wrote": ("text('new.txt', 'w'); text('new.txt')", "", set()),
    "what it read and wrote again": ("text('a.json'); text('a.json', 'w')", "", {"a.json"}),
    "the system's": ("text('/proc/self/status'); text('/dev/null')", "", set()),
    "an installed package's": ("text(numpy.__file__)", "", set()),
    "a list of the current folder": ("os.listdir(); list(pathlib.Path.cwd().iterdir())", "", set()),
}


@pytest.mark.parametrize(("body", "forward", "names"), OPENED.values(), ids=OPENED)
def test_what_is_opened_is_heard(body: str, forward: str, names: set[str]) -> None:
    """However a file is opened, when the model is made or when it runs; nothing else is part of a key."""
    Path("sub/helper.py").write_text("")

    (result,) = examined(factory(body, forward))

    assert result.outcome == "ok"
    assert set(result.detail["read"]) == names
    assert ABSENT not in result.detail["read"].values()


def test_a_file_that_an_argument_names_is_heard() -> None:
    """Another argument is another case; another content of the file is one, too."""
    (result,) = examined(factory("text(k['config'])", config="sub/a.json"))

    assert set(result.detail["read"]) == {"sub/a.json"}


def test_a_file_that_was_looked_for_is_part_of_the_key() -> None:
    """A row that failed for want of a file is no longer the model's when the file is there."""
    own = factory("text('b.json')")
    (result,) = examined(own)
    read = Factory(own.path, code=own.code, read=json.dumps(result.detail["read"]))

    assert result.outcome == "crash"
    assert result.detail["read"] == {"b.json": ABSENT}
    assert Present().has(read)
    Path("b.json").write_text("8")
    assert Present().differs(read) == "it reads b.json, which changed"


def test_data_of_a_package_are_heard(folder: Path) -> None:
    """By importlib.resources, in a package whose modules import one another."""
    (folder / "ownpackage" / "data").mkdir(parents=True)
    (folder / "ownpackage" / "__init__.py").touch()
    (folder / "ownpackage" / "data" / "net.yaml").write_text("w: 8")
    (folder / "ownpackage" / "size.py").write_text(
        "import importlib.resources as r\nW = int(r.files('ownpackage').joinpath('data/net.yaml').read_text()[-1])\n"
    )
    (folder / "ownpackage" / "nets.py").write_text(
        "from torch import nn\nfrom .size import W\ndef net():\n    return nn.Conv2d(1, W, 1)\n"
    )

    (result,) = examined(Factory("ownpackage.nets:net"))

    assert set(result.detail["read"]) == {"ownpackage/data/net.yaml"}
    assert result.samples == (16,)


def test_what_is_opened_twice_is_one_key_however_python_caches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module from elsewhere is read as source the first time and as bytecode the second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    Path("sub/helper.py").write_text("")
    own = factory("import sys; sys.path.append('sub'); import helper")
    first = examined(own)[0].detail["read"]
    assert list(Path("sub/__pycache__").iterdir())
    for name in ("helper", "ownnet"):
        del sys.modules[name]

    assert examined(own)[0].detail["read"] == first


def test_what_came_and_went_is_not_part_of_a_key() -> None:
    """A file that was there when it was opened and is gone when the model is made."""
    with tempfile.NamedTemporaryFile() as file, listening() as heard:
        Path(file.name).read_bytes()

    assert file.name in heard.files
    assert heard.names(None) == set()


def test_the_version_of_an_imported_package_is_part_of_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of what a model is made of is a new state of it."""
    for path, text in (
        ("site-packages/blocks/__init__.py", ""),
        ("site-packages/blocks-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: blocks\nVersion: 1.0\n"),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    monkeypatch.syspath_prepend(str(folder / "site-packages"))
    own = factory("import blocks")

    (result,) = examined(own)

    read = Factory(own.path, code=own.code, read=json.dumps(result.detail["read"]))
    assert result.detail["read"] == {"package blocks": "1.0"}
    metadata = folder / "site-packages/blocks-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert Present().differs(read) == "it reads package blocks, which changed"


def test_what_is_opened_with_data_alone_is_a_doubt() -> None:
    """A model that cannot be traced may open a file when it sees data: the row names it."""
    own = factory("", "float(x.sum()); text('a.json')")

    found = {each.metric: each for each in examined(own, "params", "latency_s")}

    assert found["params"].detail["read"] == {}
    for row in found.values():
        assert "the model opens a.json with data alone: a change of it makes no new case" in row.note


def test_listening_ends_with_its_block() -> None:
    """What is measured afterwards is not watched; a hook that cannot hear something does not disturb the call."""
    with listening() as heard:
        Path("a.json").read_text()
    Path("sub/a.json").read_text()

    assert {Path(each).name for each in heard.files} == {"a.json"}
    assert not any("sub" in each for each in heard.files)
    heard.hear("open", ("a.json", "r", 0))
    with listening(), pytest.raises(OSError, match="Bad file descriptor"):
        open(987654, closefd=False)  # noqa: SIM115 - a descriptor that is none


def test_present_tells_what_differs() -> None:
    """Sources, files, lists of folders: each its own words; put back, all is as it was."""
    own = factory("")
    names = ["a.json", "sub/"]
    full = Factory(own.path, code=own.code, read=json.dumps(digests(names, sources_of(own.path))))
    assert Present().has(full)

    Path("sub/b.json").write_text("")
    assert Present().differs(full) == "it reads sub/, which changed"
    Path("sub/b.json").rename("b.json")
    assert Present().has(full)
    factory("self.more = 1")
    assert Present().differs(full) == "its code was another one"
    Path("ownnet.py").unlink()
    assert Present().differs(full).startswith("its sources are not found from ")


def test_the_hook_is_silent_where_a_model_runs() -> None:
    """A forward pass raises no event of Python's audit, so that a hook takes none of its time."""
    script = (
        "import sys, torch\nfrom torch import nn\nseen = []\nnet, x = nn.Conv2d(1, 2, 1), torch.ones(1, 1, 4, 4)\n"
        "net(x)\nsys.addaudithook(lambda event, _: seen.append(event))\nwith torch.inference_mode():\n    net(x)\n"
        "events = list(seen)\nassert not events, events\n"
    )

    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False).returncode == 0
