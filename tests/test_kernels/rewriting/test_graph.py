"""What the backend makes of a graph: one call in place of up-sampling, concatenation and convolution, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from skipcost.kernels.rewriting import enlarged
from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.enlarged import convolve
from skipcost.kernels.rewriting.graph import rewrite_graph

X, SKIP, WEIGHT = (1, 64, 16, 16), (1, 8, 32, 32), (32, 72, 3, 3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite maps that are small enough for tests."""
    for name in ("FEWEST_MACS", "FEWEST_SAVED", "FEWEST_PIXELS"):
        monkeypatch.setattr(enlarged, name, 0)


def rewritten(function: Callable[..., Any], **settings: Any) -> tuple[list[Any], list[Change]]:
    """Return the functions of a function's graph after the rewrite, in order, and the changes. settings: of that.

    Results, and what becomes of the inputs, are those of the function itself, in float64.
    """
    found: list[Any] = []

    def keep(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        changes = rewrite_graph(module.graph, **settings)
        module.graph.lint()
        found.extend(([node.target for node in module.graph.nodes if node.op.startswith("call")], changes))
        module.recompile()
        return module.forward

    given = [torch.randn(shape, dtype=torch.float64) for shape in (X, SKIP, WEIGHT)]
    again = [each.clone() for each in given]
    torch._dynamo.reset()
    result = torch.compile(function, backend=keep)(*given)
    torch._dynamo.reset()
    names = ("the result", "x", "skip", "weight")
    for name, ours, its in zip(names, (result, *given), (function(*again), *again), strict=True):
        off, largest = float((ours - its).abs().max()), float(its.abs().max())
        assert off <= 1e-12 * largest, f"{name} is off by {off:.2g}, its largest value is {largest:.2g}"
    calls, changes = found
    return calls, changes


def up(x: Tensor) -> Tensor:
    """Twice as many pixels along both sides."""
    return functional.interpolate(x, scale_factor=2, mode="bilinear")


def test_one_call_takes_the_place_of_all() -> None:
    """Nothing of up-sampling, dropout that is off, concatenation and convolution is left."""
    calls, changes = rewritten(
        lambda x, skip, weight: functional.conv2d(
            torch.cat([skip, functional.dropout(up(x), training=False)], 1), weight, padding="same"
        )
    )

    assert calls == [convolve]
    assert [each.after for each in changes] == ["tap_first"]
    assert changes[0].before == "interpolate -> dropout -> cat -> conv2d"


def test_a_concatenation_of_concatenations_is_one() -> None:
    """The up-sampled map in the inner one."""
    calls, changes = rewritten(
        lambda x, skip, weight: torch.conv2d(torch.cat([torch.cat([skip[:, :4], up(x)], 1), skip[:, 4:]], 1), weight)
    )

    assert calls[-1] == convolve
    assert torch.cat not in calls
    assert [each.after for each in changes] == ["tap_first"]


def test_a_padded_map_is_made_beside_one_that_is_not() -> None:
    """Zeros around one of two up-sampled maps leave the other at low resolution."""
    padding = [1, 0, 1, 0]
    calls, changes = rewritten(
        lambda x, skip, weight: torch.conv2d(
            torch.cat([functional.pad(up(x[:, :8])[:, :, 1:, 1:], padding), up(x[:, :56]), skip], 1), weight
        )
    )

    assert convolve in calls
    assert [each.after for each in changes] == ["tap_first"]


def _writing(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    functional.relu(skip, inplace=True)
    skip.view(-1)[3:].mul_(2)
    functional.batch_norm(x, skip[0, :, 0, :8].reshape(-1), weight.view(-1)[:64], training=True)
    return torch.conv2d(torch.cat([skip, up(x)], 1), weight)


def test_writes_whose_result_nobody_reads_stay() -> None:
    """Statements that write in place, running statistics in training: they look dead in a graph."""
    calls, changes = rewritten(_writing)

    assert {functional.relu, functional.batch_norm, convolve, "mul_"} <= set(calls)
    assert [each.after for each in changes] == ["tap_first"]


def _by_a_view(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([skip, up(x)], 1)
    skip.view(-1).zero_()
    return torch.conv2d(joined, weight)


def _in_place(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([skip, up(x)], 1)
    x += 1
    return torch.conv2d(joined, weight)


def _relu_in_place(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([skip, up(x)], 1)
    functional.relu(x, inplace=True)
    return torch.conv2d(joined, weight)


def _filled(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([skip, up(x)], 1)
    skip[:, 0] = 0
    return torch.conv2d(joined, weight)


def _normalised(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([skip, up(x)], 1)
    skip = functional.batch_norm(skip, None, None, training=True)
    return torch.conv2d(joined, weight) + functional.dropout(skip, 0.0, True)[:, :, 1:-1, 1:-1].mean(1, keepdim=True)


def test_training_is_no_write() -> None:
    """A flag that is True may be another than `inplace`."""
    calls, _ = rewritten(_normalised)

    assert convolve in calls


@pytest.mark.parametrize("function", [_by_a_view, _in_place, _relu_in_place, _filled])
def test_what_is_written_to_is_read_before(function: Callable[..., Any]) -> None:
    """Under whatever name the memory is known, and whoever writes."""
    calls, changes = rewritten(function)

    assert convolve not in calls
    assert "writes to a map that is read" in changes[0].why


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"stride": 2}, "stride 2: "),
        ({"dilation": (1, 2)}, "dilation (1, 2)"),
        ({"padding": 3}, "padding 3 beside this kernel"),
        ({"padding": (0, 1)}, "padding (0, 1) beside this kernel"),
    ],
)
def test_other_convolutions_stay(settings: dict[str, Any], why: str) -> None:
    """With what about them keeps them."""
    calls, changes = rewritten(lambda x, skip, weight: torch.conv2d(torch.cat([skip, up(x)], 1), weight, **settings))

    assert convolve not in calls
    assert changes[0].why.startswith(why)


def test_an_up_sampled_weight_is_none_of_ours() -> None:
    """A convolution whose weight is behind the up-sampling."""
    calls, changes = rewritten(lambda _, skip, weight: torch.conv2d(skip, up(weight[:, :8])))

    assert convolve not in calls
    assert [each.after for each in changes] == [""]


def test_up_sampling_by_other_factors_is_none() -> None:
    """One and a half, and two factors: the graph stays, and there is nothing to say."""
    for size in ((24, 24), (32, 48)):
        calls, changes = rewritten(
            lambda x, _, weight, size=size: torch.conv2d(functional.interpolate(x, size=size), weight[:, :64])
        )

        assert convolve not in calls
        assert not changes


UP = nn.Parameter(torch.randn(64, 64, 2, 2, dtype=torch.float64), requires_grad=False)
UP_BIAS = torch.randn(64, dtype=torch.float64)


def up_conv(x: Tensor) -> Tensor:
    """Twice as many pixels along both sides, by weights."""
    return functional.conv_transpose2d(x, UP, UP_BIAS, 2)


def composed_in(calls: list[Any]) -> bool:
    """Whether a call is there that may compose."""
    return convolve in calls


@pytest.mark.parametrize("between", ["nothing", "zeros", "dropout", "cat"])
def test_a_transposed_convolution_goes_into_the_next(between: str) -> None:
    """Beside a skip, in any place; through zeros and dropout that is off."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "nothing": lambda y: y,
        "zeros": lambda y: functional.pad(y[:, :, :, :], [0, 0, 0, 0]),
        "dropout": lambda y: functional.dropout(y, training=False),
        "cat": lambda y: torch.cat([y[:, :, :, :]], 1),
    }
    calls, changes = rewritten(
        lambda x, skip, weight: torch.conv2d(torch.cat([ways[between](up_conv(x)), skip], 1), weight[:16], padding=1)
    )

    assert composed_in(calls)
    assert not {torch.conv2d, functional.conv_transpose2d} & set(calls)
    assert [each.after for each in changes] == ["composed_up_conv"]
    assert changes[0].before.startswith("conv_transpose2d -> ")


@pytest.mark.parametrize(
    "settings",
    [{"stride": 3}, {"stride": 2, "padding": 1}, {"stride": 2, "output_padding": 1}, {"stride": 2, "dilation": 2}],
)
def test_other_transposed_convolutions_are_none(settings: dict[str, Any]) -> None:
    """Nor is one with groups, or with another kernel: the graph stays, and there is nothing to say."""
    wide = functional.pad(UP, [0, 1, 0, 1])
    for kernel, groups in ((UP, 1), (wide, 1), (UP[:, :32], 2)):
        given = settings if kernel is UP else {"stride": 2, "groups": groups}
        calls, changes = rewritten(
            lambda x, _, weight, kernel=kernel, given=given: torch.conv2d(
                functional.conv_transpose2d(x, kernel, **given), weight[:16, :64]
            )
        )

        assert not composed_in(calls)
        assert not changes


def _weight_written(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([up_conv(x), skip], 1)
    UP.mul_(1)
    return torch.conv2d(joined, weight[:16])


def _bias_written(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([up_conv(x), skip], 1)
    UP_BIAS.view(-1)[1:].mul_(1)
    return torch.conv2d(joined, weight[:16])


def _read_too(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = up_conv(x)
    return torch.conv2d(torch.cat([joined, skip], 1), weight[:16]) + joined.mean()


def _cat_read_too(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([up_conv(x), skip], 1)
    return torch.conv2d(joined, weight[:16]) + torch.conv2d(joined, weight[16:32])


def _no_parameter(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    joined = torch.cat([functional.conv_transpose2d(x, UP * 2, stride=2), skip], 1)
    return torch.conv2d(joined, weight[:16])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_weight_written, "mul_ writes to a map that is read"),
        (_bias_written, "mul_ writes to a map that is read"),
        (_read_too, "cat, mean read its map"),
        (_cat_read_too, "conv2d reads the map of cat as well"),
        (_no_parameter, "is no parameter"),
    ],
)
def test_a_transposed_convolution_that_has_to_run_stays(function: Callable[..., Any], why: str) -> None:
    """And it is said who writes or reads."""
    calls, changes = rewritten(function)

    assert not composed_in(calls)
    assert why in changes[0].why
    assert not any(each.after for each in changes)


def test_a_map_that_is_made_in_any_case_leaves_the_others_at_low_resolution() -> None:
    """A transposed convolution with two readers, concatenated with a bilinear map."""

    def function(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
        shared = up_conv(x)
        return torch.conv2d(torch.cat([shared[:, :8], up(x)], 1), weight) + shared.mean()

    calls, changes = rewritten(function)

    assert convolve in calls
    assert [each.after for each in changes] == ["", "tap_first"]


def test_a_graph_that_is_compiled_further_keeps_no_weights() -> None:
    """It has what it reads as inputs alone."""
    calls, changes = rewritten(
        lambda x, skip, weight: torch.conv2d(torch.cat([up_conv(x), skip], 1), weight[:16]), keeps=False
    )

    assert not composed_in(calls)
    assert "compiled further" in changes[0].why


def pointwise(y: Tensor, weight: Tensor, **given: Any) -> Tensor:
    """A 1x1 convolution, with a bias."""
    return torch.conv2d(y, weight[:, : y.shape[1], :1, :1], weight[:, 0, 0, 0], **given)


@pytest.mark.parametrize("mode", ["bilinear", "corners", "nearest", "cropped", "to a size"])
def test_a_pointwise_convolution_goes_in_front_of_the_up_sampling(mode: str) -> None:
    """With its bias, exactly: means of one pixel's values, whose weights sum to one."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "bilinear": up,
        "corners": lambda x: functional.interpolate(x, scale_factor=3, mode="bilinear", align_corners=True),
        "nearest": lambda x: functional.interpolate(x, scale_factor=2.0),
        "cropped": lambda x: functional.pad(up(x)[:, :, 1:], [-1, 0]),
        "to a size": lambda x: functional.interpolate(x, size=[2 * x.size(2), 2 * x.size(3)]),
    }
    calls, changes = rewritten(lambda x, _, weight: pointwise(ways[mode](x), weight))

    large = {functional.interpolate}
    assert [each for each in calls if each in {torch.conv2d, *large}] == [torch.conv2d, functional.interpolate]
    assert [each.after for each in changes] == ["pointwise_first"]
    assert changes[0].why.startswith("its MACs are over 16x16 pixels instead of ")


def test_the_up_sampling_then_stands_in_front_of_the_next_convolution() -> None:
    """Through two pointwise ones: all MACs are over the small map."""

    def function(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
        wide = torch.cat([weight, weight])
        return torch.conv2d(torch.cat([pointwise(pointwise(up(x), wide), wide), skip], 1), weight, padding=1)

    calls, changes = rewritten(function)

    assert functional.interpolate not in calls
    assert calls.index(torch.conv2d) < calls.index(convolve)
    assert [each.after for each in changes] == ["pointwise_first", "pointwise_first", "tap_first"]


def _zeros(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return pointwise(functional.pad(up(x), [0, 1, 0, 0]), weight)


def _wider(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return pointwise(up(x[:, :31]), weight)


def _read(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    y = up(x)
    return pointwise(y, weight) + pointwise(y[:, :32] * 2, weight)


def _shared(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    y = up(x)
    return pointwise(y, weight) + torch.conv2d(y, weight[:, :64], padding=1)


def _larger(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(up(x), weight[:, :64], padding=1)


def _stride(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return pointwise(up(x), weight, stride=2)


def _around(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return pointwise(up(x), weight, padding=1)


def _small_written(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    y = up(x)
    x.mul_(2)
    return pointwise(y, weight)


def _behind(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    return pointwise(torch.cat([up(x), skip], 1), weight)


@pytest.mark.parametrize(
    "function", [_zeros, _wider, _read, _shared, _larger, _stride, _around, _small_written, _behind]
)  # fmt: skip
def test_a_pointwise_convolution_that_would_lose_or_change_stays(function: Callable[..., Any]) -> None:
    """Zeros get its bias, more channels take longer to up-sample, and others read or write the maps."""
    _, changes = rewritten(function)

    assert "pointwise_first" not in [each.after for each in changes]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_autocast_has_a_say_in_the_order() -> None:
    """On a CPU it up-samples in 32 bits and convolves in 16: then the result would have another type."""

    def function(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pointwise(up(x.float()), weight.float()).double()

    _, changes = rewritten(function)

    assert "pointwise_first" not in [each.after for each in changes]
