"""PyTorch's settings of precision: read whichever name they were made by, and set back as they were."""

from __future__ import annotations

import subprocess
import sys

SETTINGS = {  # program, whether convolutions may round
    "torch.backends.cudnn.allow_tf32 = False": False,
    "torch.backends.cudnn.allow_tf32 = True": True,
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": False,
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'": True,
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cudnn.conv.fp32_precision = 'none'; torch.backends.cudnn.fp32_precision = 'ieee'": False,
    "torch.backends.cudnn.conv.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'": True,
}
READERS = """
import os, sys
import torch
import torch._dynamo  # 3 s, which every child would take again
from skipcost.kernels.precision import rounding, tf32_allowed
from skipcost.bench.measure.machine import arithmetic
from skipcost.kernels.backends import precision_of

def rounds():
    backends = torch.backends
    return [each.fp32_precision == "tf32" for each in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]

def check(setting, expected):
    exec(setting)
    before = rounds()
    assert tf32_allowed() is expected, tf32_allowed()
    assert precision_of(torch.zeros(1, 1, 8, 8)) == ("tf32" if expected else "fp32")
    for within in (True, False):
        with rounding(tf32=within):
            assert tf32_allowed() is within
            assert rounds() == [within] * 3, rounds()
        assert rounds() == before, (rounds(), before)
    with arithmetic("tf32"):
        assert tf32_allowed()
    assert rounds() == before
    compiled = torch.compile(lambda x: x + 1 if tf32_allowed() else x - 1, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == (1 if expected else -1)

for setting, expected in SETTINGS.items():  # each in a process of its own, which ends with 1 where a check fails
    if (child := os.fork()) == 0:
        check(setting, expected)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_every_reader_follows_the_setting_by_either_name() -> None:
    """Nothing raises, compiled code included, and what is changed for a while is as it was afterwards."""
    program = f"SETTINGS = {SETTINGS!r}\n{READERS}"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_compiled_code_follows_a_later_change_of_the_older_name() -> None:
    """Dynamo guards on it, so that the function is compiled again."""
    program = """
import torch
from skipcost.kernels.precision import tf32_allowed
compiled = torch.compile(lambda x: x + 1 if tf32_allowed() else x - 1, backend="eager", fullgraph=True)
seen = []
for allowed in (True, False, True):
    torch.backends.cudnn.allow_tf32 = allowed
    seen.append(compiled(torch.zeros(1)).item())
assert seen == [1, -1, 1], seen
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
