"""What the backend makes of a graph: one call in place of up-sampling, concatenation and convolution, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from skipcost.kernels.rewriting import enlarged
from skipcost.kernels.rewriting.change import Change
from skipcost.kernels.rewriting.enlarged import convolve
from skipcost.kernels.rewriting.graph import rewrite_graph

X, SKIP, WEIGHT = (1, 64, 16, 16), (1, 8, 32, 32), (32, 72, 3, 3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite maps that are small enough for tests."""
    monkeypatch.setattr(enlarged, "FEWEST_MACS", 0)
    monkeypatch.setattr(enlarged, "FEWEST_PIXELS", 0)


def rewritten(function: Callable[..., Any]) -> tuple[list[Any], list[Change]]:
    """Return the functions of a function's graph after the rewrite, in order, and the changes.

    Results, and what becomes of the inputs, are those of the function itself, in float64.
    """
    found: list[Any] = []

    def keep(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        changes = rewrite_graph(module.graph)
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
