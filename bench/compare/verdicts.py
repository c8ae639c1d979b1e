"""Verdicts, and the forms in which people and programs read them: a table, Markdown, JUnit XML, JSON, annotations.

What decides is elsewhere (`gate` for exact metrics, `ab` for latency); here nothing is judged again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from skipcost.bench import figures
from skipcost.bench.console import Column, Screen, append_file, check_outputs, write_file
from skipcost.bench.decoding import check_fields, check_members, parse_json
from skipcost.bench.errors import BenchError
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.streams import visible

VERDICTS = {
    "unchanged": "the same on both sides",
    "improved": "better than the baseline, which has to be updated for it",
    "regressed": "worse than the baseline",
    "missing": "the baseline has it, this side does not",
    "new": "this side has it, the baseline does not",
    "not_comparable": "both have it, but the numbers do not mean the same",
    "inconclusive": "a change could have hidden in the noise",
}
KINDS = {  # of what a file of verdicts holds
    "case": str,
    "metric": str,
    "verdict": str,
    "base": float | None,
    "now": float | None,
    "why": str,
    "ratio": float | None,
    "key": str,
}
PASSING = ("unchanged", "inconclusive")
SHOWN = 200  # rows in a table for people; Markdown and JUnit have them all


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison says of one metric of one case.

    key: the case's canonical JSON. ratio, interval: of now / base as it was judged where that took measuring; base and
    now are medians then.
    """

    case: str
    metric: str
    verdict: str
    base: float | None = None
    now: float | None = None
    why: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    key: str = ""

    def __post_init__(self) -> None:
        """Refuse a word outside the table: a misspelt failure would pass."""
        if self.verdict not in VERDICTS:
            message = f"verdict {self.verdict!r} is unknown; accepted: {', '.join(VERDICTS)}"
            raise ValueError(message)

    @property
    def fails(self) -> bool:
        """Whether a gate stops at it; what was measured to be faster needs no baseline to be updated."""
        return self.verdict not in PASSING and not (self.verdict == "improved" and self.interval)

    @property
    def change(self) -> str:
        """The change in percent, with its interval where it has one."""
        if self.ratio and self.interval:
            low, high = self.interval
            return f"{self.ratio - 1:+.1%} [{low - 1:+.1%}, {high - 1:+.1%}]"
        return f"{self.now / self.base - 1:+.2%}" if self.base and self.now is not None else ""

    def cells(self) -> tuple[str, ...]:
        """A row for people: case, metric, base, now, change, verdict, why."""
        unit = METRICS[self.metric].unit if self.metric in METRICS else "count"
        numbers = _exactly(self.base, self.now, unit)
        return (self.case, self.metric, *numbers, self.change, self.verdict, self.why)


COLUMNS = ("case", "metric", "base", "now", "change", "verdict", "why")


def _exactly(base: float | None, now: float | None, unit: str) -> tuple[str, str]:
    """Counts and bytes to the last digit, because one of them may be the change; seconds until the two differ."""
    if unit == "seconds" and base is not None and now is not None:
        return figures.apart(base, now, unit)
    first, second = (
        figures.text(value, unit) if value is None or unit == "seconds" else f"{value:,.0f}" for value in (base, now)
    )
    return first, second


def sentence(verdicts: Sequence[Verdict]) -> str:
    """Sum the verdicts up in a line."""
    counts = Counter(each.verdict for each in verdicts)
    cases = len({(each.case, each.key) for each in verdicts})
    told = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    return f"{len(verdicts)} numbers of {cases} cases: {told or 'nothing was compared'}"


def print_verdicts(verdicts: Sequence[Verdict], console: Screen) -> None:
    """Print what did not stay the same as a table, and the sum."""
    notable = [each for each in verdicts if each.verdict != "unchanged"]
    if notable:
        columns = [Column(name, right=name in ("base", "now", "change"), prose=name == "why") for name in COLUMNS]
        styles = ["red" if each.verdict in ("regressed", "missing") else "" for each in notable[:SHOWN]]
        console.table(columns, [each.cells() for each in notable[:SHOWN]], styles)
    if len(notable) > SHOWN:
        console.print(f"and {len(notable) - SHOWN} more")
    console.print(sentence(verdicts))


def to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Every verdict as JSON values, those that are unchanged too."""
    return [asdict(each) for each in verdicts]


def markdown(verdicts: Sequence[Verdict], title: str) -> str:
    """A heading, the sum, and a table of what did not stay the same."""
    lines = [f"### {title}", "", sentence(verdicts), ""]
    notable = [each for each in verdicts if each.verdict != "unchanged"]
    if notable:
        lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS)), *(_row(each.cells()) for each in notable), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in cells) + " |"


def junit(verdicts: Sequence[Verdict], title: str) -> bytes:
    """JUnit XML as CI systems read it: a test case per verdict; what could not be decided counts as skipped.

    XML has no form for control characters and half letters, not even an escaped one: they are written out in words.
    """
    failures = sum(each.fails for each in verdicts)
    suite = ET.Element("testsuite", name=visible(title), tests=str(len(verdicts)), failures=str(failures))
    for each in verdicts:
        case = ET.SubElement(suite, "testcase", classname=visible(each.case), name=visible(each.metric))
        text = visible(" ".join(part for part in (each.verdict, each.change, each.why) if part))
        if each.fails:
            ET.SubElement(case, "failure", message=text)
        elif each.verdict == "inconclusive":
            ET.SubElement(case, "skipped", message=text)
    content: bytes = ET.tostring(suite, encoding="utf-8", xml_declaration=True)
    return content


def pass_on(
    verdicts: Sequence[Verdict],
    title: str,
    console: Screen,
    junit_file: Path | None,
    kept: Path | None,
    taken: Sequence[Path] = (),
) -> None:
    """Tell CI, and write the files that were asked for, JUnit XML and JSON; BenchError where that cannot be.

    taken: the command's inputs, which neither replaces.
    """
    tell_ci(verdicts, title, console)
    check_outputs({"--junit": junit_file, "--verdicts": kept}, taken)
    for path, content, option in (
        (junit_file, junit(verdicts, title), "--junit"),
        (kept, json.dumps(to_json(verdicts), indent=1).encode(), "--verdicts"),
    ):
        if path:
            write_file(path, content, taken, option)


def tell_ci(verdicts: Sequence[Verdict], title: str, console: Screen) -> None:
    """On GitHub Actions, add the table to the job's summary and annotate what fails; nothing anywhere else."""
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            append_file(Path(summary), markdown(verdicts, title) + "\n", "GITHUB_STEP_SUMMARY")
        except BenchError as error:  # the verdict stands without it
            console.print(f"skipcost: the job has no summary: {error}")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for each in verdicts:
            if each.fails or each.verdict == "inconclusive":
                level = "error" if each.fails else "warning"
                text = f"{each.case}: {each.metric} {each.verdict} {each.change} {each.why}".strip()
                console.print(f"::{level} title={title}::{_escaped(text)}", soft_wrap=True)


def _escaped(text: str) -> str:
    """Escape what ends a workflow command early, as GitHub's own toolkit does."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def write_json(verdicts: Sequence[Verdict], console: Screen) -> None:
    """Print every verdict for a program."""
    console.print_json(json.dumps(to_json(verdicts)))


def _verdict(interval: Any = None, **row: Any) -> Verdict:
    """One verdict as it was written; ValueError or TypeError for what is none."""
    check_fields(row, KINDS)
    if interval is None:
        return Verdict(**row)
    check_members("interval", interval, float)
    low, high = interval
    return Verdict(**row, interval=(low, high))


def read_json(path: Path) -> list[Verdict]:
    """Read what `--verdicts` or `--json` of a comparison wrote; BenchError for a file that holds no verdicts."""
    instead = "name a file that `skipcost gate --verdicts` or `skipcost ab --verdicts` wrote"
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))
        check_members("the file", rows, dict)
        found = [_verdict(**row) for row in rows]
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; {instead}"
        raise BenchError(message) from None
    except (ValueError, TypeError, KeyError) as error:
        message = f"{path} holds no verdicts ({type(error).__name__}: {str(error)[:80]}): {instead}"
        raise BenchError(message) from None
    if not found:
        message = f"{path} holds no verdict at all: nothing was compared when it was written"
        raise BenchError(message)
    return found
