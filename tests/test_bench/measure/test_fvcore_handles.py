"""Fvcore counts networks on the suite's ops as it counts PyTorch's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from skipcost.bench.measure.counting import preload_fvcore
from skipcost.bench.measure.fvcore_handles import HANDLES
from skipcost.kernels.dispatch.call import Call
from skipcost.kernels.rewriting.fused import FusedOps
from skipcost.unet_models import ModelSpec, build, graph


def _triton(_call: Call, _x: Tensor) -> str:
    return "triton"


@pytest.mark.parametrize(
    ("variant", "training"), [("unet", False), ("unet", True), ("unet++", True), ("unet3+", False)]
)
def test_fvcore_counts_every_convolution_once(variant: str, training: bool) -> None:  # noqa: FBT001 - a parameter
    """All convolutions of the graph, whichever op runs them; without a handle they would count as nothing."""
    count = preload_fvcore()
    if count is None:
        pytest.skip("fvcore is not installed, so it counted nothing: pip install 'skipcost[fvcore]'")
    spec = ModelSpec(variant, 2, 4)
    net = build(spec, FusedOps(_triton).ops()).train(training)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks about sizes that become constants
        analysis = count(net, torch.randn(2, 1, 16, 18)).unsupported_ops_warnings(False)
        analysis.total()
        unknown = {name for name in analysis.unsupported_ops() if name.startswith("skipcost::")}
        for name, handle in HANDLES.items():
            analysis.set_op_handle(name, handle)
        counted = analysis.by_operator()

    assert unknown
    assert unknown <= set(HANDLES)
    assert counted["conv"] == 2 * graph(spec).conv_macs(16, 18)
