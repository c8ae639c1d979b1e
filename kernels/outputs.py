"""The one door for files that a command writes: never over an input or a store, and whole or not at all.

What is at the place stays until the new file is complete: it is written beside, and renamed. So a link is followed to
the file that it names, which keeps its mode, and what is no file (a FIFO, a socket, a device) is refused, since the
rename would put a file in its place. Needs no torch; `bench.console` has the same for `bench` and `reports`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

SQLITE = b"SQLite format 3\0"  # how such a file begins; a store is one
OURS = re.compile(rb'\s*\{\s*"format": "(skipcost [a-z ]+)"')  # how files begin that people review and commit
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a file while it is written
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class OutputError(ValueError):
    """A place that cannot be written or must not be: one sentence."""


def check_output(path: Path, taken: Iterable[Path] = (), option: str = "-o") -> Path:
    """Return the file that an output at `path` would replace, links followed; nothing is touched.

    taken: the command's inputs and its other outputs. OutputError in one sentence where the place is one of them by
    any name, a store or what belongs to one, a folder, no file at all, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _told(path, option):
        found = _found(path)
        if found and not stat.S_ISREG(found.st_mode):
            raise _refusal(path, f"is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}", option)
        for each in taken:
            if _same(target, each):
                raise _refusal(path, f"is what this command reads or writes as {each}", option)
        if _is_sqlite(target) or is_beside_store(target):
            raise _refusal(path, "is a store, which no output replaces", option)
        _check_access(target, exists=found is not None)
    return target


def _refusal(path: Path, what: str, option: str) -> OutputError:
    return OutputError(f"{path} {what}; nothing was written; name another file with {option}")


def _found(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _same(target: Path, other: Path) -> bool:
    """Whether two names are one file: by their places, or as hard links."""
    if target == Path(os.path.realpath(other)):
        return True
    with contextlib.suppress(OSError):
        return target.samefile(other)
    return False


def is_beside_store(path: Path) -> bool:
    """Whether a name is one that SQLite keeps beside a file that is there."""
    names = [path.name.removesuffix(ending) for ending in BESIDE if path.name.endswith(ending)]
    return any(_is_sqlite(path.with_name(name)) for name in names if name)


def _is_sqlite(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _kind_of(path: Path) -> str:
    """Which of the suite's own formats a file has; empty where it has none, or is not there."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return _kind(file.read(100))


def _kind(data: bytes) -> str:
    found = OURS.match(data)
    return found[1].decode() if found else ""


def _check_access(target: Path, *, exists: bool) -> None:
    """Raise PermissionError now rather than after hours of measuring."""
    folder = next(each for each in target.parents if each.exists())
    if (exists and not os.access(target, os.W_OK)) or not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(0, "it is read-only for this user", str(target))


@contextlib.contextmanager
def _told(path: Path, option: str, kept: str = "") -> Iterator[None]:
    """Turn what the system says of a place into one sentence."""
    try:
        yield
    except OSError as error:
        what = f"cannot write {path}: {error.strerror}; {kept or 'nothing was written'}"
        message = f"{what}; name another file with {option}"
        raise OutputError(message) from None


def write_file(
    path: Path, content: str | bytes, taken: Iterable[Path] = (), option: str = "-o", kept: str = ""
) -> None:
    """Write a file whole, or leave what is there and raise OutputError as `check_output` does.

    Its folder is made; a text becomes UTF-8. A baseline or calibration is replaced by another one alone. kept: what is
    not lost where it fails, for the sentence.
    """
    target = check_output(path, taken, option)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    if (known := _kind_of(target)) and known != _kind(data):
        raise _refusal(path, f"is a {known}, which nothing else replaces", option)
    temporary = target.with_name(f".{secrets.token_hex(6)}.part")
    with _told(path, option, kept):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
                file.write(data)
            if found := _found(target):
                temporary.chmod(stat.S_IMODE(found.st_mode))
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def append_file(path: Path, text: str, option: str = "-o", kept: str = "") -> None:
    """Add text to a file, made with its folder where it is missing; OutputError as `check_output`."""
    target = check_output(path, option=option)
    with _told(path, option, kept):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
