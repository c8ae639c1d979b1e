"""The resource gate itself: the command, and every kernel that ships, compiled for the default targets.

What compiles does so in processes of their own, in which Triton does not interpret.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from kernel_compiler import python, skip_without_compiler

import skipcost.kernels
from skipcost.bench.errors import MachineError
from skipcost.bench.kernels import jobs, resources, tune
from skipcost.bench.kernels.cases import need
from skipcost.bench.kernels.resources import DEFAULT_TARGETS, keys, main
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.ops.tiles import Tile, tuned_row, tuning_key
from skipcost.kernels.verify import baseline, compiling
from skipcost.kernels.verify.baseline import stored
from skipcost.kernels.verify.compiling import compiled
from skipcost.kernels.verify.gated import GATED, tuned
from skipcost.kernels.verify.targets import TARGETS


def test_the_shipped_baseline_judges_every_kernel_and_accepts_no_spill() -> None:
    """There is a row for each gated kernel on each default target; a spill would have been written down knowingly."""
    judged = {key: row for key, row in stored()[-1].rows.items() if key[1] in DEFAULT_TARGETS}

    assert set(judged) == set(keys(DEFAULT_TARGETS))
    assert not any(row.spilled_bytes for row in judged.values())


def test_every_kernel_is_gated() -> None:
    """Each `@triton.jit` function that no other calls is launched by a row of GATED."""
    jitted, called = set(), set()
    for path in (Path(skipcost.kernels.__path__[0]) / "device").glob("[!_]*.py"):
        tree = ast.parse(path.read_text())
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            jitted.add(f"{path.stem}.{function.name}")
            names = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            called |= {name.id for name in names if isinstance(name, ast.Name)}
    kernels = {name for name in jitted if name.partition(".")[2] not in called}

    assert {make().kernel for make in GATED.values()} == kernels


TUNED = (  # a call of each op that is told its tile, and a tile that none of them has by default
    (Call("conv_bn_relu", 8, ((64, 32, 32),), 64), Tile("pointer", 64, 32, 32, 4, 2)),
    (Call("conv_bn_relu_pool", 8, ((128, 32, 32),), 64), Tile("tma", 64, 32, 64, 4, 2, 8, 8)),
    (Call("conv_bn_relu", 8, ((3, 32, 32),), 64, precision="fp16"), Tile("few", 64, 32, 32, 4, 3)),
    (Call("concat_conv_bn_relu", 8, ((64, 32, 32), (32, 40, 36)), 64, precision="tf32"), Tile("pointer", 64, 32, 16)),
    (Call("up_conv", 8, ((64, 32, 32),), 32), Tile("pointer", 64, 32, 32, 4, 2)),
)


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file of sm_90, where the package's are looked for; what other GPUs have there stays away."""
    path = tmp_path / "configs" / "sm90.json"
    monkeypatch.setattr(importlib.resources, "files", lambda _package: tmp_path)
    tune.write([tuned_row(need(call), tile.form, tile, call=call.key) for call, tile in TUNED], path)
    return path


@pytest.mark.usefixtures("tuned_file")
def test_tuned_tiles_are_gated_for_the_gpu_that_they_were_tuned_on() -> None:
    """Each row of the file is a launch of its call with its tile, beside those that ship for every GPU."""
    launches = tuned("sm90")

    assert [name for name, _ in keys(["sm_90"])] == [*GATED, *launches]
    assert {name for name, _ in keys(["sm_80", "gfx942"])} < set(GATED)
    for call, tile in TUNED:
        launch = launches[f"tuned/{tuning_key(need(call), tile.form)}"]()
        constants = launch.constants
        pixels = constants.get("tile_pixels") or constants["tile_rows"] * constants["tile_columns"]
        used = (pixels, constants["tile_channels"], constants["tile_depth"], launch.warps, launch.stages)
        assert used == (tile.pixels, tile.channels, tile.depth, tile.warps, tile.stages)
        assert (launch.arguments.get("pooled") is not None) == (call.op == "conv_bn_relu_pool")
        assert (constants["precision"] == "tf32") == (call.precision == "tf32")


def test_what_cannot_run_on_a_target_is_left_out() -> None:
    """Descriptors below sm_90 and on AMD, tf32 on gfx950, products on sm_75: nobody launches that."""
    assert any("tma" in name for name, _ in keys(["sm_90"]))
    assert not any("tma" in name for name, _ in keys(["sm_80", "gfx942"]))
    assert any("tf32" in name for name, _ in keys(["gfx942"]))
    assert not any("tf32" in name for name, _ in keys(["gfx950"]))
    assert {name.split("/")[0] for name, _ in keys(["sm_75"])} == {"crop_concat", "tap_upsample_add", "batch_norm"}


def test_an_unknown_target_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and the targets that there are."""
    with pytest.raises(SystemExit) as ended:
        main(["--target", "sm_1"])

    assert ended.value.code == 2
    assert "invalid choice: 'sm_1' (choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="target='sm_1' is unknown; accepted: sm_75, sm_80, sm_86"):
        compiled(next(iter(GATED.values()))(), "sm_1")


def test_the_baseline_is_written_and_read_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is what the next run compares with; a file that nobody can read is no pass."""
    row = stored()[-1].rows["batch_norm/add/fp32", "sm_90"]
    key = ("batch_norm/add/fp32", "sm_90")
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    monkeypatch.setattr(resources, "why_not", lambda: "")
    monkeypatch.setattr(resources, "measure", lambda _: ({key: row}, []))

    written, again = main(["--write-baseline"]), main(["--json"])
    monkeypatch.setattr(resources, "measure", lambda _: ({key: replace(row, spilled_bytes=4)}, []))
    worse = main([])
    path = tmp_path / f"triton-{row.triton}.json"
    path.write_text("{")

    assert (written, again, worse) == (0, 0, 1)
    out, err = capsys.readouterr()
    assert "problem: batch_norm/add/fp32 on sm_90: spills registers, 4 bytes per thread\n" in out
    assert err == f"skipcost kernels: wrote {path}\n"
    with pytest.raises(ValueError, match="a baseline is not readable"):
        main([])


def test_no_baseline_is_written_of_half_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one does not compile, the others are shown, and the file stays as it is."""
    row = stored()[-1].rows["batch_norm/add/fp32", "sm_90"]
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    monkeypatch.setattr(resources, "why_not", lambda: "")
    monkeypatch.setattr(resources, "measure", lambda _: ({("a", "sm_90"): row}, ["b on sm_90: does not compile"]))

    code = main(["--write-baseline"])

    assert code == 1
    assert not list(tmp_path.iterdir())
    assert "no baseline was written: not every kernel compiles" in capsys.readouterr().err


def test_where_triton_interprets_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the command and the function say so in a sentence."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, so another reason comes first")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    said = r"TRITON_INTERPRET=1 makes Triton interpret its kernels .*: unset it$"
    with pytest.raises(MachineError, match=said):
        main([])
    with pytest.raises(RuntimeError, match=said):
        compiled(next(iter(GATED.values()))(), "sm_90")


def test_without_triton_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and nothing is passed."""
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)

    with pytest.raises(MachineError, match=r"triton is not installed: pip install 'skipcost\[gpu\]'"):
        main([])


def test_a_compiler_that_dies_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel has a sentence; the others are found, in the order in which they were asked for."""
    row = stored()[-1].rows["batch_norm/add/fp32", "sm_90"]
    answers = {"dies": jobs.failed("crash", "the process ended with signal 11 (SIGSEGV)")}

    def run(todo: list[jobs.Job], *_: object) -> Iterator[jobs.Done]:
        for job in reversed(todo):  # whoever is first
            (part,) = job.parts
            yield jobs.Done(job.what, part, answers.get(part["name"], {"outcome": "ok", "found": asdict(row)}))

    monkeypatch.setattr(jobs, "run", run)

    found, failed = resources.measure([("a", "sm_90"), ("dies", "sm_90"), ("b", "sm_90")])

    assert list(found.items()) == [(("a", "sm_90"), row), (("b", "sm_90"), row)]
    assert failed == ["dies on sm_90: the process ended with signal 11 (SIGSEGV)"]


@pytest.mark.slow
def test_a_tile_that_does_not_fit_fails_the_gate() -> None:
    """A convolution of 256 x 256 outputs by 4 warps spills, and its loads in flight are too much: exit code 1."""
    skip_without_compiler()

    done = python("""
import sys
from functools import partial
from skipcost.kernels.verify import gated
from skipcost.bench.kernels import resources
from skipcost.kernels.ops.tiles import Tile

name = "conv/pointer/64>64@512/bf16"
gated.default_tile = lambda *_: Tile("pointer", 256, 256, 64, 4, 4)
gated.tuned_rows = lambda _: []
make = gated.GATED[name]
gated.GATED.clear()
gated.GATED[name] = make
sys.exit(resources.main(["--target", "sm_90"]))
""")

    assert done.returncode == 1, done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: conv/pointer/64>64@512/bf16 on")]
    assert any("spills registers" in each for each in problems)
    assert any("is over the limit of 232448" in each for each in problems)


@pytest.mark.slow
def test_a_tuned_tile_that_spills_fails_the_gate() -> None:
    """It is compiled like those that ship, at its row's call, and has to be in its Triton's baseline, too."""
    skip_without_compiler()

    done = python("""
import sys
from skipcost.kernels.verify import gated
from skipcost.bench.kernels import resources
from skipcost.kernels.dispatch.call import Call
from skipcost.bench.kernels.cases import need
from skipcost.kernels.ops.tiles import Tile, tuned_row

call, tile = Call("conv_bn_relu", 8, ((256, 32, 32),), 256), Tile("pointer", 256, 256, 64, 4, 2)
gated.GATED.clear()
gated.tuned_rows = lambda name: [tuned_row(need(call), "pointer", tile, call=call.key)] if name == "sm90" else []
resources.PROCESSES = 1
sys.exit(resources.main(["--target", "sm_90"]))
""")

    assert done.returncode == 1, done.stderr
    name = "tuned/conv_bn_relu pointer bf16 1x 256>256 k9 4^7"
    assert f"problem: {name} on sm_90: spills registers" in done.stdout
    known = importlib.metadata.version("triton") in {each.triton for each in stored()}
    assert (f"problem: {name} on sm_90: has no row in the baseline" in done.stdout) == known


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the command says of everything that is gated, on the default targets; minutes, seconds when cached."""
    skip_without_compiler()
    done = python("import sys; from skipcost.bench.kernels.resources import main; sys.exit(main(['--json']))")
    if done.returncode not in (0, 1):
        pytest.fail(f"the gate ended with {done.returncode}\n{done.stderr}", pytrace=False)
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "returncode": done.returncode}


@pytest.mark.slow
def test_the_gate_passes(report: dict[str, Any]) -> None:
    """Nothing that ships got worse; on the pinned Triton that is a comparison, on another the absolute rules."""
    assert report["problems"] == []
    assert report["returncode"] == 0
    assert bool(report["warning"]) == (report["rows"][0]["triton"] not in {each.triton for each in stored()})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), keys(DEFAULT_TARGETS))
def test_a_shipped_kernel_fits_its_hardware(name: str, target: str, report: dict[str, Any]) -> None:
    """It spills nothing, fits, and runs on the engines that its name promises."""
    (row,) = [each for each in report["rows"] if (each["name"], each["target"]) == (name, target)]
    multiplies = name.startswith(("conv/", "up_conv/", "weight_gradient/", "tuned/"))

    assert row["spilled_bytes"] == 0
    assert row["blocks"] >= 1
    assert row["shared_bytes"] <= TARGETS[target].block_shared_bytes
    if not name.startswith("tap_upsample_add/"):  # its sums are small products in fp32, which AMD's matrix engines do
        assert (row["tensor_core"] > 0) == (row["products"] > 0) == multiplies
    assert (row["copy_engine"] > 0) == ("tma" in name)
    if multiplies and target == "sm_90" and "tma" not in name and "few" not in name:
        assert row["async_copies"] > 0


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_problem_of_its_own() -> None:
    """The others are still measured, and the sentence says what the compiler said."""
    skip_without_compiler()

    done = python("""
from dataclasses import replace
from skipcost.kernels.verify import gated
from skipcost.bench.kernels import resources
name, other = "batch_norm/add/fp32", "batch_norm/finish/fp32"
launch = gated.GATED[name]()
make = gated.GATED[other]
gated.GATED.clear()
gated.GATED[name] = lambda: replace(launch, constants={**launch.constants, "tile_size": 24})
gated.GATED[other] = make
resources.PROCESSES = 1
gated.tuned_rows = lambda _: []
found, failed = resources.measure(resources.keys(["sm_90"]))
print(list(found), failed)
""")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[('batch_norm/finish/fp32', 'sm_90')] ")
    assert "batch_norm/add/fp32 on sm_90: does not compile: ValueError: arange's range must be a power" in done.stdout
