"""What tests of every package may ask for."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import settings
from interpreter import pytest_runtest_logreport, pytest_runtest_protocol  # noqa: F401 - hooks of pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import kernel_checks  # noqa: F401 - makes the interpreter compute as a GPU does, or fails

# A shared machine may stall any example for seconds: an example has no deadline, the whole run has CI's.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Draw the same numbers in a test, whichever tests ran before it and in whichever process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(autouse=True, scope="session")
def no_rows_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody measured on this machine decides what runs here; not in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPCOST_KERNELS", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(autouse=True, scope="module")
def young_heap() -> None:
    """Hide what is there before a file's first test from the garbage collector, for good.

    Every test and module that pytest collected is 600,000 objects and a second a collection, and the suite collects
    before each measurement. What a file makes itself is collected as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch's operators on one thread: small maps are slower on more, and sums could change their order."""
    import torch  # noqa: PLC0415 - tests of what needs no torch do not load it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def all_low(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Foretell tap-first wherever it can be: networks small enough for tests would mostly be left as they are."""
    from dataclasses import replace  # noqa: PLC0415 - with what follows, numpy

    from skipcost.bench.memory import liveness  # noqa: PLC0415
    from skipcost.kernels.dispatch.low_resolution import choose  # noqa: PLC0415

    monkeypatch.setattr(liveness, "choose", lambda *call, **given: replace(choose(*call, **given), taken=True))
    liveness._taken.cache_clear()
    yield
    liveness._taken.cache_clear()
