"""From a store to one HTML file: no request, no script needed to read it, the same bytes for the same rows."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itables.utils import read_package_file
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from skipcost.bench.console import check_outputs, write_file
from skipcost.reports.compare import Number, times
from skipcost.reports.data import Data, load
from skipcost.reports.sections import SECTIONS, Section
from skipcost.reports.sections.provenance import header_context

SCRIPTS = ("figures.js", "plot.js", "choose.js", "script.js")  # in one scope; the last one starts


def render(data: Data) -> str:
    """Render the whole page."""
    environment = _environment()
    sections = [
        {
            "name": section.name,
            "title": section.title,
            "short": section.short,
            "body": render_section(section, data, environment),
        }
        for section in SECTIONS
    ]
    return environment.get_template("page.html.j2").render(
        header=header_context(data), sections=sections, store=data.store_name, datatables=_datatables()
    )


def render_section(section: Section, data: Data, environment: Environment | None = None) -> Markup:
    """Render one section, as it stands in the page."""
    template = (environment or _environment()).get_template(f"{section.name}.html.j2")
    return Markup(template.render(section.context(data)))  # noqa: S704 - rendered with autoescape


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
    environment.globals["script"] = Markup("").join(_asset(environment, name) for name in SCRIPTS)
    return environment


def _asset(environment: Environment, name: str) -> Any:
    """One of our own files, as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # noqa: S704 - our own text


def _datatables() -> str:
    """The bundle that itables ships, packed: as text, its licence notices would look like addresses to load from."""
    packed = gzip.compress(read_package_file("html", "dt_bundle.js").encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def write_report(
    store: str | Path, output: str | Path, scores: Path | None = None, verdicts: Sequence[Path] = ()
) -> int:
    """Write the report of a store and return its size in bytes; what was at `output` stays until it is complete.

    scores: a CSV of label, score and optionally seed. verdicts: files that `gate` or `ab` wrote with `--verdicts`.
    BenchError in one sentence where one of them cannot be read, or `output` must not be written.
    """
    store, output = Path(store), Path(output)
    taken = [store, *([scores] if scores else []), *verdicts]
    check_outputs({"-o": output}, taken)  # rendering takes seconds
    data = load(store, scores, verdicts)
    text = render(data).encode("utf-8", "replace")
    write_file(output, text, taken, kept=f"{len(data.cases)} cases are kept in {store}")
    return len(text)
