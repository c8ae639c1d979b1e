"""What people see a step of a network called: in timelines, in passes over memory, and among kernel calls."""

from __future__ import annotations

from skipcost.unet_models.program import Op

LAYERS = {
    "up": "transposed convolution",
    "gate.x": "gate, map",
    "gate.signal": "gate, signal",
    "gate.psi": "gate, coefficients",
    "conv": "convolution",
    "project": "projection",
}
STEPS = {"pool": "max-pooling", "up_sample": "up-sampling", "crop": "crop"}
GATE = {"add": "gate, sum", "relu": "gate, sum", "sigmoid": "gate, coefficients", "multiply": "gate"}
JOINS = {"concat": "concatenation"}  # any other way to join goes by its own name


def moment_name(op: Op) -> str:
    """Name an op as timelines do: `x0_1: convolution 1`, `x1_0->x0_1: transposed convolution`, `head of x0_4`."""
    if op.kind in STEPS:
        what = STEPS[op.kind]
    elif op.kind == "join":
        what = JOINS.get(op.how, op.how)
    elif op.part == "gate":
        what = GATE[op.kind]
    else:
        what = f"convolution {int(op.part) + 1}" if op.part.isdecimal() else LAYERS.get(op.part, "")
    return f"{op.where}: {what}" if what else op.where
