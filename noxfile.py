"""Every check and every run, by name: `nox -l` lists them. CI calls these and nothing else.

All sessions share one environment, `.venv`, made when it is missing: each copy of torch and triton is 2 GB. It is
installed with constraints.txt, and by pip, which honours a local wheel folder that other installers do not look at.
`package` alone has an environment of its own, since a clean one is its point.
"""

from __future__ import annotations

import platform
import shutil
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox

ROOT = Path(__file__).parent
BIN = "Scripts" if sys.platform == "win32" else "bin"
SHARED = ROOT / ".venv"
GROUPS = nox.project.load_toml("pyproject.toml")
RESULTS = ROOT / "results"
RELAXED = (  # tests build values from tables, bad ones included, and look into modules, which torch types loosely
    "--allow-untyped-calls",
    "--no-warn-return-any",
    "--no-warn-unused-ignores",
    *(f"--disable-error-code={code}" for code in ("arg-type", "operator", "index", "union-attr", "redundant-cast")),
)
TRITONS = {"3.6.0": ("numpy==2.3.5",), "3.9.0": ()}  # Triton 3.6's interpreter fails on numpy 2.4
FURTHER_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
OTHER_COUNTERS = ("torchinfo==1.8.0", "thop==0.1.1.post2209072238", "ptflops==0.7.5")
MONAI = ("monai==1.6.1",)
PUBLIC_UNETS = (  # what `rewrite` is tried on; each beside torch, none installs another
    *MONAI,
    "segmentation-models-pytorch==0.6.0",
    "bio-image-unet==1.2.2",
    "seg2link-unet2d==0.2.1",
    "unet-torch==0.0.2",
)
AXE = "axe-core@4.14.1"  # from npm; what the browser loads is this one file of it
ON_THE_WHEEL = (  # one file for each kind of thing that is looked for; what they compute is no other
    *("test_project.py", "test_bench/test_cli.py"),  # modules that are ours, the command and its subcommands
    "test_bench/measure/test_budget.py",  # the plug-in of pytest
    *("test_bench/sweeps/test_plan.py", "test_bench/measure/test_environment.py"),  # sweeps, and the hash of the code
    *("test_kernels/test_devices.py", "test_kernels/verify/test_baseline.py"),  # tables of devices and registers
    *("test_kernels/dispatch/test_choose.py", "test_bench/kernels/test_tune.py"),  # tuned configurations
    "test_reports/test_page.py",  # templates
)
OF_THE_REPOSITORY = ("bench/baselines/",)  # tracked in the packages, and of no use without the rest
# Tests take one core; a file's fixtures are made once. Files in their order end with short ones; by their number of
# tests, those with few and long ones would be last, and one core idle.
PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on two cores, two workers with two threads each would wait for each other
NARROW = (  # instruction sets that another machine may be without: ATen's own kernels, then oneDNN's
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
)

_installed: set[str] = set()  # in the shared environment, by this run of nox: the groups, "" is the project itself

nox.options.default_venv_backend = "none"
nox.options.sessions = ["sweep"]
nox.needs_version = ">=2024.10.9"


def _tool(name: str, environment: Path = SHARED) -> str:
    return str(environment / BIN / name)


def _pip(session: nox.Session, *what: str, environment: Path = SHARED) -> None:
    if not (environment / "pyvenv.cfg").exists():
        session.run(sys.executable, "-m", "venv", str(environment), external=True)
    command = (_tool("python", environment), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    session.run(*command, "-c", "constraints.txt", *what, external=True)


def _install(session: nox.Session, *groups: str) -> None:
    """Install the project itself, editable, with its extras, and the named dependency groups; once in a run of nox."""
    if {"", *groups} <= _installed:
        return
    tools = nox.project.dependency_groups(GROUPS, *groups) if groups else ()
    _pip(session, "-e", ".[fvcore,gpu]", *tools)
    _installed.update({"", *groups})


def _beside(session: nox.Session, name: str, *what: str) -> str:
    """Install exact packages, without what they depend on, into a folder to put on the path; return the folder."""
    folder = ROOT / ".nox" / name
    if not folder.exists():
        command = (_tool("python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps")
        session.run(*command, "--target", str(folder), *what, external=True)
    return str(folder)


def _matching(session: nox.Session, folder: Path, pattern: str) -> list[Path]:
    """Return what a pattern names; one that names nothing would pass without a test."""
    found = sorted(folder.glob(pattern))
    if not found:
        session.error(f"{pattern} names nothing in {folder}")
    return found


def _at_once(session: nox.Session, *commands: Sequence[str]) -> None:
    """Run commands that take one core each beside each other; all of them, also where one fails."""
    with ThreadPoolExecutor(len(commands)) as pool:
        for done in [pool.submit(session.run, *command, external=True) for command in commands]:
            done.result()


def _complete(session: nox.Session, wheel: Path) -> None:
    """Fail where a file of the packages that git knows is not in the wheel, byte for byte."""
    packages = [each.name for each in (ROOT / "skipcost").iterdir() if each.is_symlink()]
    listed = str(session.run("git", "ls-files", *packages, silent=True, external=True)).split()
    with zipfile.ZipFile(wheel) as archive:
        within = {name.removeprefix("skipcost/"): archive.read(name) for name in archive.namelist()}
    shipped = [name for name in listed if not name.startswith(OF_THE_REPOSITORY)]
    if other := [name for name in shipped if within.get(name) != (ROOT / name).read_bytes()]:
        session.error(f"not in {wheel.name} as they are in the repository: {', '.join(other)}")


@nox.session
def sweep(session: nox.Session) -> None:
    """Run the quick sweep and write its report; `nox -s sweep -- full --device cuda` for another one."""
    _install(session)
    name = session.posargs[0] if session.posargs else "quick"
    store = RESULTS / f"{Path(name).stem}.sqlite"
    session.run(_tool("skipcost"), "sweep", name, "-o", str(store), *session.posargs[1:], external=True)
    session.run(_tool("skipcost"), "report", str(store), "-o", str(RESULTS / "report.html"), external=True)


@nox.session
def report(session: nox.Session) -> None:
    """Write the HTML report of a store: `nox -s report -- results/quick.sqlite -o report.html`."""
    _install(session)
    arguments = session.posargs or [str(RESULTS / "quick.sqlite"), "-o", str(RESULTS / "report.html")]
    session.run(_tool("skipcost"), "report", *arguments, external=True)


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Check style, formatting, the direction of imports, and that docs/tour.md draws what there is."""
    _install(session, "lint")
    session.run(_tool("ruff"), "check", ".", external=True)
    session.run(_tool("ruff"), "format", "--check", ".", external=True)
    session.run(_tool("lint-imports"), env={"PYTHONPATH": str(ROOT)}, external=True)
    session.run(sys.executable, "docs/rooms.py", "--check", external=True)


@nox.session(tags=["check"])
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session, "lint", "test")
    apart = ("--cache-dir", ".mypy_cache/tests")  # with other settings than the packages, at the same time
    _at_once(session, [_tool("mypy")], [_tool("mypy"), *RELAXED, *apart, "noxfile.py", "tests"])


@nox.session(tags=["check"])
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    _install(session, "test")
    session.run(_tool("python"), "-m", "pytest", *(session.posargs or PARALLEL), env=ONE_THREAD, external=True)


@nox.session(tags=["check"])
def browser(session: nox.Session) -> None:
    """Drive a report in Chromium without a network: the choice, links, keyboard, and what axe-core finds.

    Needs Chromium, chromedriver and npm, and fails without: a test of the page that did not run has not passed.
    """
    if missing := [name for name in ("chromium", "chromedriver", "npm") if not shutil.which(name)]:
        session.error(f"not installed: {', '.join(missing)}; on Debian: apt-get install chromium chromium-driver npm")
    _install(session, "test", "browser")
    folder = ROOT / ".nox" / "axe"
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        session.run("npm", "install", "--silent", "--ignore-scripts", "--prefix", str(folder), AXE, external=True)
    where = session.posargs or ("tests/browser",)
    session.run(_tool("python"), "-m", "pytest", *where, env={"SKIPCOST_AXE": str(source)}, external=True)


@nox.session(tags=["check"])
def isa(session: nox.Session) -> None:
    """Run the tests marked `numeric` as on a CPU with AVX2, and as on one with SSE4.1 alone, whatever this one has.

    Marked is what judges rounding by a bound where PyTorch's own CPU kernels compute: one test for each place where
    these differ by instruction set. Those are the order of sums in fp32 and where a bias joins them, products of 16
    bits with instructions and without, forwards and backwards, and whole networks of both. What is in float64, exact,
    or computed by Triton's interpreter alone says the same everywhere, and would take ten times as long.
    """
    if platform.machine() not in {"x86_64", "AMD64"}:
        session.skip(f"these instruction sets are those of x86-64, this is {platform.machine()}")
    _install(session, "test")
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.numeric" in path.read_text()]
    chosen = [str(path) for path in session.posargs or marked]
    as_on = [[f"{name}={value}" for name, value in {**ONE_THREAD, **narrow}.items()] for narrow in NARROW]
    command = (_tool("python"), "-m", "pytest", "-m", "numeric", "-p", "no:cacheprovider", *chosen)
    _at_once(session, *(["env", *variables, *command] for variables in as_on))


@nox.session(tags=["check"])
def gate(session: nox.Session) -> None:
    """Compare what networks cost and kernels need with reviewed baselines, or `nox -s gate -- --against main`."""
    _install(session)
    store = RESULTS / "ci.sqlite"
    session.run(_tool("skipcost"), "sweep", "ci", "-o", str(store), external=True)
    compared = session.posargs or ["--baseline", "bench/baselines/ci.jsonl"]
    kept = ("--verdicts", str(RESULTS / "gate.json"))
    session.run(_tool("skipcost"), "gate", str(store), "--kernels", *kept, *compared, external=True)


@nox.session(tags=["check"])
def package(session: nox.Session) -> None:
    """Build the wheel and test it in a clean environment, beside Hugging Face's `kernels`, away from the sources."""
    _install(session, "build")
    built, clean = ROOT / "dist", ROOT / ".nox" / "package"
    shutil.rmtree(built, ignore_errors=True)
    session.run(_tool("python"), "-m", "build", "--wheel", "--outdir", str(built), str(ROOT), external=True)
    wheel = next(built.glob("*.whl"))
    _complete(session, wheel)
    tools = nox.project.dependency_groups(GROUPS, "test")
    _pip(session, "kernels", *tools, f"{wheel}[fvcore]", environment=clean)
    again = (_tool("python", clean), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    session.run(*again, "--force-reinstall", "--no-deps", str(wheel), external=True)
    beside = "import kernels, skipcost.kernels as ours; assert kernels.__file__ != ours.__file__; print(kernels, ours)"
    away = Path(session.create_tmp()).resolve()
    shutil.rmtree(away / "tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", away / "tests")
    shutil.copy(ROOT / "pyproject.toml", away)  # pytest's settings; the folders that it names stay behind
    with session.chdir(away):
        session.run(_tool("python", clean), "-c", beside, external=True)
        chosen = [str(path) for pattern in ON_THE_WHEEL for path in _matching(session, Path("tests"), pattern)]
        options = (*PARALLEL, "-m", "not sources and not slow", *chosen)
        session.run(_tool("python", clean), "-m", "pytest", *options, env=ONE_THREAD, external=True)


@nox.session
def tour(session: nox.Session) -> None:
    """Draw the rooms into docs/tour.md anew, from the imports of the code."""
    session.run(sys.executable, "docs/rooms.py", *session.posargs, external=True)


@nox.session
def perf(session: nox.Session) -> None:
    """Time the suite's own parts with pytest-benchmark: specs a second, overhead per case, share spent measuring."""
    _install(session, "test")
    store = ROOT / "results" / "perf.json"
    store.parent.mkdir(exist_ok=True)
    options = ("--benchmark-only", f"--benchmark-json={store}", "-s")
    session.run(_tool("python"), "-m", "pytest", "tests/perf", *options, *session.posargs, external=True)


@nox.session
def ab(session: nox.Session) -> None:
    """Time this tree against another revision in turns: `nox -s ab -- origin/main --junit ab.xml`."""
    _install(session)
    kept = ("--verdicts", str(RESULTS / "ab.json"))
    session.run(_tool("skipcost"), "ab", *kept, *(session.posargs or ["HEAD"]), external=True)


@nox.session
def resources(session: nox.Session) -> None:
    """Compile every kernel for further GPUs and gate what it needs; sm_90 and gfx942 are in every run of the tests."""
    _install(session)
    targets = [option for name in FURTHER_TARGETS for option in ("--target", name)]
    session.run(_tool("skipcost"), "kernels", "resources", *targets, *session.posargs, external=True)


@nox.session
def mutants(session: nox.Session) -> None:
    """Seed faults into the kernels, one at a time, and see the interpreter's checks fail; minutes a kernel."""
    _install(session, "test")
    session.run(_tool("python"), "tests/helpers/mutants.py", *session.posargs, external=True)


@nox.session
def tritons(session: nox.Session) -> None:
    """Run the kernels' tests with the oldest Triton that is supported and the newest known, beside the pinned one.

    Only Triton and what it needs is installed anew, into a folder that goes before the shared environment.
    """
    _install(session, "test")
    for version, others in TRITONS.items():
        folder = _beside(session, f"triton-{version}", f"triton=={version}", *others)
        tests = session.posargs or ("tests/test_kernels", "tests/test_bench/kernels")
        session.run(_tool("python"), "-m", "pytest", *PARALLEL, *tests, env={"PYTHONPATH": folder}, external=True)


@nox.session
def counters(session: nox.Session) -> None:
    """Hear the counters that the suite does not install: torchinfo, thop and ptflops, at the versions pinned here."""
    _install(session, "test")
    path = {"PYTHONPATH": _beside(session, "counters", *OTHER_COUNTERS)}
    session.run(
        _tool("python"), "-m", "pytest", "tests/optional/test_counters.py", *session.posargs, env=path, external=True
    )
    session.run(_tool("skipcost"), "counters", "unet/d4/w32/concat/in_channels=3", env=path, external=True)


@nox.session
def monai(session: nox.Session) -> None:
    """Measure MONAI's U-Nets beside the suite's, and write the report; MONAI comes without what it depends on."""
    _install(session, "test")
    path = {"PYTHONPATH": _beside(session, "monai", *MONAI)}
    session.run(
        _tool("python"), "-m", "pytest", "tests/optional/test_monai.py", *session.posargs, env=path, external=True
    )
    store = RESULTS / "monai.sqlite"
    session.run(_tool("skipcost"), "sweep", "monai", "-o", str(store), env=path, external=True)
    session.run(_tool("skipcost"), "report", str(store), "-o", str(RESULTS / "monai.html"), external=True)


@nox.session
def rewrite(session: nox.Session) -> None:
    """Rewrite public U-Nets, and see that they compute the same with fewer MACs; they come without what they need."""
    _install(session, "test")
    path = {"PYTHONPATH": _beside(session, "public_unets", *PUBLIC_UNETS)}
    session.run(
        _tool("python"), "-m", "pytest", "tests/optional/test_rewrite.py", *session.posargs, env=path, external=True
    )


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; fails where there is none."""
    _install(session, "test")
    check = "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'torch sees no CUDA device here')"
    session.run(_tool("python"), "-c", check, external=True)
    session.run(_tool("python"), "-m", "pytest", "-m", "gpu", *session.posargs, external=True)
