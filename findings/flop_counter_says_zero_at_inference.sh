#!/usr/bin/env bash
# PyTorch 2.13.0: FlopCounterMode counts the same layer differently in training and at inference, down to 0.
#
# It has formulas for operators, and what a layer dispatches depends on the mode:
#   - nn.MultiheadAttention in eval mode without gradients is one operator, `aten::_native_multi_head_attention`, and
#     nn.TransformerEncoderLayer is `aten::_transformer_encoder_layer_fwd`; neither has a formula, so both count 0;
#   - nn.TransformerEncoderLayer in eval mode with gradients runs `aten::_scaled_dot_product_flash_attention_for_cpu`, which
#     has no formula either: its products with the attention's maps are missing, a third of the layer here. In training
#     dropout keeps it off that operator, and all is counted;
#   - nn.LSTM on a CPU is `aten::mkldnn_rnn_layer` (oneDNN): 0 in every mode.
# Nothing warns, and the usual way to count is exactly eval mode under no_grad. The operators that have no formula show
# by name in any TorchDispatchMode. skipcost counts these operators itself (bench/measure/arithmetic.py).
# Work-around: count in training mode with dropout that is not 0, or with gradients and `need_weights=True`.
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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOKENS, WIDTH, HEADS, INNER = 64, 32, 4, 64
print("Python", platform.python_version(), "torch", torch.__version__)


def flops(module, given, mode, gradients):
    module.train(mode == "train")
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
        module(*given)
    return counter.get_total_flops()


projections = 2 * TOKENS * 4 * WIDTH * WIDTH
attended = 2 * 2 * TOKENS * TOKENS * WIDTH  # scores, and their sums of values
inner = 2 * TOKENS * 2 * WIDTH * INNER
x = torch.randn(1, TOKENS, WIDTH)
attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)  # dropout 0.1
lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
whole = projections + attended + inner
rows = [
    ("MultiheadAttention", attention, (x, x, x), "train", True, projections + attended),
    ("MultiheadAttention", attention, (x, x, x), "eval", True, projections + attended),
    ("MultiheadAttention", attention, (x, x, x), "eval", False, 0),
    ("TransformerEncoderLayer", layer, (x,), "train", True, whole),
    ("TransformerEncoderLayer", layer, (x,), "eval", True, whole - attended),
    ("TransformerEncoderLayer", layer, (x,), "eval", False, 0),
    ("LSTM", lstm, (x,), "train", True, 0),
    ("LSTM", lstm, (x,), "eval", False, 0),
]
print(f"attention {projections + attended:,}, encoder layer {whole:,}, LSTM {2 * TOKENS * 8 * WIDTH * WIDTH:,} by hand")
differs = 0
for name, module, given, mode, gradients, expected in rows:
    found = flops(module, given, mode, gradients)
    note = "" if found == expected else f"   DIFFERS: expected here {expected:,}"
    differs += found != expected
    print(f"{name:24} {mode:5} {'with' if gradients else 'without':7} gradients {found:12,}{note}")
sys.exit(bool(differs))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
