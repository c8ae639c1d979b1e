#!/usr/bin/env bash
# MONAI 1.6.1 with PyTorch 2.13.0: torch.compile cuts a BasicUNet into nine graphs.
#
# The block that concatenates (`UpCat`) asks `torch.jit.isinstance(x_e, torch.Tensor)`, a function that Dynamo may not
# trace, so the graph breaks eight times over four levels: between up-sampling and concatenation, where fusion would pay
# most. With `fullgraph=True` it raises; otherwise nothing is said unless one asks. The same blocks, the question
# answered beforehand, are one graph.
# skipcost's backend sees up-sampling and convolution only apart there, and leaves them as they are (docs/rewritten.md).
#
# Exits 0 where the behaviour is as described, 1 where it differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps monai==1.6.1
cat > "$folder/show.py" <<'PYTHON'
import platform
import sys

import monai
import torch
from monai.networks.nets import BasicUNet

print("Python", platform.python_version(), "torch", torch.__version__, "MONAI", monai.__version__)
model, x = BasicUNet(spatial_dims=2, features=(4, 4, 8, 8, 16, 4)).eval(), torch.randn(1, 1, 32, 32)


def graphs(title):
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(model)(x)
    print(f"{title}: {found.graph_count} graphs, {found.graph_break_count} breaks")
    return found.graph_count, found.graph_break_count


as_it_is = graphs("BasicUNet as it is")
torch.jit.isinstance = isinstance
answered = graphs("with Python's isinstance")
sys.exit(as_it_is != (9, 8) or answered != (1, 0))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
