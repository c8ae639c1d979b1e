"""Functions that do jobs in processes of their own, well and badly; `test_kernels_jobs.py` names them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from skipcost.bench.errors import LostDeviceError

Parts = Sequence[dict[str, Any]]


def work(what: dict[str, Any], parts: Parts) -> Iterator[dict[str, Any]]:
    """Do to each part what its `do` says."""
    for part in parts:
        if part["do"] == "die":
            os.abort()
        if part["do"] == "exit":
            sys.stderr.write("first words\nlast words\n")
            sys.stderr.flush()
            os._exit(3)
        if part["do"] == "hang":
            time.sleep(600)
        if part["do"] == "sleep":
            time.sleep(0.3)
        if part["do"] == "print":
            print("in the way of the rows")  # noqa: T201 - the point
        if part["do"] == "raise":
            message = "no such thing"
            raise RuntimeError(message)
        yield {"outcome": "ok", "what": what["name"], "process": os.getpid()}
        if part["do"] == "lose":
            raise LostDeviceError
