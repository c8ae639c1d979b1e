"""What a factory opens while its model is made and run once: the part of a case's key that only running it can tell.

An audit hook (PEP 578) in the measuring process hears every open of Python's. What is heard becomes `Factory.read`: the
files with their hashes, the folders that its own code lists, and the versions of installed packages that it imports.
Not heard are environment variables, questions whether a file exists, and what a library opens by itself (in C, Rust).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from skipcost.bench.cases.factory import Factory, Sources, code_of, is_installed, sources_of

PACKAGE = "package "  # before the name of an installed package among what was read
ABSENT = "absent"  # in place of a hash: a file that was looked for
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SYSTEM = ("/proc/", "/sys/", "/dev/")
OURS = {Path(__file__).resolve().parents[2] / name for name in ("unet_models", "kernels", "bench", "reports")}


class Heard:
    """What was opened and listed since it began to listen, by absolute path; of files, whether they were there."""

    def __init__(self) -> None:
        self.files: dict[str, bool] = {}
        self.folders: dict[str, None] = {}
        self.written: set[str] = set()
        self.imported: set[str] = set()
        self._modules = set(sys.modules)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note one event of Python's audit."""
        if event == "open":
            path, mode, flags = arguments
            where = _path_of(path)
            if any(each in mode for each in "wax") if isinstance(mode, str) else flags & WRITES:
                self.written.add(where)
            elif where not in self.written:  # what it made itself says nothing of what is here
                self.files.setdefault(where, Path(where).exists())
        elif event == "import":
            if _is_the_model_s_own():
                self.imported.add(arguments[0].partition(".")[0])
        elif _is_the_model_s_own():
            self.folders[_path_of(arguments[0])] = None

    def names(self, sources: Sources | None) -> set[str]:
        """What it comes to, by the names of a key, without what the sources' own hash covers."""
        covered = {str(each.resolve()) for each in sources.files} if sources else set()
        found = {_source_of(path): there for path, there in self.files.items()}
        new = [sys.modules[name] for name in set(sys.modules) - self._modules]
        modules = [
            file for each in new if (file := getattr(each, "__file__", None))
        ]  # whether or not an open brought it
        found |= {str(Path(file).absolute()): True for file in modules}
        kept = [path for path, there in found.items() if _counts(path, there, covered)]
        names = [_named(each, sources) for each in kept]
        names += [_named(each, sources) + "/" for each in self.folders if _counts_as_folder(each)]
        return {*names, *self._packages()}

    def _packages(self) -> list[str]:
        """Installed packages that the model's own code was the first to import; earlier ones are the environment's."""
        files = {top: getattr(sys.modules.get(top), "__file__", None) for top in self.imported}
        found = {top for top, file in files.items() if file and is_installed(Path(file)) and not _in_stdlib(file)}
        return sorted({PACKAGE + name for top in found for name in _distributions(top)})


_LISTENING: list[Heard] = []  # the one that listens now; a hook cannot be taken away, so it asks here
_HOOKED: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _LISTENING and event in ("open", "import", "os.listdir", "os.scandir"):
        with contextlib.suppress(Exception):  # what is raised here would be raised by the model's own call
            _LISTENING[-1].hear(event, arguments)


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Hear what this process opens for as long as the block runs."""
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    heard = Heard()
    _LISTENING.append(heard)
    try:
        yield heard
    finally:
        _LISTENING.remove(heard)


def _path_of(path: Any) -> str:
    """The absolute path of what is opened; that of a descriptor as the system tells it."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    return os.path.abspath(os.fsdecode("." if path is None else path))  # noqa: PTH100 - links are not followed


def _is_the_model_s_own() -> bool:
    """Whether somebody's own code does this, through the standard library or not: imports list folders, too."""
    frame = sys._getframe(3)  # noqa: SLF001 - of who lists: beyond this function, `hear` and the hook
    while frame and (file := frame.f_code.co_filename):
        if file.startswith("<frozen importlib") or (_in_stdlib(file) and "/importlib/metadata/" in file):
            return False
        if not file.startswith("<frozen") and not _in_stdlib(file):
            return not is_installed(Path(file)) and not _is_ours(file)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return False


def _in_stdlib(file: str) -> bool:
    return file.startswith(str(Path(os.__file__).parent)) and "-packages" not in file


def _is_ours(file: str) -> bool:
    return any(each in OURS for each in Path(file).resolve().parents)


def _source_of(path: str) -> str:
    """The source for which Python reads its bytecode in place: which of the two it opens changes from run to run."""
    with contextlib.suppress(ValueError):
        return importlib.util.source_from_cache(path) if path.endswith(".pyc") else path
    return path


def _counts(path: str, there: bool, covered: set[str]) -> bool:  # noqa: FBT001 - a fact of the path
    """Whether a file can change a model: no device and no installed package, nothing that came and went meanwhile."""
    real = Path(path).resolve()
    if path.startswith(SYSTEM) or is_installed(real) or str(real) in covered or _is_ours(path):
        return False
    return real.is_file() if real.exists() else not there


def _counts_as_folder(path: str) -> bool:
    """The same of a folder; what comes and goes in the current one are stores and baselines."""
    real = Path(path).resolve()
    return real.is_dir() and not path.startswith(SYSTEM) and not is_installed(real) and real != Path.cwd().resolve()


def _named(path: str, sources: Sources | None) -> str:
    """A path as a key names it: from the folder of the factory's sources where it lies there, else absolute."""
    folder = str(sources.folder) if sources else ""
    return os.path.relpath(path, folder) if folder and path.startswith(folder + os.sep) else path


def _distributions(top: str) -> list[str]:
    """The installed packages that a top-level module is of."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(top)
        return [top]
    return importlib.metadata.packages_distributions().get(top, [])


def digests(names: Iterable[str], sources: Sources | None) -> dict[str, str]:
    """What is there now under names of a key: hashes of files and of folders' lists, versions of packages."""
    folder = sources.folder if sources else Path()
    return {name: _digest(name, folder) for name in sorted(names)}


def _digest(name: str, folder: Path) -> str:
    path = folder / name
    try:
        if name.startswith(PACKAGE):
            return importlib.metadata.version(name.removeprefix(PACKAGE))
        if name.endswith("/"):
            content = "\0".join(sorted(each.name for each in path.iterdir() if each.name != "__pycache__")).encode()
            return hashlib.sha256(content).hexdigest()[:12]
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, importlib.metadata.PackageNotFoundError):
        return ABSENT


class Present:
    """What is here now, every factory's sources and every file looked at once."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def has(self, factory: Factory) -> bool:
        """Whether a factory's sources, and what it read when its rows were made, are what they are here and now."""
        return not self.differs(factory)

    def differs(self, factory: Factory) -> str:
        """Say which part of a factory's state is another one here and now; empty where none is."""
        path = factory.path
        if path not in self._codes:
            self._codes[path] = code_of(path)
        if not self._codes[path]:
            return f"its sources are not found from {Path.cwd()}"
        if self._codes[path] != factory.code:
            return "its code was another one"
        sources, then = sources_of(path), json.loads(factory.read or "{}")
        for name in then:
            if (path, name) not in self._digests:
                self._digests[path, name] = digests([name], sources)[name]
        changed = [name for name, digest in then.items() if self._digests[path, name] != digest]
        return f"it reads {', '.join(changed)}, which changed" if changed else ""
