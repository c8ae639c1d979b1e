#!/usr/bin/env bash
# PyTorch 2.13.0, Python 3.11: once a torch.compile backend has failed in a process, every later call of a Python function
# holds on to its arguments until it returns, compiled or not, and memory of eager code can peak higher.
#
# Python hands the arguments of a call over to the function: `del x` inside it, or a new value for x, frees a tensor that
# nobody else has. Behind a compile that worked that is still so. Behind one whose backend raised, and whose exception was
# caught, the caller keeps the tensor until the call is over, in all code of the process: TorchDynamo's hook on frames has
# stayed in the interpreter. torch._dynamo.reset() does not take it away, nor does another compile that works, and
# torch._C._dynamo.eval_frame.get_eval_frame_callback() says None. A network whose layers let go of a map before the next one
# is made holds one map more. skipcost's joined layers take their maps out of a list, which no caller holds
# (kernels/rewriting/low.py).
#
# Exits 0 where the behaviour is as described, 1 where it differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import platform
import sys
import weakref

import torch

print("Python", platform.python_version(), "torch", torch.__version__)
MIB = 2**20


def held_after_del(x):
    known = weakref.ref(x)
    del x
    return known() is not None


def held():
    return [held_after_del(torch.empty(MIB)) for _ in range(50)][-1]


def compiled(backend):
    torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))


def fails(_graph, _examples):
    raise ValueError("as it happens")


found = {"before": held()}
compiled("eager")
found["behind a compile"] = held()
try:
    compiled(fails)
except torch._dynamo.exc.BackendCompilerFailed:
    pass
found["behind one that failed"] = held()
torch._dynamo.reset()
found["reset"] = held()
compiled("eager")
found["behind another compile"] = held()
expected = [False, False, True, True, True]
for name, value in found.items():
    print(f"{name:24} the caller holds the argument: {value}")
print("callback:", torch._C._dynamo.eval_frame.get_eval_frame_callback())
sys.exit(list(found.values()) != expected)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
