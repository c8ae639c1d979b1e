"""One step of a case as a program: forward pass, loss, backward pass and optimizer written on a tape.

`write` gives the program of a structure; `bench/subject.py` is what it follows: the same order, the same losses, the
same names let go of at the same places. It knows nothing of widths and image sizes: `liveness` puts the numbers in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipcost.bench.derivatives import (
    BOOL,
    FLOAT,
    LONG,
    Forward,
    Given,
    Setting,
    Weights,
    cast_to,
    make_weights,
    run_forward,
)
from skipcost.bench.schedule import CHANNELS, MAP, ONE, Call
from skipcost.bench.tape import Size, Tape, Value

SCALAR = Size(0, ONE, FLOAT, per_image=False)
AN_IMAGE = Size(0, ONE, FLOAT, per_image=True)


@dataclass(frozen=True, slots=True)
class Program:
    """What happens, without numbers: storages, events and moments as in `liveness.Timeline`."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: tuple[Size, ...]
    events: tuple[int, ...]
    moments: tuple[tuple[int, str], ...]
    steady_from: int


def _float(tape: Tape, value: Value) -> Value:
    return cast_to(tape, value, FLOAT)


def _like(value: Value) -> Callable[[Tape, Value, Value], Given]:
    def backward(tape: Tape, gradient: Value, kept: Value) -> Given:
        return (tape.result(value.size, (gradient, kept), kind="map gradient"),)

    return backward


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


def _scalar(tape: Tape, *reads: Value) -> Value:
    return tape.result(SCALAR, reads)


def _cross_entropy(tape: Tape, logits: Value, target: Value) -> Value:
    """Log-softmax, then the negative log-likelihood, which keeps the sum of its weights."""
    likelihood = _kept(tape, logits, "log-softmax")
    loss, total = tape.make(SCALAR), tape.make(SCALAR, "total weight", "map")
    tape.run((loss, total), (likelihood, target))

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(likelihood.size, (gradient, likelihood, target, total), kind="map gradient"),)

    return tape.differentiate(loss, (likelihood,), backward, (likelihood, target, total))


def _binary_cross_entropy_with_logits(tape: Tape, logits: Value, target: Value) -> Value:
    loss = _scalar(tape, logits, target)

    def backward(tape: Tape, gradient: Value) -> Given:
        probability = tape.result(logits.size, (logits,), kind="map gradient")
        if not tape.traced:  # the rest is done in place, unless a mode watches
            tape.hold(gradient, target)
            return (probability,)
        difference = tape.result(logits.size, (probability, target), kind="map gradient")
        return (tape.result(logits.size, (difference, gradient), kind="map gradient"),)

    return tape.differentiate(loss, (logits,), backward, (logits, target))


def _binary_cross_entropy(tape: Tape, probability: Value, target: Value) -> Value:
    loss = _scalar(tape, probability, target)

    def backward(tape: Tape, gradient: Value) -> Given:
        return (tape.result(probability.size, (gradient, probability, target), kind="map gradient"),)

    return tape.differentiate(loss, (probability,), backward, (probability, target))


def _sum(tape: Tape, x: Value) -> Value:
    """Sum of all elements; the gradient is one number, expanded."""
    total = _scalar(tape, x)

    def backward(_tape: Tape, gradient: Value) -> Given:
        return (Value(gradient.storage, x.size, dense=False),)

    return tape.differentiate(total, (x,), backward)


def _dice(tape: Tape, probability: Value, wanted: Value) -> Value:
    """1 - (2 sum(p w) + 1) / (sum p + sum w + 1), operator by operator."""
    product = tape.result(probability.size, (probability, wanted), kind="map")

    def of_product(tape: Tape, gradient: Value) -> Given:
        return (tape.result(probability.size, (gradient, wanted), kind="map gradient"),)

    product = tape.differentiate(product, (probability,), of_product, (wanted,))
    total = _sum(tape, product)
    doubled = _scalar(tape, total)

    def of_doubled(tape: Tape, gradient: Value) -> Given:
        return (_scalar(tape, gradient),)

    doubled = tape.differentiate(doubled, (total,), of_doubled)
    overlap = _alias(tape, _scalar(tape, doubled), doubled)
    found = _sum(tape, probability)
    both = _alias(tape, _scalar(tape, found, _scalar(tape, wanted)), found)
    below = _alias(tape, _scalar(tape, both), both)
    ratio = _scalar(tape, overlap, below)

    def of_ratio(tape: Tape, gradient: Value) -> Given:
        first = _scalar(tape, overlap, below)
        second = _scalar(tape, first, below)
        negative = _scalar(tape, gradient)
        of_below = _scalar(tape, negative, second)
        tape.hold(first, second, negative)
        return _scalar(tape, gradient, below), of_below

    ratio = tape.differentiate(ratio, (overlap, below), of_ratio, (overlap, below))
    loss = _scalar(tape, ratio)

    def of_loss(tape: Tape, gradient: Value) -> Given:
        return (_scalar(tape, gradient),)

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


def _loss_of_logits(tape: Tape, setting: Setting, outputs: list[Value], target: Value, *, one_class: bool) -> Value:
    losses = []
    for each in outputs:
        logits = _float(tape, each)
        losses.append(_from_logits(tape, setting, logits, target, one_class=one_class))
        tape.hold(logits)
    if len(losses) == 1:
        return losses[0]
    stacked = tape.result(Size(0, ONE, FLOAT * len(losses), per_image=False), losses)

    def unbound(_tape: Tape, gradient: Value) -> Given:
        return [Value(gradient.storage, SCALAR, dense=False) for _ in losses]

    total = _sum(tape, tape.differentiate(stacked, losses, unbound))
    tape.hold(*losses)
    return total


def _loss_of_probabilities(tape: Tape, setting: Setting, outputs: list[Value], scores: Value, target: Value) -> Value:
    """The classifier's cross-entropy, plus the sum of the maps' losses; a loop holds each map until it has the next."""
    most = tape.result(AN_IMAGE, (target,))
    above = tape.result(AN_IMAGE.typed(BOOL), (most,))
    tape.hold(most)
    has_organ = tape.result(AN_IMAGE.typed(LONG), (above,))
    logits = _float(tape, scores)
    loss = _cross_entropy(tape, logits, has_organ)
    tape.hold(logits)
    zero = total = _scalar(tape, loss)
    before: Value | None = None
    for each in outputs:
        probability = _clamp(tape, _float(tape, each))
        tape.hold(*([before] if before else []))
        before = probability
        measure = _dice if setting.loss == "dice" else _binary_cross_entropy
        part = measure(tape, probability, target)
        added = _scalar(tape, total, part)
        tape.hold(part)
        total = _both(tape, added, total, part)
    tape.hold(zero, *([before] if before else []))
    result = _both(tape, _scalar(tape, loss, total), loss, total)
    tape.hold(has_organ)
    return result


def _both(tape: Tape, result: Value, first: Value, second: Value) -> Value:
    def backward(_tape: Tape, gradient: Value) -> Given:
        return gradient, gradient

    return tape.differentiate(result, (first, second), backward)


class _Scaler:
    """A gradient scaler: scales the loss, then looks for infinities; taken to find none, so that every step counts."""

    def __init__(self, tape: Tape, setting: Setting) -> None:
        self.tape, self.at_work = tape, setting.scaled and not tape.traced
        self.state: list[Value] = []
        self.found: list[Value] = []

    def scale(self, loss: Value) -> Value:
        """Return the loss times the scale."""
        if not self.at_work:
            return loss
        if not self.state:
            self.state = [self.tape.result(SCALAR, (), f"scaler: {name}", "optimizer") for name in ("scale", "tracker")]
        scaled = _scalar(self.tape, loss, self.state[0])

        def backward(tape: Tape, gradient: Value) -> Given:
            return (_scalar(tape, gradient),)

        return self.tape.differentiate(scaled, (loss,), backward)

    def unscale(self) -> None:
        """Invert the scale in 64 bits, and look for infinities; what was found stays until `update`."""
        if self.at_work:
            double = self.tape.result(SCALAR.typed(LONG), self.state)
            inverse = self.tape.result(SCALAR.typed(LONG), (double,))
            single = _scalar(self.tape, inverse)
            zero = _scalar(self.tape)
            self.found = [_scalar(self.tape, zero)]
            copy = _scalar(self.tape, single)
            self.tape.hold(copy, single, zero)

    def update(self) -> None:
        """Let go of what was found."""
        self.tape.hold(*self.found)


class _Optimizer:
    """AdamW or SGD with momentum; on a GPU over all parameters at once ("foreach"), else one by one."""

    def __init__(self, tape: Tape, setting: Setting, parameters: list[Value]) -> None:
        self.tape, self.setting, self.parameters = tape, setting, parameters
        self.state: list[Value] = []

    def run(self) -> None:
        if not self.state:
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
                _scalar(tape)
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


def _training_step(
    run: Forward,
    calls: tuple[Call, ...],
    heads: tuple[tuple[int, ...], int | None, bool],
    given: list[Value],
    optimizer: _Optimizer,
    scaler: _Scaler,
) -> None:
    tape = run.tape
    outputs, class_logits, one_class = heads
    image, target = given
    tape.where = "gradients dropped"
    tape.hold(*tape.gradients.values())
    tape.gradients.clear()
    run.values, run.cached = [], []
    run_forward(run, calls, image)
    results = [run.values[each] for each in outputs]
    tape.where = "loss"
    if class_logits is None:
        loss = _loss_of_logits(tape, run.setting, results, target, one_class=one_class)
    else:
        loss = _loss_of_probabilities(tape, run.setting, results, run.values[class_logits], target)
        tape.hold(run.values[class_logits])
    tape.hold(*results)
    run.values = []
    scaled = scaler.scale(loss)
    tape.run_backward(scaled)
    tape.hold(scaled)
    tape.where = "optimizer"
    scaler.unscale()
    optimizer.run()
    scaler.update()
    tape.hold(loss)


def write(
    calls: tuple[Call, ...], heads: tuple[tuple[int, ...], int | None, bool], setting: Setting, *, traced: bool
) -> Program:
    """Write the program of one inference step or two training steps: the first makes the optimizer's state.

    heads: the calls whose results the network returns, the one with the class scores, and whether there is one class.
    """
    tape = Tape(traced=traced, replays_views=setting.autocast, recording=setting.training)
    weights: dict[int, Weights] = {}
    present: list[Value] = []
    for row, call in enumerate(calls):
        if call.op == "conv":
            weights[row], buffers = make_weights(tape, setting, row, call)
            present += buffers
    ordered = sorted(weights.values(), key=lambda each: each.place)
    parameters = [value for each in ordered for value in each.present()]
    image = tape.make(Size(0, MAP, setting.item, per_image=True), "image", "input")
    present = [*parameters, *present, image]
    run = Forward(tape, setting, weights)
    if setting.training:
        one_class = heads[2]
        size = Size(len(calls), MAP, FLOAT if one_class else LONG, per_image=True)
        target = tape.make(size, "target", "input")
        present.append(target)
    tape.where = "before the step"
    tape.run(present)
    boundaries = [len(tape.lines)]
    if setting.training:
        optimizer, scaler = _Optimizer(tape, setting, parameters), _Scaler(tape, setting)
        for _ in range(2):
            _training_step(run, calls, heads, [image, target], optimizer, scaler)
            boundaries.append(len(tape.lines))
    else:
        run_forward(run, calls, image)
        tape.hold(*(run.values[each] for each in heads[0]))
    return _program(tape, present, boundaries[1] if setting.training else boundaries[0])


def _program(tape: Tape, present: list[Value], steady: int) -> Program:
    """Lay the tape's lines out as events; what is there before the first step, and gradients of the last, stay."""
    lasting = {value.storage for value in (*present, *tape.gradients.values())}
    lasting |= {index for index, kind in enumerate(tape.kinds) if kind == "optimizer"}
    ends, steady_from = tape.lives(), 0
    events: list[int] = []
    moments: list[tuple[int, str]] = []
    for index, (line, ending) in enumerate(zip(tape.lines, ends, strict=True)):
        if index == steady:
            steady_from = len(events)
        if not moments or moments[-1][1] != line.where or index == steady:
            moments.append((len(events), line.where))
        events += [storage + 1 for storage in line.makes]
        events += [-(storage + 1) for storage in ending if storage not in lasting]
    return Program(tuple(tape.names), tuple(tape.kinds), tuple(tape.sizes), tuple(events), tuple(moments), steady_from)
