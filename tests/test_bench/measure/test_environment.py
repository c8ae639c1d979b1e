"""The environment of a run: whatever changes a number is in its fingerprint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import skipcost.bench
from skipcost.bench.measure import environment
from skipcost.bench.measure.environment import FLAGS, PACKAGES, describe, fingerprint, flags

FACTS = describe()
APART = {"fingerprint", "host", "commit", "dirty"}  # what tells runs apart and changes no number


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_another_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set to one value, to another, and not at all: three fingerprints."""
    seen = set()
    for value in (None, "0", "1"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        seen.add(fingerprint({**FACTS, "flags": flags()}))

    assert len(seen) == 3


def test_every_name_of_the_gpus_allocator_counts() -> None:
    """PyTorch reads its settings under three names, and only it knows which of them wins."""
    names = {f"PYTORCH_{device}ALLOC_CONF" for device in ("", "CUDA_", "HIP_")}

    assert names <= set(FLAGS)


@pytest.mark.parametrize("name", [name for name in FACTS if name not in APART])
def test_every_fact_is_in_the_fingerprint(name: str) -> None:
    """Machine, versions, flags and code."""
    plain = {key: value for key, value in FACTS.items() if key not in APART}

    assert fingerprint(plain) == FACTS["fingerprint"]
    assert fingerprint(plain | {name: "another"}) != FACTS["fingerprint"]


def test_a_flag_is_read_when_the_environment_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the module was imported."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    found = describe()

    assert found["flags"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["fingerprint"] != FACTS["fingerprint"]


def test_names_are_listed_once() -> None:
    """A flag or package that stands twice would be edited in one place only."""
    assert len(set(FLAGS)) == len(FLAGS)
    assert len(set(PACKAGES)) == len(PACKAGES)


def test_a_changed_file_of_the_suite_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies under the packages that make numbers; what a sweep asks for is in its cases instead."""
    names = ("a.py", "inner/b.py", "devices.toml", "configs/sm90.json", "sweeps/quick.toml")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(skipcost.bench, "__path__", [str(tmp_path)])
    seen = {environment.code_hash()}

    for name in names:
        (tmp_path / name).write_text("2")
        seen.add(environment.code_hash())

    assert len(seen) == 1 + len(names) - 1
    assert all(re.fullmatch("[0-9a-f]{12}", each) for each in seen)
