"""Count the instructions that the suite's own Python takes: one process of one revision, under valgrind's callgrind.

Run as a script, by path: the script is this version's, what it imports is the revision's. It prints one JSON value.
What a network computes is left out: forward passes run on the meta device, so that what is counted is the executor and
PyTorch's dispatch, which do not depend on the processor's vector units.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

Call = Callable[[], object]
WARM = 3  # calls: the first ones import, fill caches and specialise bytecode


def _forward(label: str) -> Call:
    import torch  # noqa: PLC0415 - imported once, by the process that counts

    from skipcost.unet_models import ModelSpec, build  # noqa: PLC0415 - the revision's

    with torch.device("meta"):
        network, image = build(ModelSpec.parse(label)).eval(), torch.empty(1, 1, 16, 16)

    def call() -> object:
        with torch.inference_mode():
            return network(image)

    return call


def _count(label: str) -> Call:
    from skipcost.bench.cases import Case  # noqa: PLC0415 - the revision's

    text = json.dumps({"label": label, "mode": "training", "batch": 8})

    def call() -> object:
        case = Case.from_json(text)
        graph = case.graph()
        return case.case_id, graph.params(), graph.conv_macs(case.height, case.width), graph.receptive_field()

    return call


def _predict(label: str) -> Call:
    from skipcost.bench.cases import Case  # noqa: PLC0415 - the revision's
    from skipcost.bench.lifetimes import predicted  # noqa: PLC0415

    case = Case.from_json(json.dumps({"label": label, "mode": "training", "batch": 8}))
    return lambda: predicted(case)


@dataclass(frozen=True, slots=True)
class Subject:
    """What makes the call that is counted, and the relative change up to which equal code may differ (docs/method.md).

    A short call depends most on what the process did before it: where memory is, what the interpreter has specialised.
    """

    make: Callable[[], Call]
    tolerance: float


SUBJECTS = {
    "forward unet/d4": Subject(partial(_forward, "unet/d4/w4/concat"), 0.005),
    "forward unet++/d4": Subject(partial(_forward, "unet++/d4/w4/concat"), 0.005),
    "forward unet3+/d4": Subject(partial(_forward, "unet3+/d4/w4/concat"), 0.005),
    "a case's arithmetic": Subject(partial(_count, "unet3+/d4/w32/concat"), 0.03),
    "a case's predicted bytes": Subject(partial(_predict, "unet3+/d4/w32/concat"), 0.01),
}


def prepared() -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that this revision can make, and why it cannot make the others."""
    calls, failed = {}, {}
    for name, subject in SUBJECTS.items():
        try:
            calls[name] = subject.make()
            calls[name]()
        except Exception as error:  # noqa: BLE001 - whatever another revision raises is its answer
            calls.pop(name, None)
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return calls, failed


def turns() -> Iterator[Call]:
    """Yield a warm-up of all, as the timer calls its statement once unseen, then each call for a profile of its own.

    One process counts them all, because importing torch under callgrind takes longer than everything else.
    """
    calls, _ = prepared()

    def warm_up() -> None:
        for call in calls.values():
            for _ in range(WARM):
                call()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in one of the calls would be most of what it counts

    return itertools.chain((warm_up,), calls.values())


def count() -> dict[str, dict[str, object]]:
    """Count each subject: {"instructions": by name, "failed": by name, why}."""
    from torch.utils.benchmark import Timer  # noqa: PLC0415 - see above

    calls, failed = prepared()
    found: dict[str, object] = {}
    if calls:
        # The timer's process is another one, which loads this file by its path.
        timer = Timer("next(turns)()", f"import runpy; turns = runpy.run_path({__file__!r})['turns']()")
        profiles = timer.collect_callgrind(1, repeats=len(calls), collect_baseline=False, retain_out_file=False)
        found = {name: each.counts() for name, each in zip(calls, profiles, strict=True)}
    return {"instructions": found, "failed": dict(failed)}


if __name__ == "__main__":
    reply = os.dup(1)
    os.dup2(2, 1)  # what anything prints must not end up in the answer
    try:
        answer: dict[str, object] = dict(count())
    except OSError as error:  # what the timer raises where valgrind fails
        answer = {"error": " ".join(str(error).split())[-400:]}
    os.write(reply, json.dumps(answer).encode())
