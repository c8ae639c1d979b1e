"""What the interpreter checks of the convolutions share: a case, the launch it describes, and how far off it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from skipcost.kernels.ops.conv import conv_launch, pack_weight, statistics_tiles
from skipcost.kernels.ops.conv_bn_relu import launches
from skipcost.kernels.ops.launch import run
from skipcost.kernels.ops.tiles import Tile
from skipcost.kernels.verify.canaries import DATA, amid, blank, unwritten, written_beside
from skipcost.kernels.verify.exact import allowed, batch_norm, conv, worst
from skipcost.unet_models.ops import crop_all

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
# The interpreter's time goes by steps of the reduction, whatever their size: tiles are large, and maps a little larger.
TILES = {
    "pointer": Tile("pointer", 128, 32, 32),
    "few": Tile("few", 128, 32, 64),
    "tma": Tile("tma", 128, 32, 32, rows=8, columns=16),
}
MAPS = {"pointer": (24,), "few": (5,), "tma": (64,)}  # channels: ragged, ragged, two blocks of 32
OUTPUTS = {"pointer": 33, "few": 33, "tma": 40}  # one tile of channels and a bit; by descriptor, rows of 16 bytes
PRECISIONS = {"pointer": tuple(DTYPES), "few": tuple(DTYPES), "tma": ("fp32", "tf32", "fp16", "bf16")}
WEIGHTS = {"positive": "positive", "one-hot": "one-hot"}  # the data of the weight, where it is not normal


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution. 0 for `outputs`, and nothing for `channels`, `tile` and `layouts`, take what the form has above.

    size: height and width of the smallest map; larger: by how much each map exceeds it, and so is cropped.
    mean: what the shift is about. layouts: of the maps, repeated as needed; out_layout: of what is written.
    """

    form: str
    precision: str = "fp32"
    channels: tuple[int, ...] = ()
    outputs: int = 0
    batch: int = 2
    size: tuple[int, int] = (8, 11)  # 176 pixels in 2 images: ragged in rows, in columns, and as a whole
    larger: tuple[tuple[int, int], ...] = ((0, 0),)
    side: int = 3
    padding: int = 1
    relu: bool = True
    scaled: bool = True
    shifted: bool = True
    mean: float = 0.0
    pooled: bool = False
    data: str = "normal"
    layouts: tuple[str, ...] = ("channel_slice", "window", "channels_last")
    out_layout: str = "channel_slice"
    tile: Tile | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a convolution reads, each amid canaries."""

    maps: list[Tensor]
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the inputs of a case; the weight lies as the kernels read it, so that no copy leaves its canaries behind."""
    dtype = DTYPES[case.precision]
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    channels = case.channels or MAPS[case.form]
    outputs = case.outputs or OUTPUTS[case.form]
    aligned = case.form == "tma"
    maps = []
    for index, count in enumerate(channels):
        more = case.larger[index % len(case.larger)]
        shape = (case.batch, count, case.size[0] + more[0], case.size[1] + more[1])
        values = DATA[case.data](shape, dtype, seed + index)
        maps.append(amid(values, case.layouts[index % len(case.layouts)], aligned=aligned))
    weight = DATA[WEIGHTS.get(case.data, "normal")]((outputs, sum(channels), case.side, case.side), dtype, seed + 100)
    scale, shift = (DATA["normal"]((outputs,), vectors, seed + number) for number in (200, 300))
    return Inputs(
        maps,
        amid(weight, "channels_last", aligned=aligned),
        amid(scale, "contiguous") if case.scaled else None,
        amid(shift + case.mean, "contiguous") if case.shifted else None,
    )


def blanks(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Return where the result goes, and the pooled map where there is one: canaries amid canaries."""
    height, width = (size - case.side + 1 + 2 * case.padding for size in crop_all(inputs.maps)[0].shape[2:])
    shape = (case.batch, len(inputs.weight), height, width)
    half = (*shape[:2], height // 2, width // 2)
    options = {"aligned": case.form == "tma"}
    out = blank(shape, inputs.weight.dtype, case.out_layout, **options)
    return out, blank(half, inputs.weight.dtype, case.out_layout, **options) if case.pooled else None


def convolve(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Run the kernel of the case; all of the result is written, and nothing beside it."""
    out, pooled = blanks(case, inputs)
    options = {"padding": case.padding, "relu": case.relu, "tf32": case.precision == "tf32"}
    tile = case.tile or TILES[case.form]
    run(launches(inputs.maps, inputs.weight, inputs.scale, inputs.shift, out, pooled=pooled, tile=tile, **options))
    for each in (out, pooled):
        if each is not None:
            assert_written(each)
    return out, pooled


def assert_written(view: Tensor) -> None:
    """A kernel wrote all of a view from `blank`, and nothing beside it."""
    complaints = [complaint for complaint in (unwritten(view), written_beside(view)) if complaint]
    assert not complaints, complaints


def assert_pooled(pooled: Tensor, stored: Tensor) -> None:
    """The pooled map is PyTorch's of what was stored, to the number."""
    expected = functional.max_pool2d(stored, 2)
    same = (pooled == expected) | (pooled.isnan() & expected.isnan())
    assert pooled.shape == expected.shape
    assert bool(same.all()), f"{int((~same).sum())} pooled values of {same.numel()} differ"


def error_of(case: Case, inputs: Inputs, out: Tensor) -> float:
    """Return the largest error of a result, as a share of what is allowed."""
    exact = conv(
        inputs.maps, inputs.weight, inputs.scale, inputs.shift, padding=case.padding, relu=case.relu
    )  # fmt: skip
    return worst(out, exact.value, allowed(exact, out.dtype, tf32=case.precision == "tf32"))


def checked(case: Case, seed: int = 0) -> float:
    """Run a case and assert all that holds for every case; return its error as a share of what is allowed."""
    inputs = make_inputs(case, seed)
    out, pooled = convolve(case, inputs)
    error = error_of(case, inputs, out)
    assert error <= 1, f"{case} errs by {error} times what is allowed"
    if pooled is not None:
        assert_pooled(pooled, out)
    return error


def statistics_errors(case: Case, *, both: bool = False) -> tuple[float, float]:
    """Run a case with statistics, `both`: also pooled; return the errors of mean and variance of what was stored."""
    inputs = make_inputs(case)
    out, pooled = blanks(case, inputs)
    tile = case.tile or TILES[case.form]
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    partials = blank((statistics_tiles(out, tile, pooled=both), 3, out.shape[1]), wide, "contiguous")
    vectors = {"scale": inputs.scale, "shift": inputs.shift, "relu": case.relu, "tf32": case.precision == "tf32"}
    options = {"padding": case.padding, "pooled": pooled if both else None, "partials": partials, "tile": tile}
    run([conv_launch(crop_all(inputs.maps), pack_weight(inputs.weight), out, **options, **vectors)])
    assert_written(partials)
    assert error_of(case, inputs, out) <= 1
    counts, means, deviations = partials.double().unbind(1)  # (tiles, O) each
    values = out.shape[0] * out.shape[2] * out.shape[3]
    assert bool((counts.sum(0) == values).all()), "the counts are not exact"
    mean = (counts * means).sum(0) / values
    variance = (deviations + counts * (means - mean).square()).sum(0) / values
    ones = torch.ones(out.shape[1], dtype=torch.float64)
    exact = batch_norm(out, ones, ones, eps=1e-5)
    of_mean = worst(mean, exact.mean.value, allowed(exact.mean, wide))
    return of_mean, worst(variance, exact.variance.value, allowed(exact.variance, wide))
