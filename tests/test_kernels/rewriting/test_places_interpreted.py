"""A fused model on the kernels themselves, in Triton's interpreter.

They run in a second pytest, see `helpers/interpreter.py`. To run them in one process:

    TRITON_INTERPRET=1 pytest tests/test_kernels/rewriting/test_places_interpreted.py
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from user_models import PaddingUNet, ValidUNet, trained

from skipcost.kernels import fuse
from skipcost.kernels.ops import launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched, in order."""
    names: list[str] = []
    device_function = launch.device_function

    def listed(name: str) -> Any:
        names.append(name)
        return device_function(name)

    monkeypatch.setattr(launch, "device_function", listed)
    return names


@dataclass(frozen=True, slots=True)
class Run:
    """A model, the size of an image, ops that do not run on kernels, and how often each kernel is launched."""

    model: type[nn.Module]
    size: tuple[int, int]
    elsewhere: tuple[str, ...]
    launches: dict[str, int]


RUNS = {
    # 4 does not divide 10, so one of the two up-sampled maps is padded, and for that made by PyTorch
    "padded": Run(PaddingUNet, (10, 12), (), {"conv.conv_few": 1, "conv.conv": 9, "up_conv.up_conv": 1}),
    "written in place": Run(
        PaddingUNet,
        (8, 12),
        ("concat_conv_bn_relu",),
        {"conv.conv_few": 1, "conv.conv": 9, "up_conv.up_conv": 2, "crop_concat.place": 2},
    ),
    # skips are cropped, and read as they are; convolutions of 1 and 4 channels have a kernel of their own
    "cropped": Run(ValidUNet, (44, 44), (), {"conv.conv_few": 4, "conv.conv": 6, "up_conv.up_conv": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_fused_model_runs_on_the_kernels(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Every convolution with a norm or ReLU is one launch of ours, and the result is as exact as the original's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # PyTorch on a CPU has no tf32 to compare with
    run = RUNS[name]
    model = trained(run.model())
    x = torch.randn(1, next(model.parameters()).shape[1], *run.size)
    fused, _ = fuse(model, choose=lambda call, _x: "cudnn" if call.op in run.elsewhere else "triton")

    with torch.no_grad():
        result, its, truth = fused(x), model(x), copy.deepcopy(model).double()(x.double())

    assert {name: launched.count(name) for name in launched} == run.launches
    floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (result - truth).abs().max() <= 2 * (its - truth).abs().max() + floor
