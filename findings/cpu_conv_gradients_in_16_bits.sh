#!/usr/bin/env bash
# PyTorch 2.13.0: on a CPU whose oneDNN has no 16-bit products, gradients of 16-bit convolutions are added up in 16 bits.
#
# oneDNN takes bf16 from AVX-512 on, fp16 from AVX-512 FP16 on. Below that (every AVX2 CPU: AMD Zen 1 to 3, Intel Core
# since its 12th generation) ATen multiplies matrices itself (unfold, product, fold). Each product is added up in fp32,
# but what is added to it afterwards lies in the tensor's own type:
#   - the gradient of the weight is added up image by image (`slow_conv2d`, a product with beta = 1 for each image), so
#     a sum of equal parts stops at 256 parts in bf16, and at 2,048 in fp16, where one more is half a unit: of 1,024
#     images a quarter is left, of 4,096 a sixteenth;
#   - the gradient of the input is added up tap by tap: of 31 x 31 taps 256 are left in bf16.
# It is silent, is the same under autocast with fp32 parameters, and with transposed, 1-d and 3-d convolutions.
# nn.Linear of the same numbers and the bias's gradient are right (that was mended: pytorch/pytorch#68048), and so is
# the convolution where oneDNN takes the type. MIOpen had the same fault on GPUs (ROCm/rocm-libraries#5859).
# Work-around: convolve in fp32, or split the batch and add gradients up in fp32.
#
# ONEDNN_MAX_CPU_ISA=AVX2 shows it on any x86-64 CPU; other architectures have other libraries: nothing is tried there.
# Exits 0 where the behaviour is as described, 1 where it differs.
set -euo pipefail
if [ "$(uname -m)" != x86_64 ]; then
    echo "needs an x86-64 CPU, this is $(uname -m): nothing was tried"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import platform
import sys

import torch
from torch.nn import functional

print("Python", platform.python_version(), "torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
print("oneDNN takes bf16:", torch.ops.mkldnn._is_mkldnn_bf16_supported(),
      "fp16:", torch.ops.mkldnn._is_mkldnn_fp16_supported())
differs = []


def gradient(function, images, dtype, sides=2, autocast=False):
    """Gradients of a weight of one 1 and of its bias: every image adds 1, so either should be `images`."""
    kind = torch.float32 if autocast else dtype
    x = torch.ones(images, 1, *[1] * sides, dtype=kind)
    weight = torch.ones(1, 1, *[1] * sides, dtype=kind, requires_grad=True)
    bias = torch.zeros(1, dtype=kind, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = function(x, weight, bias)
    return [each.item() for each in torch.autograd.grad(y, (weight, bias), torch.ones_like(y))]


def show(name, found, expected):
    print(f"{name:52} {found:8g}" + ("" if found == expected else f"   DIFFERS: expected here {expected:g}"))
    if found != expected:
        differs.append(name)


bf16, fp16 = torch.bfloat16, torch.float16
print("\nevery image adds 1 to the weight's gradient; what PyTorch says:")
for images in (256, 1024, 4096):
    found, of_bias = gradient(functional.conv2d, images, bf16)
    show(f"conv2d, bf16, {images} images", found, 256)
    show("  its bias", of_bias, images)
show("conv2d, fp16, 4096 images", gradient(functional.conv2d, 4096, fp16)[0], 2048)
show("conv2d, autocast to bf16, 1024 images", gradient(functional.conv2d, 1024, bf16, autocast=True)[0], 256)
show("conv_transpose2d, bf16, 1024 images", gradient(functional.conv_transpose2d, 1024, bf16)[0], 256)
show("conv1d, bf16, 1024 images", gradient(functional.conv1d, 1024, bf16, sides=1)[0], 256)
show("conv3d, bf16, 1024 images", gradient(functional.conv3d, 1024, bf16, sides=3)[0], 256)
show("conv2d, fp32, 1024 images", gradient(functional.conv2d, 1024, torch.float32)[0], 1024)

rows = torch.ones(1024, 1, dtype=bf16)
weight = torch.ones(1, 1, dtype=bf16, requires_grad=True)
(found,) = torch.autograd.grad(functional.linear(rows, weight).sum(), weight)
show("linear, bf16, 1024 rows", found.item(), 1024)

print("\nevery one of 31 x 31 taps adds 1 to the middle of the input's gradient:")
x = torch.ones(1, 1, 61, 61, dtype=bf16, requires_grad=True)
y = functional.conv2d(x, torch.ones(1, 1, 31, 31, dtype=bf16))
(found,) = torch.autograd.grad(y, x, torch.ones_like(y))
show("conv2d, bf16, 961 taps", found[0, 0, 30, 30].item(), 256)

print("\nrandom maps behind ReLU and random gradients about 1: error of the weight's gradient, over its norm")
for images in (16, 256, 1024):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 8, 8, 8, generator=generator).relu().to(bf16)
    weight = torch.randn(8, 8, 3, 3, generator=generator).to(bf16).requires_grad_()
    y = functional.conv2d(x, weight, padding=1)
    grad = (1 + torch.randn(y.shape, generator=generator)).to(bf16)
    (found,) = torch.autograd.grad(y, weight, grad)
    exact_weight = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(functional.conv2d(x.double(), exact_weight, padding=1), exact_weight, grad.double())
    print(f"conv2d, bf16, {images:5} images: {float((found.double() - exact).norm() / exact.norm()):.4f}")
sys.exit(f"differs from what is described: {', '.join(differs)}" if differs else 0)
PYTHON
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/show.py"
echo "as described"
