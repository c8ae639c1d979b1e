#!/usr/bin/env bash
# PyTorch 2.13.0, CPU: an optimizer with fused=True changes weights and leaves their version, so that autograd does not notice.
#
# Every write in place raises a tensor's _version, by which autograd refuses a backward pass over what was changed since it
# was saved. A step of Adam, AdamW, SGD or Adagrad with fused=True changes the weight and leaves the version where it was:
# a backward pass over a graph from before the step, which raises with fused=False, is computed with the new weight and
# gives another gradient, without a word. Whatever else is kept by version (folded weights, casts) goes stale as well.
# torch.optim.optimizer.register_optimizer_step_post_hook is called for both; skipcost counts steps by it
# (kernels/weights.py).
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
from torch.optim.optimizer import register_optimizer_step_post_hook

print("Python", platform.python_version(), "torch", torch.__version__)
steps = []
register_optimizer_step_post_hook(lambda *_: steps.append(1))


def tried(kind, fused):
    weight = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = kind([weight], lr=0.5, fused=fused)
    x = torch.ones(3, requires_grad=True)
    late = (weight * x).sum()  # its gradient in x is the weight, which is 2
    (weight * weight).sum().backward()
    version, hooks = weight._version, len(steps)
    optimizer.step()
    changed, raised = bool((weight != 2).all()), weight._version > version
    try:
        late.backward()
        gradient = f"{x.grad[0].item():.2f}"
    except RuntimeError:
        gradient = "refused"
    return changed, raised, gradient, len(steps) - hooks


differs = 0
for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
    for fused in (False, True):
        changed, raised, gradient, called = tried(kind, fused)
        as_told = changed and called == 1 and (
            (not raised and gradient not in ("refused", "2.00")) if fused else (raised and gradient == "refused")
        )
        differs += not as_told
        print(
            f"{kind.__name__:8} fused={fused!s:5}: weight changed {changed}, version raised {raised!s:5}, "
            f"gradient of 2.00 from before the step: {gradient}, hook called {called}{'' if as_told else '   DIFFERS'}"
        )
sys.exit(bool(differs))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
