"""`skipcost gate --against` from end to end: a repository of the suite's own sources, and changes of its executor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT

from skipcost.bench.compare.revisions import FOLDERS

pytestmark = [pytest.mark.sources, pytest.mark.slow]
SWEEP = """
description = "One case."

[[grid]]
depth = 1
width = 4
size = 16
threads = 1
metrics = ["params", "operators"]
"""
LINE = "        results = [image]\n"


@dataclass(frozen=True)
class Repository:
    """A repository with the suite's sources and one commit, its code importable as `skipcost`."""

    root: Path

    @property
    def executor(self) -> Path:
        """The one file with a `forward`."""
        return self.root / "unet_models" / "network.py"

    def skipcost(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this repository's code."""
        return subprocess.run(
            [sys.executable, "-m", "skipcost.bench", *words],
            cwd=self.root.parent,
            env=os.environ | {"PYTHONPATH": str(self.root.parent / "links"), "PYTHONSAFEPATH": "1", "COLUMNS": "200"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path) -> Repository:
    """A repository, beside it the store of its one case as the commit measures it."""
    root = tmp_path / "repository"
    links = root.parent / "links" / "skipcost"
    links.mkdir(parents=True)
    (links / "__init__.py").touch()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (links / folder).symlink_to(root / folder, target_is_directory=True)
    (root / "bench" / "sweeps" / "one.toml").write_text(SWEEP)
    (root / ".gitignore").write_text("__pycache__/\n")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one")):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)
    made = Repository(root)
    done = made.skipcost("sweep", "one", "-o", "one.sqlite")
    assert done.returncode == 0, done.stderr
    return made


def test_a_clone_in_the_executor_fails_by_name(measured: Repository) -> None:
    """Both sides are measured; what one dispatches more often is named, and what it counts the same is unchanged."""
    before = measured.executor.read_text()
    assert before.count(LINE) == 1
    measured.executor.write_text(before.replace(LINE, "        results = [image.clone()]\n"))

    done = measured.skipcost("gate", "one.sqlite", "--against", "HEAD", "--json")

    assert done.returncode == 1, done.stderr
    found = {each["metric"]: each for each in json.loads(done.stdout)}
    assert found["params"]["verdict"] == "unchanged"
    operators = found["operators"]
    assert operators["now"] - operators["base"] == 1
    assert (operators["verdict"], operators["why"]) == ("regressed", "aten.clone.default +1")
