"""The repository around the code: what README and CI run, what the documents name, what an installation brings."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from skipcost.bench import cli
from skipcost.bench.cases.record import OUTCOMES
from skipcost.bench.measure.metrics import METRICS
from skipcost.unet_models import SKIPS, VARIANTS

ROOT = Path(__file__).parent.parent
PACKAGES = ("unet_models", "kernels", "bench", "reports")


def read(name: str) -> str:
    """Text of a file of the repository."""
    return (ROOT / name).read_text()


def quick_start() -> list[str]:
    """The commands of the README's first fenced sh block under Quick start."""
    block = re.search(r"^## Quick start$.*?^```sh$(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line for line in block[1].strip().splitlines() if line and not line.startswith("#")]


@pytest.mark.sources
def test_the_readme_starts_with_two_commands() -> None:
    """Quick start is two lines: one sets up and runs the main job, one sets up and passes the tests."""
    first, second = quick_start()

    assert first.endswith("nox -s sweep")
    assert second.endswith("nox -t check")


@pytest.mark.sources
def test_ci_runs_the_readmes_test_command() -> None:
    """CI's script ends with the README's second command, word for word."""
    assert read(".ci/run").strip().splitlines()[-1] == quick_start()[1]


@pytest.mark.sources
def test_every_check_is_behind_the_test_command() -> None:
    """Lint, types, three kinds of tests, gate and package carry the tag that the command asks for."""
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l", "-t", "check"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    chosen = re.findall(r"^\* (\w+) \[check\] -> \S", listed, re.MULTILINE)
    assert chosen == ["lint", "types", "tests", "browser", "isa", "gate", "package"]


@pytest.mark.sources
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="instruction sets of x86-64")
def test_narrower_instruction_sets_reach_torch_and_onednn() -> None:
    """In a process with the settings of `isa`, ATen names the set, and oneDNN's convolution is the one for it."""
    program = (
        "import torch; print(torch.backends.cpu.get_cpu_capability());"
        "torch.conv2d(torch.ones(2, 8, 64, 64), torch.ones(8, 8, 3, 3))"  # too large for ATen's own
    )
    found = []
    for narrow in runpy.run_path(str(ROOT / "noxfile.py"))["NARROW"]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **narrow, "ONEDNN_VERBOSE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append((done.stdout.split()[0], *re.findall(r",convolution,(\S+?),", done.stdout)))

    assert found == [("AVX2", "jit:avx2"), ("DEFAULT", "jit:sse41")]


@pytest.mark.sources
def test_every_session_says_what_it_does() -> None:
    """`nox -l` has a line for every session, and runs the sweep when nothing is named."""
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    sessions = re.findall(r"^([*-]) (\w+)(?: \[\w+\])?(?: -> (\S.*))?$", listed, re.MULTILINE)
    assert [name for mark, name, _ in sessions if mark == "*"] == ["sweep"]
    assert all(line for _, _, line in sessions)


@pytest.mark.sources
def test_constraints_are_exact_and_hold_torch_and_triton() -> None:
    """Every pin is one version; torch and triton are those that the kernels' facts were measured with."""
    pins = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]

    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^,*+]+", pin) for pin in pins)
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(pins)


@pytest.mark.sources
@pytest.mark.parametrize(
    "name", [each.name or each.callback.__name__ for each in cli.app.registered_commands if each.callback]
)
def test_every_command_is_in_the_readme(name: str) -> None:
    """A command that the README does not name does not exist for its users."""
    assert f"skipcost {name}" in read("README.md")


@pytest.mark.sources
@pytest.mark.parametrize("name", [*VARIANTS, *SKIPS])
def test_every_variant_and_scheme_is_in_the_glossary(name: str) -> None:
    """The glossary holds each key of the tables."""
    assert f"`{name}`" in read("docs/glossary.md")


@pytest.mark.sources
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_is_in_the_glossary(outcome: str) -> None:
    """What the store may hold is explained."""
    assert f"`{outcome}`" in read("docs/glossary.md")


@pytest.mark.sources
def test_the_method_has_every_kind_of_metric() -> None:
    """Where a number comes from has a chapter, and every metric says how it is made."""
    method = read("docs/method.md")

    assert all(word in method for word in ("## Counted", "## Predicted", "## Measured"))
    assert all(metric.how for metric in METRICS.values())


@pytest.mark.sources
def test_markdown_links_lead_somewhere() -> None:
    """Every relative link and picture in the documents exists."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.sources
def test_top_level_folders_are_the_four_and_tests() -> None:
    """Python lives in the four packages, the tests and the noxfile; `skipcost/` says the version and has links.

    What draws the tour's picture lies beside the tour.
    """
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    tops = {name.split("/")[0] for name in listed.split() if name != "docs/rooms.py"}
    assert tops <= {*PACKAGES, "tests", "noxfile.py", "skipcost"}
    assert {path.name: path.readlink() for path in (ROOT / "skipcost").iterdir() if path.is_symlink()} == {
        name: Path("..", name) for name in PACKAGES
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_installed_under_the_projects_name(package: str) -> None:
    """Each folder is `skipcost.<folder>` and ships its marker for type checkers."""
    module = importlib.import_module(f"skipcost.{package}")

    assert module.__doc__
    assert (Path(module.__path__[0]) / "py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_there_and_can_be_imported(package: str) -> None:
    """In a wheel, too: what its settings forget to list is found by the first import that needs it."""
    found = importlib.import_module(f"skipcost.{package}")
    names = [each.name for each in pkgutil.iter_modules(found.__path__) if each.name != "__main__"]

    for name in names:
        if not name.endswith("_triton"):  # triton is an extra
            importlib.import_module(f"skipcost.{package}.{name}")

    assert len(names) > 5


def test_generic_names_are_left_to_others() -> None:
    """Installing the suite gives nobody a top-level `kernels`, `bench` or `reports`; another `kernels` still works."""
    script = (
        "import importlib.util as u, sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])];"
        "ours = [n for n in ('unet_models', 'kernels', 'bench', 'reports') if (s := u.find_spec(n)) and s.origin"
        " and 'skipcost' in open(s.origin).read()]; print(ours)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, check=True, cwd=Path(sys.prefix)
    )

    assert done.stdout.strip() == "[]"


def test_reports_never_load_torch() -> None:
    """Importing the report, and the command line that calls it, does not import torch."""
    script = "import sys, skipcost.reports, skipcost.reports.page, skipcost.bench.cli; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_the_command_line_loads_what_its_command_needs() -> None:
    """Not what only some commands do: these take seconds, and every command would wait for them."""
    heavy = ("torch", "triton", "pandas", "scipy", "matplotlib")
    script = f"import sys, skipcost.bench.cli; print(*[name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


@pytest.mark.sources
def test_the_workflow_runs_every_python_that_is_promised() -> None:
    """The matrix is the classifiers' versions, and every action is pinned by its hash."""
    workflow = read(".github/workflows/ci.yml")
    promised = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))

    (matrix,) = re.findall(r"python: \[(.+)\]", workflow)
    assert re.findall(r'"(3\.\d+)"', matrix) == promised
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", each) for each in re.findall(r"uses: (.+)", workflow))


def test_a_folder_of_the_same_name_does_not_take_the_packages_place(tmp_path: Path) -> None:
    """Beside a folder called skipcost, a clone for example, the installed package is imported, and says its version."""
    clone = tmp_path / "skipcost" / "bench"
    clone.mkdir(parents=True)
    (clone / "__init__.py").write_text("raise SystemExit('the folder, not the package')")
    script = "import skipcost, skipcost.bench; print(skipcost.__version__)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert (done.stdout.strip(), done.stderr) == (importlib.metadata.version("skipcost"), "")
