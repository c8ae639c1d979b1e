"""What README and docs print as output: each is made again here, or read against what the suite says now."""

from __future__ import annotations

import io
import re
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_line import invoke_cli
from torch import nn

from skipcost.bench import cli, figures
from skipcost.bench.cases.case import Case
from skipcost.bench.cases.places import explain
from skipcost.bench.commands.explain import print_explanation
from skipcost.bench.console import Screen
from skipcost.bench.kernels.explain import explain as explain_kernels
from skipcost.bench.memory.liveness import peak_bytes
from skipcost.bench.sweeps.plan import load_plan
from skipcost.kernels.devices import device_named
from skipcost.kernels.dispatch import choose as dispatch
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.dispatch.low_resolution import executed_macs
from skipcost.unet_models import VARIANTS, ModelSpec

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
TITLES = {row.title: name for name, row in VARIANTS.items()}
OURS = ("triton", "tma")

pytestmark = pytest.mark.sources


def read(page: str) -> str:
    """Text of a page."""
    return (ROOT / page).read_text()


def table(page: str, header: str) -> list[list[str]]:
    """Cells of the rows of the one table whose header begins so."""
    parts = read(page).split(f"\n{header}")
    assert len(parts) == 2, f"{page} has no table, or several, that begin with {header!r}"
    rows = [line for line in parts[1].split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    assert rows
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    return [text for found, text in fences if found == language]


def block_with(start: str) -> list[str]:
    """The lines of README's one output that holds this."""
    (found,) = [block for block in blocks("README.md", "") if start in block]
    return [line.rstrip() for line in found.splitlines()]


def shown(lines: list[str], printed: str) -> None:
    """Assert that every line stands in what was printed, in this order; "..." is what was left out."""
    rest = iter([line.rstrip() for line in printed.splitlines()])
    for line in lines:
        assert line == "..." or line in rest, f"not printed, or not in this order: {line!r}\n{printed}"


def test_the_readmes_explanation_is_what_is_printed() -> None:
    """Line by line, at the width of a pipe."""
    out = io.StringIO()

    print_explanation(
        explain(ModelSpec.parse("unet3+/d4/w64/concat"), (256, 256), 1, "fp32", "inference"),
        Screen(file=out, width=200),
    )

    shown(block_with("unet3+/d4/w64/concat  (UNet 3+)"), out.getvalue())


def test_the_readmes_answer_of_fit_is_what_is_printed() -> None:
    """The command beside it, run."""
    command, *lines = block_with("$ skipcost fit")

    result = invoke_cli(command.split()[2:], catch_exceptions=False)

    assert result.exit_code == 0
    shown(lines, result.stdout)


def commands() -> Iterator[tuple[str, str]]:
    """Every command line of the pages, with its page: indented, in a fence, or in backticks."""
    for page in PAGES:
        for line in re.findall(r"(?:^    |`|^\$ )skipcost ([^`\n]+)", read(page), re.MULTILINE):
            yield page, re.split(r"\s{2,}|;|\\$", line)[0].strip()


def known_options(name: str) -> set[str]:
    """Every way to write an option of a command."""
    group: Any = typer.main.get_command(cli.app)
    return {text for option in group.commands[name].params for text in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_every_command_line_in_the_documents_has_its_command_and_options(page: str, line: str) -> None:
    """A renamed option is found before a reader does; `kernels` and `report` check theirs in their own tests."""
    group: Any = typer.main.get_command(cli.app)
    name, *words = line.split()

    assert name in group.commands, f"{page}: skipcost {line}"
    if name not in ("kernels", "report"):
        asked = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
        assert asked <= known_options(name), f"{page}: skipcost {line}"


def test_the_readmes_sweep_table_is_a_sweep() -> None:
    """The [[custom]] example is read as one: of its keys none is unknown."""
    (text,) = blocks("README.md", "toml")
    (example,) = tomllib.loads(text)["custom"]

    plan = load_plan(None, {key: [str(example[key])] for key in ("size",)}, "cpu", 1, ["torch.nn:Identity"])
    table = {**example, "factory": "torch.nn:Identity"}

    assert [planned.case.height for planned in plan.cases] == [example["size"]]
    assert set(table) <= {"factory", "arguments", "label", "size", "mode"}


PRELUDE: dict[str, Any] = {
    "torch": torch,
    "image": torch.ones(1, 3, 8, 8),
    "model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize(
    "program", [block for page in PAGES for block in blocks(page, "python") if "assert_cost" not in block]
)
def test_programs_in_the_documents_run(program: str) -> None:
    """As they stand, with a model where they name one."""
    names = dict(PRELUDE)

    exec(compile(program, "a document", "exec"), names)  # noqa: S102 - our own pages

    assert len(names) > len(PRELUDE)


def test_the_readmes_test_of_a_cost_is_one(assert_cost: Any) -> None:
    """Its budgets are read, and a network within them passes."""
    (program,) = [block for block in blocks("README.md", "python") if "assert_cost" in block]
    names = {"torch": torch, "MyNet": lambda: nn.Conv2d(3, 8, 3)}

    exec(compile(program, "README", "exec"), names)  # noqa: S102 - our own page

    names["test_cost"](assert_cost)


def cells(width: int | None = None) -> list[tuple[int, int]]:
    """Depth and width of the quick sweep's cells."""
    return [(depth, each) for depth in (2, 3, 4) for each in (8, 16, 32) if width in (None, each)]


def case_of(variant: str, depth: int, width: int, **given: Any) -> Case:
    """A case of the quick sweep's sizes."""
    return Case(ModelSpec(variant, depth, width), **{"height": 128, "width": 128, "threads": 2, **given})


def training(case: Case) -> Case:
    """The same in training, as the quick sweep has it."""
    return replace(case, mode="training", batch=8)


COUNTS = {
    "parameters (counted)": lambda case: case.graph().params(),
    "MACs (counted)": lambda case: case.graph().conv_macs(128, 128),
    "memory (predicted)": lambda case: peak_bytes(case)[1],
    "training memory (predicted)": lambda case: peak_bytes(training(case))[1],
}


def test_the_readmes_ratios_are_those_of_the_quick_sweep() -> None:
    """Medians over nine cells; latency is measured and stands as it was."""
    header = "| times U-Net |"
    names = [cell.strip() for cell in read("README.md").split(f"\n{header}")[1].splitlines()[0].strip("|").split("|")]

    for title, *values in table("README.md", header):
        for name, value in zip(names, values, strict=True):
            if name in COUNTS:
                pairs = [(case_of(TITLES[title], *cell), case_of("unet", *cell)) for cell in cells()]
                ratio = statistics.median(COUNTS[name](one) / COUNTS[name](other) for one, other in pairs)
                assert f"{ratio:.2f}" == value, (title, name)


def test_the_readmes_three_networks_cost_what_it_says() -> None:
    """Parameters, MACs, receptive field and both peaks, as tables print them."""
    for label, params, macs, field, _latency, inference, step in table("README.md", "| network | parameters |"):
        spec = ModelSpec.parse(label.strip("`"))
        case = case_of(spec.variant, spec.depth, spec.width)
        expected = (
            figures.text(spec.graph().params(), "count"),
            figures.text(spec.graph().conv_macs(128, 128), "macs"),
            figures.text(spec.graph().receptive_field(), "pixels"),
            figures.text(peak_bytes(case)[1], "bytes"),
            figures.text(peak_bytes(training(case))[1], "bytes"),
        )
        written = (params, macs, field, inference, step)
        assert tuple(map(bare, written)) == tuple(map(bare, expected))


def bare(text: str) -> str:
    """A figure without its unit's last word, which a column's title may have."""
    return re.sub(r"\s*(MAC|px|pixels)$", "", text).strip()


def on(card: str, variant: str, mode: str) -> tuple[str, dict[str, float]]:
    """How many calls of the network run on our kernels, "1 of 23", and predicted milliseconds by way."""
    facts = explain_kernels(f"{variant}/d4/w64/concat", 8, (512, 512), mode, "bf16", device_named(card))
    ours = sum(call["implementation"] in OURS for call in facts["calls"])
    return f"{ours} of {len(facts['calls'])}", {way: seconds * 1e3 for way, seconds in facts["seconds"].items()}


def test_the_readmes_predicted_times_are_those_of_the_break_even() -> None:
    """On an H200's data sheet, as `skipcost kernels explain` has them."""
    for title, *times, ours in table("README.md", "| network | eager | batch norm folded"):
        count, seconds = on("h200", TITLES[title], "inference")
        assert times == [f"{seconds[way]:.3g} ms" for way in ("reference", "cudnn", "chosen")]
        assert ours == count


def test_what_another_share_of_cudnns_rate_changes_is_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both columns of the table, with the share that stood there before and with the one that stands."""
    found: dict[tuple[str, str, str], list[str]] = {}
    seconds: dict[tuple[str, str], dict[str, float]] = {}
    rows = table("docs/kernels.md", "| card | network | ours at inference")
    for share in (0.74 * dispatch.CUDNN_SHARE, dispatch.TRITON_SHARE):
        monkeypatch.setattr(dispatch, "TRITON_SHARE", share)
        dispatch.choose.cache_clear()
        for card, title, *_ in rows:
            for mode in ("inference", "training"):
                count, times = on(card, TITLES[title], mode)
                found.setdefault((card, title, mode), []).append(count)
                if mode == "inference":
                    seconds[card, title] = times
    dispatch.choose.cache_clear()

    for card, title, inference, train, written_times in rows:
        for mode, written in (("inference", inference), ("training", train)):
            before, after = found[card, title, mode]
            assert written == f"{before.split()[0]} -> {after}"
        ways = seconds[card, title]
        assert written_times == f"{ways['cudnn']:.3g} -> {ways['chosen']:.3g} ms"


def test_the_predicted_times_of_tap_first_are_those_of_dispatch() -> None:
    """Edges of UNet 3+ to 512x512, on an H200's data sheet; what is not taken says so."""
    card = device_named("h200")
    for edge, product, maps, direct, ours in table("docs/kernels.md", "| edge | product | tap maps"):
        channels, factor = map(int, re.findall(r"\d+", edge))
        call = Call("tap_first", 1, ((channels, 512 // factor, 512 // factor),), 64, factor=factor)
        pixels = (512 // factor) ** 2
        assert product == f"{call.weights * pixels / 1e9:.3g} GMAC"
        assert maps == f"{9 * 64 * pixels * 4 / 1e6:.3g} MB"
        assert direct == f"{dispatch.predict(call, 'reference', card) * 1e6:.0f} us"
        taken = dispatch.choose(call, card).implementation == "triton"
        assert ours == f"{dispatch.predict(call, 'triton', card) * 1e6:.0f} us" + ("" if taken else ": not taken")


NAMES = {"UNet++, bilinear": ("unet++", "bilinear"), "U-Net, bilinear": ("unet", "bilinear")}


def test_the_readmes_table_of_what_is_rewritten_is_counted() -> None:
    """MACs and both peaks; times were measured."""
    for title, macs, inference, step, _times in table("README.md", "| depth 4, width 64, 256x256"):
        variant, upsample = NAMES.get(title) or (TITLES[title], None)
        spec = ModelSpec(variant, 4, 64, upsample=upsample)
        case = Case(spec, 1, 256, 256, "inference", threads=1)
        both = spec.graph().conv_macs(256, 256), executed_macs(spec.graph(), 256, 256, batch=1, **WHERE)
        assert macs == " -> ".join(f"{value / 1e9:.3g}" for value in both) + " G"
        for written, mode in ((inference, "inference"), (step, "training")):
            eager = replace(case, mode=mode)
            peaks = [f"{peak_bytes(each)[1] / 2**20:.0f}" for each in (eager, replace(eager, backend="rewritten"))]
            assert written == ("as it was" if len(set(peaks)) == 1 else f"{' -> '.join(peaks)} MiB")


WHERE = {"precision": "fp32", "device": "cpu", "mode": "inference"}
