"""One step of a case as events: forward pass, loss, backward pass and optimizer written on a tape.

`write` gives the events of a structure; `bench/measure/subject.py` is what it follows: the same order, the same
losses, the same names let go of at the same places. It knows nothing of widths and image sizes: `liveness` puts the
numbers in.

Sources of optimizers and scaler: PyTorch 2.13, torch/optim/adamw.py and sgd.py (single-tensor and foreach),
torch/amp/grad_scaler.py.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skipcost.bench.memory.operators import OPERATORS
from skipcost.bench.memory.schedule import OWNERS, Call
from skipcost.bench.memory.tap_operators import TAP_OPERATORS
from skipcost.bench.memory.tape import (
    BOOL,
    CHANNELS,
    FLOAT,
    LONG,
    MAP,
    ONE,
    Forward,
    Given,
    Setting,
    Size,
    Tape,
    Value,
    cast_to,
    make_weights,
)

ALL_OPERATORS = ChainMap(OPERATORS, TAP_OPERATORS)
SCALAR = Size(0, ONE, FLOAT, per_image=False)
AN_IMAGE = Size(0, ONE, FLOAT, per_image=True)


def scalar(tape: Tape, *reads: Value) -> Value:
    """Record an operator whose result is one number in 32 bits."""
    return tape.result(SCALAR, reads)


def _float(tape: Tape, value: Value) -> Value:
    return cast_to(tape, value, FLOAT)


def _kept(tape: Tape, x: Value, name: str) -> Value:
    """An operator whose result is of its input's size and is all that its gradient needs (softmax, sigmoid)."""
    result = tape.result(x.size, (x,), name, "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(x.size, (gradient, result), name, "map gradient"),)

    return tape.differentiate(result, (x,), backward, (result,))


def _alias(tape: Tape, result: Value, x: Value) -> Value:
    """An operator on a number whose gradient is the gradient itself."""

    def backward(_tape: Tape, gradient: Value) -> Given:
        return (gradient,)

    return tape.differentiate(result, (x,), backward)


def _both(tape: Tape, result: Value, first: Value, second: Value) -> Value:
    def backward(_tape: Tape, gradient: Value) -> Given:
        return gradient, gradient

    return tape.differentiate(result, (first, second), backward)


def _cross_entropy(tape: Tape, logits: Value, target: Value) -> Value:
    """Log-softmax, then the negative log-likelihood, which keeps the sum of its weights."""
    likelihood = _kept(tape, logits, "log-softmax")
    loss, total = tape.make(SCALAR), tape.make(SCALAR, "total weight", "map")
    tape.run((loss, total), (likelihood, target))

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(likelihood.size, (gradient, likelihood, target, total), kind="map gradient"),)

    return tape.differentiate(loss, (likelihood,), backward, (likelihood, target, total))


def _binary_cross_entropy_with_logits(tape: Tape, logits: Value, target: Value) -> Value:
    loss = scalar(tape, logits, target)

    def backward(tape: Tape, gradient: Value) -> Given:
        probability = tape.result(logits.size, (logits,), kind="map gradient")
        if not tape.traced:  # the rest is done in place, unless a mode watches
            tape.hold(gradient, target)
            return (probability,)
        difference = tape.result(logits.size, (probability, target), kind="map gradient")
        return (tape.result(logits.size, (difference, gradient), kind="map gradient"),)

    return tape.differentiate(loss, (logits,), backward, (logits, target))


def _binary_cross_entropy(tape: Tape, probability: Value, target: Value) -> Value:
    """The mean of the elements' losses; it stays in their storage, which the meta device does not know."""
    loss = tape.result(SCALAR if tape.traced else probability.size, (probability, target))

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(probability.size, (gradient, probability, target), kind="map gradient"),)

    return tape.differentiate(loss, (probability,), backward, (probability, target))


def _sum(tape: Tape, x: Value) -> Value:
    """Sum of all elements; the gradient is one number, expanded."""
    total = scalar(tape, x)

    def backward(_tape: Tape, gradient: Value) -> Given:
        return (Value(gradient.storage, x.size, whole=False),)

    return tape.differentiate(total, (x,), backward)


def _dice(tape: Tape, probability: Value, wanted: Value) -> Value:
    """1 - (2 sum(p w) + 1) / (sum p + sum w + 1), operator by operator."""
    product = tape.result(probability.size, (probability, wanted), kind="map")

    def of_product(tape: Tape, gradient: Value) -> Given:
        return (tape.result(probability.size, (gradient, wanted), kind="map gradient"),)

    product = tape.differentiate(product, (probability,), of_product, (wanted,))
    total = _sum(tape, product)
    doubled = scalar(tape, total)

    def of_doubled(tape: Tape, gradient: Value) -> Given:
        return (scalar(tape, gradient),)

    doubled = tape.differentiate(doubled, (total,), of_doubled)
    overlap = _alias(tape, scalar(tape, doubled), doubled)
    found = _sum(tape, probability)
    both = _alias(tape, scalar(tape, found, scalar(tape, wanted)), found)
    below = _alias(tape, scalar(tape, both), both)
    ratio = scalar(tape, overlap, below)

    def of_ratio(tape: Tape, gradient: Value) -> Given:
        first = scalar(tape, overlap, below)
        second = scalar(tape, first, below)
        negative = scalar(tape, gradient)
        of_below = scalar(tape, negative, second)
        tape.hold(first, second, negative)
        return scalar(tape, gradient, below), of_below

    ratio = tape.differentiate(ratio, (overlap, below), of_ratio, (overlap, below))
    loss = scalar(tape, ratio)

    def of_loss(tape: Tape, gradient: Value) -> Given:
        return (scalar(tape, gradient),)

    return tape.differentiate(loss, (ratio,), of_loss)


def _one_hot(tape: Tape, setting: Setting, logits: Value, target: Value) -> Value:
    """Classes as 0 and 1 in 32 bits, by way of 64; what is traced compares, what runs scatters."""
    whole = logits.size.typed(LONG)
    if tape.traced:
        numbers = tape.result(Size(whole.row, CHANNELS, LONG, per_image=False), ())
        equal = tape.result(whole.typed(BOOL), (target, numbers))
        found = tape.result(whole, (equal,))
        tape.hold(numbers)
    else:
        if setting.device == "cpu":  # looks whether the classes are in range
            tape.run([tape.make(SCALAR.typed(LONG)) for _ in range(2)], (target,))
        found = tape.result(whole, (target,))
    return tape.result(logits.size.typed(FLOAT), (found,), "wanted", "map")


def _clamp(tape: Tape, x: Value) -> Value:
    """Clamp; the gradient passes where the value was inside."""
    result = tape.result(x.size, (x,), "probability", "map")

    def backward(tape: Tape, gradient: Value) -> Given:
        zero = tape.result(SCALAR, ())
        least = tape.result(x.size.typed(BOOL), (x,))
        most = tape.result(x.size.typed(BOOL), (x,))
        given = tape.result(x.size, (least, gradient, zero), kind="map gradient")
        tape.hold(zero, least, most)
        return (given,)

    return tape.differentiate(result, (x,), backward, (x,))


def _from_logits(tape: Tape, setting: Setting, logits: Value, target: Value, *, one_class: bool) -> Value:
    if one_class and setting.loss == "dice":
        return _dice(tape, _kept(tape, logits, "probability"), target)
    if one_class:
        return _binary_cross_entropy_with_logits(tape, logits, target)
    if setting.loss == "dice":
        wanted = _one_hot(tape, setting, logits, target)
        loss = _dice(tape, _kept(tape, logits, "probability"), wanted)
        tape.hold(wanted)
        return loss
    return _cross_entropy(tape, logits, target)


def loss_of_logits(tape: Tape, setting: Setting, outputs: list[Value], target: Value, *, one_class: bool) -> Value:
    """Sum the loss over all heads, in 32 bits; a head's copy in 32 bits lives until its loss is known."""
    losses = []
    for each in outputs:
        logits = _float(tape, each)
        losses.append(_from_logits(tape, setting, logits, target, one_class=one_class))
        tape.hold(logits)
    if len(losses) == 1:
        return losses[0]
    stacked = tape.result(Size(0, ONE, FLOAT * len(losses), per_image=False), losses)

    def unbound(_tape: Tape, gradient: Value) -> Given:
        return [Value(gradient.storage, SCALAR, whole=False) for _ in losses]

    total = _sum(tape, tape.differentiate(stacked, losses, unbound))
    tape.hold(*losses)
    return total


def loss_of_probabilities(tape: Tape, setting: Setting, outputs: list[Value], scores: Value, target: Value) -> Value:
    """The classifier's cross-entropy, plus the sum of the maps' losses; a loop holds each map until it has the next."""
    most = tape.result(AN_IMAGE, (target,))
    above = tape.result(AN_IMAGE.typed(BOOL), (most,))
    tape.hold(most)
    has_organ = tape.result(AN_IMAGE.typed(LONG), (above,))
    logits = _float(tape, scores)
    loss = _cross_entropy(tape, logits, has_organ)
    tape.hold(logits)
    zero = total = scalar(tape, loss)
    before: Value | None = None
    for each in outputs:
        probability = _clamp(tape, _float(tape, each))
        tape.hold(*([before] if before else []))
        before = probability
        measure = _dice if setting.loss == "dice" else _binary_cross_entropy
        part = measure(tape, probability, target)
        added = scalar(tape, total, part)
        tape.hold(part)
        total = _both(tape, added, total, part)
    tape.hold(zero, *([before] if before else []))
    result = _both(tape, scalar(tape, loss, total), loss, total)
    tape.hold(has_organ)
    return result


class Scaler:
    """A gradient scaler: scales the loss, then looks for infinities; taken to find none, so that every step counts."""

    def __init__(self, tape: Tape, setting: Setting) -> None:
        self.tape, self.at_work = tape, setting.scaled and not tape.traced
        self.state: list[Value] = []
        self.found: list[Value] = []

    def scale(self, loss: Value) -> Value:
        """Return the loss times the scale."""
        if not self.at_work:
            return loss
        self.state = [self.tape.result(SCALAR, (), f"scaler: {name}", "optimizer") for name in ("scale", "tracker")]
        scaled = scalar(self.tape, loss, self.state[0])

        def backward(tape: Tape, gradient: Value) -> Given:
            return (scalar(tape, gradient),)

        return self.tape.differentiate(scaled, (loss,), backward)

    def unscale(self) -> None:
        """Invert the scale in 64 bits, and look for infinities; what was found stays until `update`."""
        if self.at_work:
            double = self.tape.result(SCALAR.typed(LONG), self.state)
            inverse = self.tape.result(SCALAR.typed(LONG), (double,))
            single = scalar(self.tape, inverse)
            zero = scalar(self.tape)
            self.found = [scalar(self.tape, zero)]
            copy = scalar(self.tape, single)
            self.tape.hold(copy, single, zero)

    def update(self) -> None:
        """Let go of what was found."""
        self.tape.hold(*self.found)


class Optimizer:
    """AdamW or SGD with momentum; on a GPU over all parameters at once ("foreach"), else one by one."""

    def __init__(self, tape: Tape, setting: Setting, parameters: list[Value]) -> None:
        self.tape, self.setting, self.parameters = tape, setting, parameters
        self.state: list[Value] = []

    def run(self) -> None:
        """Make the state, and take the first step."""
        self._make_state()
        if self.setting.optimizer == "adamw":
            self._denominators()

    def _make_state(self) -> None:
        tape = self.tape
        momenta = ("momentum",) if self.setting.optimizer == "sgd" else ("first moment", "second moment")
        counted = self.setting.optimizer == "adamw" and (tape.traced or self.setting.device == "cpu")
        for each in self.parameters:
            name = tape.names[each.storage]
            if counted:  # on the host even where the parameters are on a GPU
                self.state.append(tape.result(SCALAR, (), f"{name}: steps", "optimizer"))
            for momentum in momenta:
                self.state.append(tape.result(each.size, (each,), f"{name}: {momentum}", "optimizer"))

    def _denominators(self) -> None:
        """Roots of the second moments, over which the update is divided."""
        tape = self.tape
        if self.setting.device == "cuda":
            if tape.traced:
                scalar(tape)
            roots = [tape.make(each.size) for each in self.parameters]
            tape.run(roots, self.state)
            tape.hold(*roots)
            return
        before: Value | None = None
        for each in self.parameters:
            root = tape.result(each.size, (each,))
            divided = tape.result(each.size, (root,))
            tape.hold(*([before] if before else []))
            before = divided
        tape.hold(*([before] if before else []))


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
    events: NDArray[np.int64]
    moments: tuple[tuple[int, str], ...]
    steady_from: int


def run_forward(run: Forward, calls: tuple[Call, ...], image: Value) -> None:
    """Run the calls; their results, one a call, are in `run.values` after it."""
    run.values, run.cached = [image], []
    for row, call in enumerate(calls[1:], 1):
        reads = [run.values[index] for index in call.reads]
        run.tape.where = call.where or run.tape.where
        if call.op == "hold":
            run.tape.hold(*reads)
            run.values.append(reads[0])
        else:
            run.values.append(ALL_OPERATORS[call.op](run, row, call, *reads))
    run.tape.hold(*run.cached)  # autocast's cache is emptied when it ends


def write(structure: Structure, *, traced: bool) -> Events:
    """Write the events of one inference step, or of two where the first makes what stays.

    That is the optimizer's state in training, whose second step is the first one again, and composed weights at
    inference.
    """
    setting = structure.setting
    tape = Tape(traced=traced, replays_views=setting.autocast, recording=setting.training)
    run, buffers = Forward(tape, setting, {}), list[Value]()
    for row, call in enumerate(structure.calls):
        if call.op in OWNERS:
            run.weights[row], made = make_weights(tape, setting, row, call)
            buffers += made
    ordered = sorted(run.weights.values(), key=lambda each: each.place)
    parameters = [value for each in ordered for value in each.present()]
    inputs = _inputs(tape, structure)
    present = [*parameters, *buffers, *inputs]
    tape.where = "before the step"
    tape.run(present)
    begin = steady = tape.lines
    if setting.training:
        first, optimizer, scaler = len(tape.ends), Optimizer(tape, setting, parameters), Scaler(tape, setting)
        _training_step(run, structure, inputs, (optimizer, scaler))
        steady = tape.lines
        tape.again(begin, first)
        present += [*optimizer.state, *scaler.state]
    else:
        _inference_step(run, structure, inputs[0])
        if run.kept:
            steady = tape.lines
            _inference_step(run, structure, inputs[0])
    kept = [value for made in run.kept.values() for value in made]
    return _events(tape, [*present, *kept], steady)


def _inputs(tape: Tape, structure: Structure) -> list[Value]:
    """Make the image, and in training the target."""
    setting = structure.setting
    made = [tape.make(Size(0, MAP, setting.item, per_image=True), "image", "input")]
    if setting.training:
        item = FLOAT if structure.one_class else LONG
        made.append(tape.make(Size(len(structure.calls), MAP, item, per_image=True), "target", "input"))
    return made


def _inference_step(run: Forward, structure: Structure, image: Value) -> None:
    run_forward(run, structure.calls, image)
    scores = () if structure.class_logits is None else (structure.class_logits,)
    run.tape.hold(*(run.values[each] for each in (*structure.logits, *scores)))


def _training_step(run: Forward, structure: Structure, inputs: list[Value], after: tuple[Optimizer, Scaler]) -> None:
    tape = run.tape
    image, target = inputs
    optimizer, scaler = after
    tape.where = "gradients dropped"
    tape.hold()  # in the first step there are none
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
    """Lay the tape's lines out as events, what a line makes before what it ends; of gradients the last step's stay."""
    lasting = np.zeros(len(tape.ends), dtype=bool)
    lasting[[value.storage for value in (*staying, *tape.gradients.values())]] = True
    made = np.array(tape.made, dtype=np.int64)
    ending = made[~lasting[made]]
    lines = np.concatenate([2 * np.array(tape.begins), 2 * np.array(tape.ends)[ending] + 1])
    order = np.argsort(lines, kind="stable")
    events = np.concatenate([made + 1, -1 - ending])[order]
    starts = np.searchsorted(lines[order], [2 * line for line, _ in tape.moments]).tolist()
    ends = [*starts[1:], len(events) + 1]
    moments = [(at, where) for at, then, (_, where) in zip(starts, ends, tape.moments, strict=True) if then > at]
    steady_from = int(np.searchsorted(lines[order], 2 * steady))
    return Events(tuple(tape.names), tuple(tape.kinds), tuple(tape.sizes), events, tuple(moments), steady_from)
