"""MONAI's U-Nets through the user's door: what `nox -s monai` installs is counted as exactly as the suite's networks.

Not collected by a plain run of the tests: there they would be skipped, which is not passed.
"""

from __future__ import annotations

import pytest
import torch

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import make
from skipcost.bench.measure.counting import fvcore_count, predicted_peaks
from skipcost.bench.measure.metrics import METRICS
from skipcost.bench.measure.subject import make_subject
from skipcost.bench.measure.tracing import count_convolutions, count_params
from skipcost.bench.sweeps.plan import load_plan

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = [each.case for each in load_plan("monai", {"size": ["64"]}, "cpu", 1).cases if each.case.factory]


def name_of(case: Case) -> str:
    """Short name for test ids."""
    return f"{case.spec.label} {case.mode}"


def test_the_sweep_has_three_models_of_monai_beside_the_suite() -> None:
    """BasicUNet, BasicUNetPlusPlus and AttentionUnet stand beside U-Net, UNet++, UNet 3+ and the gated U-Net."""
    plan = load_plan("monai", {}, "cpu", 1)

    paths = {each.case.factory.path.rpartition(":")[2] for each in plan.cases if each.case.factory}
    assert paths == {"BasicUNet", "BasicUNetPlusPlus", "AttentionUnet"}
    assert {each.case.spec.variant for each in plan.cases if not each.case.factory} == {"unet", "unet++", "unet3+"}
    assert plan.left_out == {}


@pytest.mark.parametrize("case", OWN, ids=name_of)
def test_parameters_and_macs_are_the_models(case: Case) -> None:
    """Parameters are those of the module, MACs those of its convolutions by their shapes, and nothing is doubtful."""
    network, _ = make(case.factory, "cpu")
    macs = []

    def count(module: torch.nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
        reads = given[0] if isinstance(module, torch.nn.ConvTranspose2d) else output
        macs.append(module.weight.numel() * reads.shape[0] * reads.shape[2] * reads.shape[3])

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(case.batch, 1, case.height, case.width))

    params, (conv_macs, activations) = count_params(case), count_convolutions(case)

    assert params.samples[0] == sum(each.numel() for each in network.parameters())
    assert conv_macs.samples[0] == sum(macs)
    assert activations.samples[0] > 0
    assert {conv_macs.note, activations.note} == {""}


@pytest.mark.parametrize("case", [case for case in OWN if case.mode == "inference"], ids=name_of)
def test_fvcore_counts_the_same_convolutions_but_those_in_vain(case: Case) -> None:
    """To the MAC; of BasicUNet++ it leaves out the three 1x1 heads that run, and whose maps nobody gets, at inference.

    fvcore traces by torch.jit, which drops operators without a reader; eager PyTorch runs them.
    """
    conv_macs, _ = count_convolutions(case)

    in_vain = 3 * case.height * case.width * 32 * 2 if case.spec.label == "MONAI BasicUNet++" else 0
    assert fvcore_count(case).detail["by_operator"]["conv"] == conv_macs.samples[0] - in_vain


@pytest.mark.parametrize("case", OWN, ids=name_of)
def test_a_step_runs_and_its_memory_is_predicted(case: Case) -> None:
    """Inference and training run as they are, deep supervision too, and are traced without data."""
    subject = make_subject(case, "cpu")
    before = [each.detach().clone() for each in subject.network.parameters()]

    subject.step()

    changed = any(not torch.equal(a, b) for a, b in zip(before, subject.network.parameters(), strict=True))
    assert changed == (case.mode == "training")
    first, steady, detail = predicted_peaks(case)
    assert steady >= first > detail["parameter_bytes"]
    assert "note" not in detail
    assert "peak_memory_predicted_bytes" in METRICS
