"""Arithmetic counts what networks multiply beside convolutions, under the one name that each layer has."""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Callable

import pytest
import torch
from custom_models import Between
from torch import Tensor, nn
from torch.nn import functional

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.factory import Factory
from skipcost.bench.measure.arithmetic import (
    ACTIVATED,
    ATTENTION,
    CONVOLUTION,
    PRODUCT,
    RECURRENT,
    Place,
    aliases_of,
    arithmetic,
    paths_of,
)
from skipcost.bench.measure.tracing import count_convolutions

pytestmark = pytest.mark.usefixtures("one_thread")
N, L, C = 2, 12, 8  # images, positions, channels


class Calling(nn.Module):
    """Calls a function on tokens (N, L, C), as a module without further ones."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, C) -> whatever the function returns."""
        return self.function(tokens)


def attend(tokens: Tensor, **how: object) -> Tensor:
    """Attention over the tokens, in two heads."""
    heads = tokens.unflatten(-1, (2, C // 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, **how)


def grouped(tokens: Tensor) -> Tensor:
    """Two heads of queries that share one of keys and values."""
    heads = tokens.unflatten(-1, (2, C // 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads[:, :1], heads[:, :1], enable_gqa=True)


def kinds_of(network: nn.Module, tokens: Tensor) -> dict[str, int]:
    """MACs by kind of operator."""
    sums: Tally[str] = Tally()
    for place in arithmetic(network.eval(), tokens):
        sums[place.kind] += place.macs
    return dict(sums)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "matmul": (lambda t: t @ t.mT, {PRODUCT: N * L * L * C}),
    "matmul with a vector": (lambda t: t @ t[0, 0], {PRODUCT: N * L * C}),
    "dot": (lambda t: t[0, 0] @ t[0, 1], {PRODUCT: C}),
    "bmm": (lambda t: torch.bmm(t, t.mT), {PRODUCT: N * L * L * C}),
    "baddbmm": (lambda t: torch.baddbmm(t.new_zeros(N, L, L), t, t.mT), {PRODUCT: N * L * L * C}),
    "addbmm": (lambda t: torch.addbmm(t.new_zeros(L, L), t, t.mT), {PRODUCT: N * L * L * C}),
    "einsum": (lambda t: torch.einsum("nic,njc->nij", t, t), {PRODUCT: N * L * L * C}),
    "linear": (lambda t: functional.linear(t, t[0]), {PRODUCT: N * L * C * L}),
    "attention": (attend, {ATTENTION: 2 * N * L * L * C}),
    "causal attention": (lambda t: attend(t, is_causal=True), {ATTENTION: 2 * N * L * L * C}),
    "masked attention": (lambda t: attend(t, attn_mask=t.new_zeros(L, L)), {ATTENTION: 2 * N * L * L * C}),
    "grouped attention": (grouped, {ATTENTION: 2 * N * L * L * C}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_of_a_product_is_counted(name: str) -> None:
    """By hand: rows times columns times what is summed over; attention has two such products over all heads."""
    function, expected = FUNCTIONS[name]

    found = kinds_of(Calling(function), torch.randn(N, L, C))

    if ATTENTION in expected and ATTENTION not in found:  # a form that the CPU has no kernel for is two products
        expected = {PRODUCT: expected[ATTENTION]}
    assert found == expected


PROJECTIONS = 4 * N * L * C * C
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(C, 2, batch_first=True),
        {PRODUCT: PROJECTIONS + 2 * N * L * L * C},
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(C, 2, 20, batch_first=True),
        {PRODUCT: PROJECTIONS + 2 * N * L * L * C + N * L * C * 20, ACTIVATED: N * L * C * 20},
    ),
    "LSTM": (lambda: nn.LSTM(C, 5, batch_first=True), {RECURRENT: N * L * 4 * 5 * (C + 5)}),
    "GRU": (lambda: nn.GRU(C, 5, batch_first=True), {PRODUCT: N * L * 3 * 5 * (C + 5)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_run_in_one_piece_are_counted(name: str) -> None:
    """At inference PyTorch takes whole layers in one operator, which is no reason to leave them out."""
    make, expected = LAYERS[name]
    layer = make()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, tokens: Tensor) -> object:
            several = isinstance(self.layer, nn.MultiheadAttention)
            return self.layer(tokens, tokens, tokens, need_weights=False) if several else self.layer(tokens)

    assert kinds_of(Network(), torch.randn(N, L, C)) == expected


@pytest.mark.parametrize("form", Between.FORMS)
def test_arithmetic_is_what_the_row_of_conv_macs_says(form: str) -> None:
    """Convolutions are `conv_macs`, and all else is what its note says stands beside them."""
    case = Case(spec=Factory("custom_models:Between", json.dumps({"form": form})), height=8, width=8, batch=2)
    row = count_convolutions(case)[0]

    places = arithmetic(Between(form).eval(), torch.randn(2, 1, 8, 8))

    convolutions = sum(place.macs for place in places if place.kind == CONVOLUTION)
    assert convolutions == row.samples[0]
    assert sum(place.macs for place in places) - convolutions == sum(row.detail["other_macs"].values()) > 0


class Holding(nn.Module):
    """A decoder that holds the encoder, which also has a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
        self.encoder.first = self.encoder[0]
        self.decoder = nn.Module()
        self.decoder.encoder, self.decoder.last = self.encoder, nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W)."""
        return self.decoder.last(self.encoder.first(image))


def test_a_layer_goes_by_the_first_of_its_names() -> None:
    """Whatever it is called by, and although its parent's own forward never runs."""
    network = Holding()

    places = arithmetic(network, torch.zeros(1, 1, 3, 3))

    assert places == [Place("encoder.0", CONVOLUTION, 18), Place("decoder.last", CONVOLUTION, 18)]


def test_further_names_are_told_once() -> None:
    """What lies inside of an alias is not listed again; a module that holds itself does not end in a loop."""
    network = Holding()
    network.decoder.up = network

    found = aliases_of(paths_of(network))

    assert found == {"encoder.0": ["encoder.first"], "encoder": ["decoder.encoder"]}
