"""Anyone's model in a case: the function that makes it, by its path, and how it is called.

The module that a path names is imported in `make` alone, which only the measuring process calls; planning a sweep,
reading a store and writing a report import nothing of a user's. What such a model costs is traced, in `tracing`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcost.bench.errors import UnsupportedError
from skipcost.unet_models import ModelSpec
from skipcost.unet_models.spec import MAX_CHANNELS, check_integer, suggest

if TYPE_CHECKING:
    from torch import nn

PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
CLASSES = 2  # as a spec's
MOST_OF_A_LABEL = 100  # characters
INSTALLED = frozenset({"site-packages", "dist-packages"})  # folders of these names hold installed packages
MOST_SAID = 300  # characters kept of what a model prints


@dataclass(frozen=True, slots=True)
class Factory:
    """A function or class that returns an nn.Module, with the keyword arguments that it is called with.

    `path` is "package.module:function". `arguments` is a JSON object, put into canonical form. `name` is the label that
    tables show; without it, the call. The model reads images of `in_channels`; `classes` is what the loss expects of
    its maps. `code` is the hash of its sources (`code_of`); `read`, a JSON object of what else it opens (`opened`), is
    known once it was made: an edited model is another case. ValueError for bad values.
    """

    path: str
    arguments: str = "{}"
    name: str = ""
    in_channels: int = 1
    classes: int = CLASSES
    code: str = ""
    read: str = ""

    def __post_init__(self) -> None:
        """Check every field and give equal calls one form."""
        if not isinstance(self.path, str) or not PATH.fullmatch(self.path):
            message = f"factory={self.path!r} is not the path of a function: write package.module:function"
            raise ValueError(message)
        try:
            given = json.loads(self.arguments)
        except (ValueError, TypeError):
            given = None
        if not isinstance(given, dict) or not all(name.isidentifier() for name in given):
            message = f'arguments={self.arguments!r} of {self.path} are not keyword arguments: write {{"width": 32}}'
            raise ValueError(message)
        object.__setattr__(self, "arguments", json.dumps(given, sort_keys=True))
        for name in ("in_channels", "classes"):
            check_integer(name, getattr(self, name), 1, MAX_CHANNELS)
        if not isinstance(self.name, str) or _is_label(self.name):
            message = f"label={self.name!r} of {self.path} is not a text, or is the label of a network of the suite"
            raise ValueError(message)
        if self.name and not (self.name.isprintable() and self.name.strip() and len(self.name) <= MOST_OF_A_LABEL):
            message = (
                f"label={shorten(repr(self.name))} of {self.path} cannot stand in a table: write 1 to "
                f"{MOST_OF_A_LABEL} letters that can be printed, without line breaks and control characters"
            )
            raise ValueError(message)

    def __str__(self) -> str:
        return self.label

    @property
    def call(self) -> str:
        """The call as it would be written: `package.module:function(width=32)`."""
        words = ", ".join(f"{name}={value!r}" for name, value in json.loads(self.arguments).items())
        return f"{self.path}({words})" if words else self.path

    @property
    def state(self) -> str:
        """A hash of its sources and of what it reads."""
        return hashlib.sha256((self.code + self.read).encode()).hexdigest()[:12] if self.read else self.code

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or self.call


def _is_label(name: str) -> bool:
    try:
        ModelSpec.parse(name)
    except ValueError:
        return False
    return True


def search_path() -> list[str]:
    """Where a factory's module is looked for, here and in the measuring process: on sys.path, the current folder last.

    So no file of that folder takes a library's place; the folder is further in front only where PYTHONPATH names it.
    """
    here = str(Path.cwd())
    given = os.environ.get("PYTHONPATH")
    if given is not None and here in {str(Path(each).absolute()) for each in given.split(os.pathsep)}:
        return list(sys.path)
    return [*(each for each in sys.path if each not in ("", here)), here]


@contextlib.contextmanager
def importing_from_here() -> Iterator[None]:
    """Have `search_path` as sys.path."""
    before = list(sys.path)
    sys.path[:] = search_path()
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def locate(top: str) -> ModuleSpec | None:
    """Find what a top-level name stands for on `search_path`, without importing it, whatever is imported already."""
    with importing_from_here():
        found = (finder.find_spec(top, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next(filter(None, found), None)


def check_reachable(top: str) -> None:
    """Refuse the name of a user's module that imports something else. UnsupportedError says what, and what to do."""
    if top in sys.stdlib_module_names:
        message = f"the name {top} is that of a module of Python itself, which comes first: give your file another name"
        raise UnsupportedError(message)
    found, own = locate(top), PathFinder.find_spec(top, [str(Path.cwd())])
    if found and own and found.origin and own.origin and Path(found.origin).resolve() != Path(own.origin).resolve():
        message = (
            f"two modules are called {top}: {found.origin}, which is installed and comes first, and {own.origin}: "
            "give your file another name, or put its folder first with PYTHONPATH"
        )
        raise UnsupportedError(message)


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a factory's sources, with the folder from which they are imported."""

    folder: Path
    files: tuple[Path, ...]


def code_of(path: str) -> str:
    """Hash the sources of a factory without importing them; empty where there are none to be found.

    That is its whole top-level package or module; outside of installed packages also what these import of the files
    beside them. What else it opens is `Factory.read`, which only running it can tell. UnsupportedError
    where it cannot be reached by its name.
    """
    sources = sources_of(path)
    if sources is None:
        return ""
    digest = hashlib.sha256()
    for file in sources.files:
        digest.update(str(file.relative_to(sources.folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def sources_of(path: str) -> Sources | None:
    """Find the files that `code_of` hashes; None where there are none."""
    top = path.partition(":")[0].partition(".")[0]
    check_reachable(top)
    with contextlib.suppress(ImportError):
        found = locate(top)
        places = [Path(each) for each in found.submodule_search_locations or []] if found else []
        origin = Path(found.origin) if found and found.origin and found.has_location else None
        if not origin and not places:
            return None
        folder = (places[0] if places else origin or Path()).parent
        archive = next((each for each in (folder, *folder.parents) if each.is_file()), None)
        if archive:  # a module in a zip file or an egg
            return Sources(archive.parent, (archive,))
        files = _sources(top, folder, follow=not is_installed((origin or places[0]).resolve()))
        return Sources(folder, tuple(files) or ((origin,) if origin else ()))
    return None


def is_installed(file: Path) -> bool:
    """Whether a file belongs to Python or to a package that somebody installed, wherever such packages lie here."""
    if INSTALLED.intersection(file.parts):
        return True
    if any(file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib", "platstdlib")):
        return True
    return any(_has_installed(str(folder)) for folder in file.parents)


@functools.cache
def _has_installed(folder: str) -> bool:
    """Whether a folder is one that pip fills (`pip install --target`)."""
    return next(Path(folder).glob("*.dist-info"), None) is not None


def _sources(top: str, folder: Path, *, follow: bool) -> list[Path]:
    """The files of a top-level name in a folder, and with `follow` of the names in that folder that they import."""
    left, known, files = [top], {top}, []
    while left:
        name = left.pop()
        single = folder / f"{name}.py"
        own = _files_under(folder / name) or ([single] if single.is_file() else [])
        files += own
        for file in own if follow else ():
            beside = {each for each in _imported(file) if each not in known}
            known |= beside
            left += [each for each in beside if (folder / each).is_dir() or (folder / f"{each}.py").is_file()]
    return sorted(files)


def _files_under(folder: Path) -> list[Path]:
    """The Python files of a folder, but those of environments and hidden folders inside it."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".") and each not in (*INSTALLED, "node_modules")]
        found += [Path(place) / each for each in names if each.endswith(".py")]
    return sorted(found)


def _imported(file: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it; none where it is not Python that can be read."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = [each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - {""}


class Transcript(io.StringIO):
    """What is printed; nobody can close it."""

    def close(self) -> None:
        """Stay open: who made it reads it."""


def make(factory: Factory, device: str) -> tuple[nn.Module, str]:
    """Import a factory and call it on a device; return the module and what it printed.

    UnsupportedError where there is no such factory or it returns something else; what it raises itself is passed on,
    with a note that says where. A model that cannot be made on the meta device is made on the CPU and moved there.
    """
    import torch  # noqa: PLC0415 - cases are read and planned without torch

    said = Transcript()
    with contextlib.redirect_stdout(said), importing_from_here():
        function = _find(factory.path)
        arguments = json.loads(factory.arguments)
        try:
            try:
                with torch.device(device):
                    network = function(**arguments)
            except Exception:
                if device != "meta":
                    raise
                said.seek(said.truncate(0))
                with torch.device("cpu"):
                    network = function(**arguments)
        except SystemExit:
            message = f"{factory.call} leaves the program; a factory must return a torch.nn.Module"
            raise UnsupportedError(message) from None
        except Exception as error:
            error.add_note(f"raised by the factory {factory.call}{_printed(said.getvalue())}")
            raise
    if not isinstance(network, torch.nn.Module):
        message = (
            f"{factory.call} returns {type(network).__name__!r}, not a torch.nn.Module{_printed(said.getvalue())}: "
            "name a function or a class that returns the model"
        )
        raise UnsupportedError(message)
    from skipcost.bench.cases.modules import without_data  # noqa: PLC0415 - imports torch, and this module

    return (without_data(network) if device == "meta" else network.to(device)), said.getvalue()


def _printed(text: str) -> str:
    return f" (it printed: {shorten(text)})" if text.strip() else ""


def shorten(text: str) -> str:
    """What a model said, in one line of at most `MOST_SAID` characters."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SAID else line[:MOST_SAID] + "\u2026"


def _find(path: str) -> Any:
    """The function that a path names; UnsupportedError that says which part is missing."""
    module_name, _, names = path.partition(":")
    check_reachable(module_name.partition(".")[0])
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        message = f"cannot import {module_name} ({error}): install it, or run where it lies (here: {Path.cwd()})"
        raise UnsupportedError(message) from None
    except SystemExit:
        message = f'{module_name} leaves the program when imported: put what it runs under if __name__ == "__main__"'
        raise UnsupportedError(message) from None
    except Exception as error:
        error.add_note(f"raised while importing {module_name}")
        raise
    for name in names.split("."):
        if not hasattr(found, name):
            public = [each for each in vars(found) if callable(getattr(found, each)) and not each.startswith("_")]
            raise UnsupportedError(suggest(f"factory in {module_name}", names, public))
        found = getattr(found, name)
    if not callable(found):
        message = f"{path} is a {type(found).__name__}, not a function: name what returns the model when called"
        raise UnsupportedError(message)
    return found
