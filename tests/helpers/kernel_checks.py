"""What tests of all kernels share: maps amid canaries, comparison by bits, data that tells summands apart.

Importing this where Triton interprets makes the interpreter compute as a GPU does, see `faithful.py`, or fails.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from skipcost.kernels.ops.launch import interpreted
from skipcost.kernels.verify.canaries import CHANNELS_ADJACENT, DATA, MARGIN, amid
from skipcost.kernels.verify.canaries import LAYOUTS as CANARY_LAYOUTS
from skipcost.kernels.verify.exact import bits

__all__ = [
    "LAYOUTS",
    "MARGIN",
    "amid",
    "assert_same",
    "bits",
    "far_apart",
    "kept_in_16_bits",
    "map_sizes",
    "maps_amid_nan",
]

LAYOUTS = tuple(CANARY_LAYOUTS)

if interpreted() and importlib.util.find_spec("triton"):
    import brisk
    import faithful

    faithful.install()
    brisk.install()


def maps_amid_nan(
    batch: int,
    sizes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    *,
    data: str = "normal",
    layouts: Sequence[str] = CHANNELS_ADJACENT,
    seed: int = 0,
) -> list[Tensor]:
    """Maps (batch, C_i, H_i, W_i) of a kind of data, all different, amid NaN; layouts are repeated as needed."""
    pairs = zip(sizes, itertools.cycle(layouts), strict=False)
    return [amid(DATA[data]((batch, *size), dtype, seed + index), layout) for index, (size, layout) in enumerate(pairs)]


@st.composite
def map_sizes(
    draw: st.DrawFn, channels: Sequence[int] = (1, 3, 16, 17), most: int = 3, largest: int = 9
) -> tuple[tuple[int, int, int], ...]:
    """Draw (C, H, W) of 1 to `most` maps; each side is up to 4 longer than the smallest's, which is 1 to `largest`."""
    smallest = [draw(st.integers(1, largest)) for _ in range(2)]
    longer = st.tuples(st.sampled_from(channels), st.integers(0, 4), st.integers(0, 4))
    drawn = draw(st.lists(longer, min_size=1, max_size=most))
    return tuple((count, smallest[0] + higher, smallest[1] + wider) for count, higher, wider in drawn)


def far_apart(x: Tensor, axis: int = 0) -> Tensor:
    """Copy x (N, C, H, W) so that its last image, row or column (axis 0, 2, 3) starts beyond 2**31 elements.

    Their distance fits 31 bits, so that only a product passes 2**31: a larger one would be an argument of 64 bits, and
    all that it is multiplied with would be too. Memory is asked for, not touched: it costs a page for each row.
    """
    apart = (2**31 // (x.shape[axis] - 1) // 64 + 1) * 64  # a multiple of 16 bytes, as descriptors want it
    strides, step = [1] * 4, x.shape[1]
    for other in (each for each in (3, 2, 0) if each != axis):
        strides[other], step = step, step * x.shape[other]
    strides[axis] = apart
    assert step <= apart < 2**31 <= apart * (x.shape[axis] - 1)
    storage = torch.empty((x.shape[axis] - 1) * apart + step, dtype=x.dtype)
    return storage.as_strided(tuple(x.shape), strides).copy_(x)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare shape, type and every bit."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(actual), bits(expected))


def kept_in_16_bits(dtype: torch.dtype, parts: int) -> int:
    """How often ATen rounds a sum on its way to a convolution's gradient of `dtype`, added up from `parts` on a CPU.

    oneDNN adds up in fp32 and rounds once, in bf16 from AVX-512 on, in fp16 from its own instructions on. Without
    them ATen multiplies matrices: each product adds up in fp32, but what is added to it is stored in the type: the
    gradient of the weight image by image, that of the map tap by tap (unfold's adjoint). Roundings beside the last.
    """
    return parts - 1 if dtype.itemsize == 2 else 0
