"""From a store to one HTML file: no request, no script needed to read it, the same bytes for the same rows."""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itables.utils import read_package_file
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from skipcost.bench.errors import BenchError
from skipcost.reports.compare import times
from skipcost.reports.data import Data, load
from skipcost.reports.provenance import header_context
from skipcost.reports.sections import SECTIONS
from skipcost.reports.sentences import Number


def render(data: Data) -> str:
    """Render the whole page."""
    environment = _environment()
    sections = [
        {
            "name": section.name,
            "title": section.title,
            "short": section.short,
            "body": Markup(environment.get_template(f"{section.name}.html.j2").render(section.context(data))),  # noqa: S704 - rendered with autoescape
        }
        for section in SECTIONS
    ]
    return environment.get_template("page.html.j2").render(
        header=header_context(data), sections=sections, store=data.store_name, datatables=_datatables()
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("skipcost.reports"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["times"] = times
    environment.tests["number"] = lambda part: isinstance(part, Number)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    environment.globals["style"] = _asset(environment, "style.css")
    environment.globals["script"] = _asset(environment, "script.js")
    return environment


def _asset(environment: Environment, name: str) -> Any:
    """One of our own files, as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # noqa: S704 - our own text


def _datatables() -> str:
    """The bundle that itables ships, packed: as text, its licence notices would look like addresses to load from."""
    packed = gzip.compress(read_package_file("html", "dt_bundle.js").encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def write_report(store: Path, output: Path, scores: Path | None = None, verdicts: Sequence[Path] = ()) -> int:
    """Write the report of a store and return its size in bytes; what was at `output` stays until it is complete."""
    _check_output(output)
    text = render(load(store, scores, verdicts)).encode()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise BenchError(_refusal(output, error)) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(output)
    except OSError as error:
        raise BenchError(_refusal(output, error)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return len(text)


def _check_output(output: Path) -> None:
    """Refuse early what cannot be written: rendering takes seconds."""
    if output.is_dir():
        message = f"{output} is a folder: name a file for the report, such as {output / 'report.html'}"
        raise BenchError(message)
    if not output.parent.is_dir():
        message = f"cannot write {output}: there is no folder {output.parent}; make it, or name another file with -o"
        raise BenchError(message)


def _refusal(output: Path, error: OSError) -> str:
    return f"cannot write {output}: {error.strerror}; name another file with -o"
