"""What the optimizers and the gradient scaler of a training step make, on a tape.

Sources: PyTorch 2.13, torch/optim/adamw.py and sgd.py (single-tensor and foreach), torch/amp/grad_scaler.py.
"""

from __future__ import annotations

from skipcost.bench.memory.forward import LONG, Given, Setting
from skipcost.bench.memory.losses import SCALAR, scalar
from skipcost.bench.memory.tape import Tape, Value


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
        if not self.state:
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
        """Take one step; the first makes the state."""
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
