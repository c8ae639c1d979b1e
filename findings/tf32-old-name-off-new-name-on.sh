#!/usr/bin/env bash
# torch 2.13.0: `torch.backends.cudnn.allow_tf32 = False` does not turn tf32 off in convolutions once
# `torch.backends.fp32_precision = "tf32"` was set: the older name puts the operation's setting back to "none", which
# inherits what was set for all. `torch.backends.cuda.matmul.allow_tf32 = False` does turn it off for matrix products.
# A script that ends with both older names at False so rounds convolutions to tf32, and not products, on an Ampere or
# newer card. Seen on a CPU build, whose settings are the same; no card is needed to read them.
# Output seen:
#   2.13.0 conv tf32, matmul tf32
#   older names at False: conv tf32, matmul ieee
#   newer name at ieee: conv ieee
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PROGRAM'
import torch

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
torch.backends.fp32_precision = "tf32"
print(torch.__version__.partition("+")[0], f"conv {cudnn.conv.fp32_precision}, matmul {matmul.fp32_precision}")
assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")

cudnn.allow_tf32 = matmul.allow_tf32 = False
print(f"older names at False: conv {cudnn.conv.fp32_precision}, matmul {matmul.fp32_precision}")
assert (cudnn.conv.fp32_precision, matmul.fp32_precision) == ("tf32", "ieee")

cudnn.conv.fp32_precision = "ieee"
print(f"newer name at ieee: conv {cudnn.conv.fp32_precision}")
assert cudnn.conv.fp32_precision == "ieee"
PROGRAM
