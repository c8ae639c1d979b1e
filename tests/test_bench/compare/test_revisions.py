"""A revision's worktree is there as long as it is used, and gone after whatever ended that."""

from __future__ import annotations

import fcntl
import signal
import subprocess
from pathlib import Path

import pytest

from skipcost.bench.compare.revisions import LOCK, PREFIX, checked_out
from skipcost.kernels.errors import Stopped


def git(folder: Path, *words: str) -> str:
    """Run git as somebody."""
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Somebody's repository of one commit."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    return root


def worktrees(root: Path) -> list[str]:
    """What git lists beside the repository itself."""
    listed = git(root, "worktree", "list", "--porcelain").splitlines()
    return [line.removeprefix("worktree ") for line in listed if line.startswith("worktree ")][1:]


@pytest.mark.parametrize("ended", [Stopped(signal.SIGTERM), RuntimeError()])
def test_a_worktree_is_gone_after_a_signal(root: Path, ended: BaseException) -> None:
    """From the folder and from git's list."""
    trees = []

    def stopped() -> None:
        with checked_out("HEAD", root) as revision:
            trees.append(revision.tree)
            assert worktrees(root) == [str(revision.tree)]
            raise ended

    with pytest.raises(type(ended)):
        stopped()

    assert worktrees(root) == []
    assert not trees[0].parent.exists()


@pytest.mark.parametrize("left", ["the whole", "git's lock", "no folder"])
def test_the_next_run_removes_what_a_killed_one_left(root: Path, tmp_path: Path, left: str) -> None:
    """Also where git itself was killed in the middle, and where somebody has emptied the temporary folder."""
    scratch = tmp_path / f"{PREFIX}abc"
    git(root, "worktree", "add", "-q", "--detach", str(scratch / "tree"))
    (scratch / LOCK).touch()
    if left == "git's lock":
        git(root, "worktree", "lock", str(scratch / "tree"))
    if left == "no folder":
        subprocess.run(["rm", "-r", str(scratch)], check=True)

    with checked_out("HEAD", root) as revision:
        assert worktrees(root) == [str(revision.tree)]

    assert not scratch.exists()


def test_a_worktree_in_use_and_ones_of_others_stay(root: Path, tmp_path: Path) -> None:
    """What another run holds, and what somebody made for himself, is not touched."""
    used, own = tmp_path / f"{PREFIX}abc" / "tree", tmp_path / "own" / "tree"
    for each in (used, own):
        git(root, "worktree", "add", "-q", "--detach", str(each))
    with (used.parent / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with checked_out("HEAD", root):
            pass

    assert sorted(worktrees(root)) == sorted(map(str, (used, own)))
