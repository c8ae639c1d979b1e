"""The losses of a training step on a tape, as `bench/measure/subject.py` writes them and in its order."""

from __future__ import annotations

from skipcost.bench.memory.calls import CHANNELS, ONE
from skipcost.bench.memory.forward import BOOL, FLOAT, LONG, Given, Setting, cast_to
from skipcost.bench.memory.tape import Size, Tape, Value

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
