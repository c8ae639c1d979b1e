"""The tree: rooms have doors, tests mirror modules, and what is long is tested under its own name or says where."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from places import ROOT, TESTS

pytestmark = pytest.mark.sources
PACKAGES = ("unet_models", "kernels", "bench", "reports")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONG = 60  # lines
APART = {  # tests of several modules, or of none
    "test_bench/commands/test_options.py": "what all commands accept",
    "test_bench/kernels/test_commands.py": "`skipcost kernels` as a whole",
    "test_bench/kernels/test_commands_interpreted.py": "the same on kernels that are interpreted",
    "test_bench/memory/test_forms.py": "forms of backend=rewritten through all of the room",
    "test_kernels/verify/test_faithful_interpreted.py": "tests' own interpreter",
    "test_kernels/verify/test_mutants.py": "tests' own faults",
    "test_unet_models/test_counting.py": "fvcore and torch against arithmetic",
    "test_unet_models/test_published.py": "counts of published networks",
    "test_unet_models/test_reference.py": "networks written by hand",
}
THROUGH = {  # long modules that no test names, by the tests that run all of them
    "bench/commands/calibrate.py": "test_bench/predictions/test_calibration.py: the command",
    "bench/compare/attribution.py": "test_bench/compare/test_gate_revisions.py: where a change comes from",
    "bench/measure/counts.py": "test_bench/measure/test_metrics.py: through the table",
    **dict.fromkeys(
        ("bench/memory/step.py", "bench/memory/tap_operators.py"),
        "test_bench/memory/test_liveness_traced.py: byte for byte and event by event against a trace",
    ),
    "kernels/ops/checks.py": "test_kernels/ops/test_crop_concat.py: what each op refuses",
    "kernels/rewriting/nodes.py": "test_kernels/rewriting/test_graph.py: what is asked of its nodes",
    **dict.fromkeys(
        (
            "reports/drawings/topology.py",
            "reports/sections/networks.py",
        ),
        "test_reports/test_page.py: the page",
    ),
    "unet_models/names.py": "test_bench/time/test_passes.py: names of passes, of moments and of calls",
}
DOORS = {
    "skipcost.unet_models": {"ModelSpec", "graph", "lower", "Program", "build", "VARIANTS", "SKIPS"},
    "skipcost.kernels": {"BACKENDS", "KERNELS", "fuse", "rewrite"},
    "skipcost.bench": {"Case", "METRICS", "load_plan", "sweep", "open_store", "wide_table", "predict", "fit"},
    "skipcost.reports": {"write_report"},
}


def _tests_of(module: Path) -> list[Path]:
    name = module.parent.name if module.stem == "__init__" else module.stem
    folder = TESTS / f"test_{module.parts[0]}" / Path(*module.parent.parts[1:])
    return [path for path in folder.glob("test_*.py") if path.stem == f"test_{name}" or f"test_{name}_" in path.stem]


def _imports(path: Path) -> set[str]:
    """Dotted names that a test imports, and those in its texts, which other processes import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {
                word.strip("\"';,:()") for word in node.value.split() if word.startswith(("skipcost.", '"skipcost.'))
            }
    return found


def test_every_room_says_what_it_is_for() -> None:
    """A door has a docstring, and no folder of modules is without a door."""
    folders = {path.parent for path in MODULES}

    doors = {
        path.parent: ast.get_docstring(ast.parse((ROOT / path).read_text()))
        for path in MODULES
        if path.stem == "__init__"
    }

    assert set(doors) == folders
    assert all(doors.values())


@pytest.mark.parametrize("package", DOORS)
def test_a_package_has_the_names_of_its_door(package: str) -> None:
    """Each is found, has a docstring where it can have one, and is named by `dir` and the tour."""
    module = importlib.import_module(package)
    tour = (ROOT / "docs" / "tour.md").read_text()

    missing = [name for name in DOORS[package] if not hasattr(module, name) or name not in dir(module)]
    silent = [name for name in DOORS[package] if callable(getattr(module, name)) and not getattr(module, name).__doc__]

    assert DOORS[package] <= set(module.__all__) == set(dir(module))
    assert missing == silent == []
    assert all(f"`{name}`" in tour for name in DOORS[package])


def test_every_test_lies_where_its_module_does() -> None:
    """What tests no single module is listed with what it is about."""
    mirrored = {path for module in MODULES for path in _tests_of(module)}
    here = {path for package in PACKAGES for path in (TESTS / f"test_{package}").rglob("test_*.py")}

    odd = {str(path.relative_to(TESTS)) for path in here - mirrored}

    assert odd == set(APART)


def test_every_long_module_is_named_by_a_test() -> None:
    """By one of its own, or by import in another; or it is listed with the tests that run it."""
    named = set().union(*(_imports(path) for path in TESTS.rglob("*.py")))
    unnamed = set()
    for path in MODULES:
        module = f"skipcost.{'.'.join(path.with_suffix('').parts)}".removesuffix(".__init__")
        long = len((ROOT / path).read_text().splitlines()) > LONG
        tested = _tests_of(path) or any(name == module or name.startswith(f"{module}.") for name in named)
        if long and not tested and path.parent != Path("kernels/device"):  # each op's tests run its device code
            unnamed.add(str(path))

    assert unnamed == set(THROUGH)
    assert all((TESTS / where.partition(":")[0]).exists() for where in THROUGH.values())


NAMED = re.compile(r"(?<!from )\bskipcost\.((?:unet_models|kernels|bench|reports)(?:\.\w+)+)")
IMPORTED = re.compile(r"from skipcost\.([\w.]+) import (\w+)")
FILED = re.compile(r"(?<![\w/.-])((?:unet_models|kernels|bench|reports|tests)/[\w/]+\.(?:py|toml))\b")
TEXTS = sorted(
    path for suffix in ("py", "md", "toml", "yml") for path in (*TESTS.rglob(f"*.{suffix}"), *ROOT.glob(f"*.{suffix}"))
)
MISNAMED = {"kernels.unheard_of", "unet_models.buidl"}  # asked for by tests that want them refused


def test_no_text_names_a_module_or_a_file_that_is_not_there() -> None:
    """Scripts in strings, names that are patched, files in documents: moving a module must reach them all."""
    here = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    texts = [*TEXTS, *(ROOT / path for path in MODULES), *ROOT.glob("docs/*.md")]
    gone = []
    for path in texts if (ROOT / "CHANGELOG.md").exists() else []:
        text = path.read_text() if path.name != "CHANGELOG.md" else ""
        named = [match[1] for match in NAMED.finditer(text)] + [match[1] for match in IMPORTED.finditer(text)]
        gone += [f"{path.name}: {name}" for name in named if not _leads_to(name, here) and name not in MISNAMED]
        gone += [f"{path.name}: {match[1]}" for match in FILED.finditer(text) if not (ROOT / match[1]).exists()]

    assert gone == []


def _leads_to(name: str, here: set[str]) -> bool:
    """Whether a dotted name is a module, a name of a module, or a name of a door."""
    name = re.sub(r"(\.__\w+__).*", r"\1", name)  # an attribute of a module's own, whatever is asked of it
    package, _, last = name.rpartition(".")
    if name in here:
        return True
    if package in here and (ROOT / package.replace(".", "/")).is_dir():
        return last in DOORS.get(f"skipcost.{package}", set()) | {"__file__", "__path__", "__all__"}
    above = package.rpartition(".")[0]
    return package in here or (above in here and not (ROOT / above.replace(".", "/")).is_dir())
