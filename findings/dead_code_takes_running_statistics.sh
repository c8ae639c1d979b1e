#!/usr/bin/env bash
# PyTorch 2.13.0: torch.fx's Graph.eliminate_dead_code takes running statistics and in-place writes out of a Dynamo graph.
#
# A backend of torch.compile gets a graph of PyTorch's functions in which writes are still writes. eliminate_dead_code
# keeps a node with no reader only where it knows of a side effect, and of these it does not:
#   - functional.batch_norm in training whose result is not read: the running statistics are not updated any more;
#   - functional.relu(x, inplace=True) as a statement, as U-Nets write it, and x.mul_(2): the write is gone;
#   - torch.neg(x, out=buffer): the buffer stays as it was.
# x[:, 0] = 5 is kept. Nothing warns, and graph.lint() passes. The same graph without the call computes what eager does.
# skipcost erases the nodes that it has replaced, and no others (kernels/rewriting/graph.py).
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

import torch
from torch.nn import functional

print("Python", platform.python_version(), "torch", torch.__version__)


def normalise(x, mean, variance):
    functional.batch_norm(x, mean, variance, training=True)
    return x + 1


def clip(x, *_):
    functional.relu(x, inplace=True)
    return x + 1


def double(x, *_):
    x.mul_(2)
    return x + 1


def negate(x, buffer, _):
    torch.neg(x[0, :, 0, 0], out=buffer)
    return x + 1


def fill(x, *_):
    x[:, 0] = 5
    return x + 1


def cleaning(module, _):
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module.forward


def outcome(function):
    torch.manual_seed(0)
    given = torch.randn(1, 4, 3, 3), torch.zeros(4), torch.ones(4)
    return [function(*given), *given]


def same(function, backend):
    torch._dynamo.reset()
    pairs = zip(outcome(function), outcome(torch.compile(function, backend=backend)), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


differs = 0
for function, kept in ((normalise, False), (clip, False), (double, False), (negate, False), (fill, True)):
    without, with_it = same(function, "eager"), same(function, cleaning)
    note = "" if (without, with_it) == (True, kept) else "   DIFFERS"
    differs += bool(note)
    print(f"{function.__name__:10} as eager: {without!s:5}  after eliminate_dead_code: {with_it!s:5}{note}")
sys.exit(bool(differs))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
