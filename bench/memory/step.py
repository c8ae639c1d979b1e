"""One step of a case as events: forward pass, loss, backward pass and optimizer written on a tape.

`write` gives the events of a structure; `bench/measure/subject.py` is what it follows: the same order, the same
losses, the same names let go of at the same places. It knows nothing of widths and image sizes: `liveness` puts the
numbers in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from skipcost.bench.memory.calls import MAP, OWNERS, Call
from skipcost.bench.memory.derivatives import run_forward
from skipcost.bench.memory.forward import FLOAT, LONG, Forward, Setting, Weights, make_weights
from skipcost.bench.memory.losses import loss_of_logits, loss_of_probabilities
from skipcost.bench.memory.optimizers import Optimizer, Scaler
from skipcost.bench.memory.tape import Size, Tape, Value


class Structure(NamedTuple):
    """All that decides what happens, and no numbers: cases that share it share their events.

    `logits` and `class_logits` are the calls whose results the network returns; `one_class` says what targets are.
    """

    calls: tuple[Call, ...]
    logits: tuple[int, ...]
    class_logits: int | None
    one_class: bool
    setting: Setting


@dataclass(frozen=True, slots=True)
class Events:
    """What happens, without numbers: storages, events and moments as in `liveness.Timeline`."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: tuple[Size, ...]
    events: tuple[int, ...]
    moments: tuple[tuple[int, str], ...]
    steady_from: int


def write(structure: Structure, *, traced: bool) -> Events:
    """Write the events of one inference step, or of two where the first makes what stays.

    That is the optimizer's state in training, composed weights at inference.
    """
    calls, setting = structure.calls, structure.setting
    tape = Tape(traced=traced, replays_views=setting.autocast, recording=setting.training)
    weights: dict[int, Weights] = {}
    buffers: list[Value] = []
    for row, call in enumerate(calls):
        if call.op in OWNERS:
            weights[row], made = make_weights(tape, setting, row, call)
            buffers += made
    ordered = sorted(weights.values(), key=lambda each: each.place)
    parameters = [value for each in ordered for value in each.present()]
    inputs = [tape.make(Size(0, MAP, setting.item, per_image=True), "image", "input")]
    if setting.training:
        item = FLOAT if structure.one_class else LONG
        inputs.append(tape.make(Size(len(calls), MAP, item, per_image=True), "target", "input"))
    present = [*parameters, *buffers, *inputs]
    tape.where = "before the step"
    tape.run(present)
    run = Forward(tape, setting, weights)
    steady = len(tape.lines)
    if setting.training:
        optimizer, scaler = Optimizer(tape, setting, parameters), Scaler(tape, setting)
        _training_step(run, structure, inputs, (optimizer, scaler))
        steady = len(tape.lines)
        _training_step(run, structure, inputs, (optimizer, scaler))
    else:
        _inference_step(run, structure, inputs[0])
        if run.kept:
            steady = len(tape.lines)
            _inference_step(run, structure, inputs[0])
    kept = [value for made in run.kept.values() for value in made]
    return _events(tape, [*present, *kept], steady)


def _inference_step(run: Forward, structure: Structure, image: Value) -> None:
    run_forward(run, structure.calls, image)
    scores = () if structure.class_logits is None else (structure.class_logits,)
    run.tape.hold(*(run.values[each] for each in (*structure.logits, *scores)))


def _training_step(run: Forward, structure: Structure, inputs: list[Value], after: tuple[Optimizer, Scaler]) -> None:
    tape = run.tape
    image, target = inputs
    optimizer, scaler = after
    tape.where = "gradients dropped"
    tape.hold(*tape.gradients.values())
    tape.gradients.clear()
    run_forward(run, structure.calls, image)
    outputs = [run.values[each] for each in structure.logits]
    tape.where = "loss"
    if structure.class_logits is None:
        loss = loss_of_logits(tape, run.setting, outputs, target, one_class=structure.one_class)
    else:
        scores = run.values[structure.class_logits]
        loss = loss_of_probabilities(tape, run.setting, outputs, scores, target)
        outputs.append(scores)
    tape.hold(*outputs)
    scaled = scaler.scale(loss)
    tape.run_backward(scaled)
    tape.hold(scaled)
    tape.where = "optimizer"
    scaler.unscale()
    optimizer.run()
    scaler.update()
    tape.hold(loss)


def _events(tape: Tape, staying: list[Value], steady: int) -> Events:
    """Lay the tape's lines out as events; of gradients those of the last step stay."""
    lasting = {value.storage for value in (*staying, *tape.gradients.values())}
    lasting |= {index for index, kind in enumerate(tape.kinds) if kind == "optimizer"}
    ends, steady_from = tape.ends(), 0
    events: list[int] = []
    moments: list[tuple[int, str]] = []
    for index, (line, ending) in enumerate(zip(tape.lines, ends, strict=True)):
        if index == steady:
            steady_from = len(events)
        if not moments or moments[-1][1] != line.where or index == steady:
            moments.append((len(events), line.where))
        events += [storage + 1 for storage in line.makes]
        events += [-(storage + 1) for storage in ending if storage not in lasting]
    kept = [
        moment for moment, after in zip(moments, [*moments[1:], None], strict=True) if not after or after[0] > moment[0]
    ]
    return Events(tuple(tape.names), tuple(tape.kinds), tuple(tape.sizes), tuple(events), tuple(kept), steady_from)
