"""`torch.compile(model, backend="skipcost")`: a model's convolutions over up-sampled maps at low resolution, exactly.

Dynamo follows the model's Python and guards what it read: modes, attributes, replaced blocks, sizes. What it cannot
follow runs as it is, and so does a call for which a guard fails, until it has been followed again. The graphs are
rewritten (`graph`), and run as they are, so that autograd follows them, or go on to Inductor.

What is rewritten is differentiable once: a second derivative raises PyTorch's error. Left out: zeros where a map was
cropped before, slices of it where sizes are not known beforehand, transposed convolutions where gradients are asked
for.

options: `then`, "eager" (default) or "inductor": who runs the rewritten graph; with the latter no transposed
convolution is composed, since what is made of weights could not be kept. `form`, "low": what it is rewritten to.

What became of each place is logged as it is compiled, under the name of this module, at level INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from skipcost.kernels.rewriting.graph import rewrite_graph

OPTIONS = {"form": ("low",), "then": ("eager", "inductor")}  # the first is the default
LOG = logging.getLogger(__name__)


def backend(
    module: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return what runs a graph of Dynamo's, with convolutions over up-sampled maps in the cheaper form of each call.

    module: functions of PyTorch and weights as inputs; it is changed. examples: an input each. options: see above;
    ValueError for one that is not known.
    """
    chosen = {name: accepted[0] for name, accepted in OPTIONS.items()} | dict(options or {})
    for name, value in chosen.items():
        if name not in OPTIONS:
            message = f"option {name!r} is unknown; accepted: {', '.join(OPTIONS)}"
            raise ValueError(message)
        if value not in OPTIONS[name]:
            message = f"option {name}={value!r} is unknown; accepted: {', '.join(OPTIONS[name])}"
            raise ValueError(message)
    for change in rewrite_graph(module.graph, keeps=chosen["then"] == "eager"):
        LOG.info("%s", change)
    module.recompile()
    if chosen["then"] == "eager":
        run: Callable[..., Any] = module.forward
        return run
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 - loads all of Inductor

    compiled: Any = compile_fx(module, list(examples))
    return cast("Callable[..., Any]", compiled)
