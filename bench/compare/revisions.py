"""Another revision of the suite beside this one: its sources in a git worktree, and processes that import from there.

Both sides use this environment's Python and packages; only the suite's own code differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import skipcost.bench
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.process import PYTHON

FOLDERS = ("unet_models", "kernels", "bench", "reports")
WORKING_TREE = "working tree"
PREFIX, LOCK = "skipcost-", "held"  # of temporary folders, and the file in each that its run holds


@dataclass(frozen=True, slots=True)
class Revision:
    """Sources at `commit` (or WORKING_TREE), in the folder `tree`, importable through `path` (PYTHONPATH's form)."""

    commit: str
    path: str
    tree: Path

    def environment(self) -> dict[str, str]:
        """Variables for a process that is to import this revision."""
        return os.environ | {"PYTHONPATH": self.path, "PYTHONSAFEPATH": "1"}

    def command(self, module: str, *words: str) -> list[str]:
        """Return the command line that runs a module of this revision."""
        return [*PYTHON, "-m", module, *words]


def repository() -> Path:
    """The git repository that this code lies in; BenchError for an installed copy."""
    folder = Path(skipcost.bench.__path__[0]).resolve()
    try:
        tracked = _git(folder, "ls-files", "__init__.py")
        root = _git(folder, "rev-parse", "--show-toplevel")
    except BenchError:
        tracked = root = ""
    if not tracked:
        message = f"{folder} is no git checkout of skipcost, so there are no revisions to compare: run it in a clone"
        raise BenchError(message)
    return Path(root)


def _git(folder: Path, *words: str) -> str:
    try:
        # A session of its own: Ctrl-C is for us, who then remove what git made.
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *words],  # noqa: S607
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            start_new_session=True,
        )
    except OSError as error:
        message = f"git cannot be run ({error.strerror}): comparing revisions needs it"
        raise BenchError(message) from None
    except subprocess.CalledProcessError as error:
        message = f"git {' '.join(words)} failed: {error.stderr.strip()}"
        raise BenchError(message) from None
    return done.stdout.strip()


def repository_here() -> Path:
    """The git repository of the current folder; BenchError where it is in none."""
    return Path(_git(Path.cwd(), "rev-parse", "--show-toplevel"))


def resolve(name: str, root: Path | None = None) -> str:
    """The commit that a name stands for, in the suite's repository or another one; BenchError where there is none."""
    try:
        return _git(root or repository(), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except BenchError:
        message = (
            f"{name!r} is no revision of this repository: name a branch, a tag or a commit "
            "(a shallow clone may lack it: git fetch --unshallow)"
        )
        raise BenchError(message) from None


def merge_base(name: str) -> str:
    """The commit at which HEAD left the revision `name`: what a branch's own changes are compared with."""
    commit = resolve(name)
    try:
        return _git(repository(), "merge-base", commit, "HEAD")
    except BenchError:
        message = f"HEAD and {name!r} have no common commit to compare with (a shallow clone: git fetch --unshallow)"
        raise BenchError(message) from None


def dirty(root: Path | None = None) -> bool:
    """Whether the working tree differs from HEAD."""
    return bool(_git(root or repository(), "status", "--porcelain"))


def state(root: Path) -> str:
    """A hash of a working tree: its commit, the files that differ from it, and Python files that are new."""
    changed = _git(root, "diff", "--name-only", "-z", "HEAD").split("\0")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "*.py").split("\0")
    digest = hashlib.sha256(_git(root, "rev-parse", "HEAD").encode())
    for name in sorted(filter(None, (*changed, *new))):
        path = root / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:12]


def own_repository() -> Path | None:
    """The suite's repository, or None for an installed copy."""
    try:
        return repository()
    except BenchError:
        return None


@contextlib.contextmanager
def checked_out(commit: str, root: Path | None = None) -> Iterator[Revision]:
    """Yield the sources of a commit, or of the working tree as it is, for as long as the block runs.

    root: another repository than the suite's own. Its packages are looked for at its top and in src/.
    """
    own = root is None
    root = root or repository()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as scratch, _held(Path(scratch)):
        links, tree = Path(scratch) / "links", root
        try:
            if commit != WORKING_TREE:
                _remove_abandoned(root)
                tree = Path(scratch) / "tree"
                _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            if own:
                _link(tree, links / "skipcost", commit)
            path = str(links) if own else os.pathsep.join((str(tree), str(tree / "src")))
            yield Revision(commit, path, tree)
        finally:
            if tree != root:
                _remove(root, tree)


@contextlib.contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the lock that tells others, until this process ends in whatever way, that a folder is in use."""
    lock = os.open(scratch / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove(root: Path, tree: Path) -> None:
    """Remove a worktree, also one that git had not finished and still holds a lock on."""
    with contextlib.suppress(BenchError):
        _git(root, "worktree", "remove", "--force", "--force", str(tree))
    shutil.rmtree(tree, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove the worktrees that killed runs of this command have left in a repository, and their folders."""
    for line in _git(root, "worktree", "list", "--porcelain").splitlines():
        tree = Path(line.removeprefix("worktree "))
        scratch = tree.parent
        if not (line.startswith("worktree ") and tree.name == "tree" and scratch.name.startswith(PREFIX)):
            continue
        if scratch.exists():
            with contextlib.suppress(OSError), (scratch / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its run still lives
                _remove(root, tree)
                shutil.rmtree(scratch, ignore_errors=True)
        else:
            _remove(root, tree)


def _link(tree: Path, links: Path, commit: str) -> None:
    """Link the folders under the name by which they are imported.

    In a package, not a folder alone: an installed package of the name would be taken before a folder.
    """
    links.mkdir(parents=True)
    (links / "__init__.py").touch()
    for folder in FOLDERS:
        if not (tree / folder).is_dir():
            message = f"revision {commit[:12]} has no folder {folder}: it cannot be run by this version"
            raise BenchError(message)
        (links / folder).symlink_to(tree / folder, target_is_directory=True)
