"""What compiled kernels need, as data: `Resources`, the baselines kept of them, and `compare`, the gate's rules.

A baseline belongs to one Triton version, since compilers differ by a quarter in registers; it is written by
`skipcost kernels resources --write-baseline`. Importing this needs neither torch nor triton.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from skipcost.kernels.outputs import write_file
from skipcost.kernels.verify.targets import TARGETS

Key = tuple[str, str]  # the name of a row of GATED, and a key of TARGETS
REGISTERS = 8  # more or fewer than that are another kernel, not another day: registers are given out in eights
INSTRUCTIONS = 0.15  # likewise, as a share
FOLDER = files("skipcost.kernels") / "baselines"
PATHS = {  # what makes a kernel fast, if it has it at all
    "tensor_core": "tensor cores",
    "copy_engine": "TMA",
    "async_copies": "cp.async",
    "wide_accesses": "16-byte accesses",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel, compiled for one target, asks of it.

    registers, spilled_bytes: per thread; spilled are the bytes that all loads and stores of local memory move (AMD:
    4 per spilled register). shared_bytes: per block. products, block_moves: matrix products for tensor cores, and
    accesses through descriptors, that the source has; tensor_core, copy_engine, async_copies: instructions that do the
    products, move blocks by themselves (TMA), and copy past the registers (cp.async). accesses, wide_accesses: other
    loads and stores of global memory, and those of them that move 16 bytes per thread. instructions: all but no-ops.
    blocks, occupancy, limit: see `targets.Residency`.
    """

    kernel: str
    target: str
    triton: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int
    tensor_core: int
    block_moves: int
    copy_engine: int
    async_copies: int
    accesses: int
    wide_accesses: int
    instructions: int
    blocks: int
    occupancy: float
    limit: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the gated kernels needed when somebody last looked and found it good, with one Triton version."""

    triton: str
    rows: dict[Key, Resources]

    @property
    def text(self) -> str:
        """JSON with one sorted row a line, so that a changed kernel is a changed line."""
        rows = [{"name": name, **asdict(self.rows[name, target])} for name, target in sorted(self.rows)]
        for row in rows:
            del row["triton"]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        return f'{{"triton": "{self.triton}", "rows": [\n{lines}\n]}}\n'


def parse(text: str) -> Baseline:
    """Read what `Baseline.text` wrote; ValueError for anything else."""
    try:
        content = json.loads(text)
        version = content["triton"]
        rows = [(row.pop("name"), Resources(triton=version, **row)) for row in content["rows"]]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        message = f"a baseline is not readable ({error!r}): write it again with skipcost kernels resources"
        raise ValueError(message) from error
    return Baseline(version, {(name, row.target): row for name, row in rows})


def stored() -> list[Baseline]:
    """All baselines that come with the package, the newest Triton last."""
    found = FOLDER.iterdir() if FOLDER.is_dir() else iter(())
    read = [parse(each.read_text()) for each in found if each.name.endswith(".json")]
    return sorted(read, key=lambda each: [int(part) for part in each.triton.split(".")[:3] if part.isdigit()])


def stored_rows() -> list[dict[str, Any]]:
    """The rows of all baselines that come with the package, for tables: fields of `Resources` under `name`."""
    return [
        {"name": name, **asdict(row)}
        for baseline in stored()
        for (name, _), row in sorted(baseline.rows.items(), key=lambda item: item[0])
    ]


def baseline_for(version: str) -> Baseline | None:
    """The baseline of this Triton; where there is none, the newest, which `compare` will not compare with."""
    known = {each.triton: each for each in stored()}
    return known.get(version) or next(reversed(known.values()), None)


def write(found: Mapping[Key, Resources]) -> Path:
    """Make what was found the baseline of its Triton and its targets, in the package's folder; return the file.

    Rows of other targets stay as they are.
    """
    version, targets = _version(found), {target for _, target in found}
    before = next((each for each in stored() if each.triton == version), Baseline(version, {}))
    kept = {key: row for key, row in before.rows.items() if key[1] not in targets}
    path = Path(str(FOLDER), f"triton-{version}.json")
    write_file(path, Baseline(version, {**kept, **found}).text)
    return path


def incomparable(found: Mapping[Key, Resources], baseline: Baseline | None) -> str:
    """Why only the absolute rules apply, or to which targets, in a sentence; "" where everything is compared."""
    version, only = _version(found), "only spills, tensor cores and limits are checked"
    if baseline is None:
        return f"there is no baseline: {only} for Triton {version}"
    if baseline.triton != version:
        return f"the baseline is of Triton {baseline.triton}, this is {version}, and they are not comparable: {only}"
    missing = sorted({target for _, target in found} - _targets(found, baseline))
    return f"the baseline has no row of {', '.join(missing)}: {only} there" if missing else ""


def compare(found: Mapping[Key, Resources], baseline: Baseline | None) -> list[str]:
    """What is wrong with the kernels found, one sentence each; nothing if they may ship.

    Only targets that were compiled for are compared. Against no baseline, or one of another Triton, or one without a
    row of the target, the absolute rules hold alone: nothing spills, products run on tensor cores, descriptors on the
    copy engine, a block fits.
    """
    if not found:
        return ["nothing was compiled, so nothing was checked"]
    targets = _targets(found, baseline)
    rows = {key: row for key, row in baseline.rows.items() if key[1] in targets} if baseline else {}
    problems = []
    for key in sorted({*found, *rows}):
        complaints = _complaints(found.get(key), rows.get(key), compared=key[1] in targets)
        problems += [f"{key[0]} on {key[1]}: {each}" for each in complaints]
    return problems


def _targets(found: Mapping[Key, Resources], baseline: Baseline | None) -> set[str]:
    """The targets whose kernels can be compared."""
    if baseline is None or baseline.triton != _version(found):
        return set()
    return {target for _, target in found} & {target for _, target in baseline.rows}


def _complaints(new: Resources | None, old: Resources | None, *, compared: bool) -> Iterator[str]:
    if new is None:
        yield "is in the baseline, but no kernel: write the baseline again if it is gone for good"
        return
    yield from _absolute(new, accepted_spill=old.spilled_bytes if old else 0)
    if old:
        yield from _relative(new, old)
    elif compared:
        yield "has no row in the baseline: write it with --write-baseline if it is as it should be"


def _absolute(row: Resources, accepted_spill: int) -> Iterator[str]:
    limit = TARGETS[row.target].block_shared_bytes
    if row.spilled_bytes > accepted_spill:
        yield f"spills registers, {row.spilled_bytes} bytes per thread"
    if row.products and not row.tensor_core:
        yield "no tensor-core instruction, although the source multiplies matrices"
    if row.block_moves and not row.copy_engine:
        yield "no copy-engine instruction, although the source moves blocks by descriptors"
    if row.shared_bytes > limit:
        yield f"shared memory of {row.shared_bytes} bytes is over the limit of {limit}, so it cannot be launched"
    elif not row.blocks:
        yield f"not one block fits a multiprocessor: too little of {row.limit}"


def _relative(new: Resources, old: Resources) -> Iterator[str]:
    for field, what in PATHS.items():
        if getattr(old, field) and not getattr(new, field):
            yield f"lost its {what}: {getattr(old, field)} instructions before, none now"
    if new.occupancy < old.occupancy:
        yield (
            f"occupancy fell from {old.occupancy:.2f} ({old.blocks} blocks) to {new.occupancy:.2f} ({new.blocks}), "
            f"for want of {new.limit}"
        )
    if abs(new.registers - old.registers) > REGISTERS:
        yield f"{new.registers} registers instead of {old.registers}, more than {REGISTERS} off"
    if abs(new.instructions - old.instructions) > INSTRUCTIONS * old.instructions:
        yield f"{new.instructions} instructions instead of {old.instructions}, more than {INSTRUCTIONS:.0%} off"


def _version(found: Mapping[Key, Resources]) -> str:
    (version,) = {row.triton for row in found.values()}
    return version
