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


def call_name(op: Op) -> str:
    """Name an op as lists of kernel calls do: `x0_1.0`, `x1_0->x0_1` for an edge's own, `x0_0->x0_1.gate.psi`."""
    return op.where if op.part in ("", "up", "conv") else f"{op.where}.{op.part}"


OWNERS = {
    "gate.x": ": gate: map",
    "gate.signal": ": gate: signal",
    "gate.psi": ": gate: psi",
    "gate": ": gate",
    "project": ": projection",
}
PASSES = {
    "conv": "convolution",
    "up_conv": "transposed convolution",
    "up_sample": "up-sampling",
    "add": "sum",
    "amax": "maximum",
}


def pass_name(op: Op) -> str:
    """Name an op as passes over memory do: `x0_1: norm 2`, `x0_0->x0_1: gate: psi: norm`, `head of x0_4: mask`."""
    owner = op.where + OWNERS.get(op.part, "")
    if op.kind == "crop":
        return owner
    if op.kind == "join":
        return f"{owner}: {JOINS.get(op.how, op.how)}"
    number = f" {int(op.part) + 1}" if op.part.isdecimal() else ""
    what = "product" if op.part == "gate" else "mask"
    return f"{owner}: {what if op.kind == 'multiply' else PASSES.get(op.kind, op.kind)}{number}"


def map_name(op: Op) -> str:
    """Name a map that several ops read: a node's by the node's name."""
    if op.kind == "crop":
        return f"{op.where}: gate's map"
    return f"{op.where}: up-sampled" if op.part in ("up", "resample") else op.where
