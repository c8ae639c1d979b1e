"""Which form a convolution over an up-sampled map takes under `backend=rewritten`, by counting, with the reason.

`choose` decides one call; `rewritings` lists the calls of a network, and `executed_macs` adds up what then runs. The
rule sees MACs, because bytes and live memory are always in favour of tap-first: it forms no up-sampled map. Arithmetic
alone, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from skipcost.kernels import tap_costs
from skipcost.kernels.tap_axis import Axis
from skipcost.unet_models.geometry import EdgeSize, sizes
from skipcost.unet_models.topology import Edge, Node, SkipGraph

BAND = 2.5  # a MAC of the banded products takes as long as this many of a convolution: two cores, Xeon, AVX-512, fp32
# How many MACs of the direct form a device does in the time of one of tap-first's, which is in fp32. CPUs: measured
# with AMX, which multiplies bf16 (512 to 256 channels, x2: 2.5; 160 to 32, x8: 1.8). GPUs: an H100's published rates.
RATES = {
    ("cpu", "fp32"): 1.0,
    ("cpu", "tf32"): 1.0,
    ("cpu", "16 bits"): 3.0,
    ("cuda", "fp32"): 1.0,
    ("cuda", "tf32"): 7.4,
    ("cuda", "16 bits"): 14.8,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Both forms of one call, whole batch: MACs, bytes of maps read and written, and bytes alive beside the input.

    tap_bytes and tap_live_bytes leave out blocks that are used again for the next 16 rows. taken: whether tap-first
    runs. why: the reason, in numbers.
    """

    direct_macs: int
    tap_macs: int
    direct_bytes: int
    tap_bytes: int
    direct_live_bytes: int
    tap_live_bytes: int
    taken: bool
    why: str

    @property
    def macs(self) -> int:
        """MACs of the form that is taken."""
        return self.tap_macs if self.taken else self.direct_macs


@dataclass(frozen=True, slots=True)
class Rewriting:
    """One edge of a network whose up-sampled map goes into a convolution, and what was chosen for it."""

    edge: str
    choice: Choice


def precision_kind(precision: str) -> str:
    """Return the key of RATES for a case's precision: fp32, tf32 or 16 bits."""
    return precision if precision in ("fp32", "tf32") else "16 bits"


def choose(
    rows: Axis, columns: Axis, channels: tuple[int, int], batch: int = 1, *, kind: str = "fp32", device: str = "cpu"
) -> Choice:  # fmt: skip
    """Count both forms of a convolution of `channels` = (in, out) over an up-sampled map, and take the cheaper."""
    direct = tap_costs.direct(rows, columns, channels, batch)
    products = tap_costs.forward(rows, columns, channels, batch)
    rate = RATES[device, kind]
    weighed = rate * (products.taps + BAND * products.bands)
    taken = weighed < direct
    value = 2 if kind == "16 bits" else 4
    low = batch * channels[0] * rows.extent * columns.extent * value
    up = batch * channels[0] * rows.length * columns.length * value
    out = batch * channels[1] * rows.output * columns.output * value
    why = (
        f"{products.taps / 1e6:,.1f} M MACs over channels and {BAND} times {products.bands / 1e6:,.1f} M in bands"
        + (f", all times {rate} for products in fp32" if rate != 1 else "")
        + f", are {'less' if taken else 'not less'} than the direct form's {direct / 1e6:,.1f} M"
    )
    return Choice(direct, products.macs, low + 2 * up + out, low + out, up + out, out, taken, why)


def rewritings(
    graph: SkipGraph, height: int, width: int, *, batch: int = 1, precision: str = "fp32", device: str = "cpu"
) -> tuple[Rewriting, ...]:  # fmt: skip
    """List every edge that can be rewritten, with both forms counted and the one that runs."""
    along_rows, along_columns = sizes(graph, height, width)
    kind = precision_kind(precision)
    made = []
    for node in graph.nodes:
        for edge, channels in _linear(node):
            y, x = along_rows.edges[edge.name], along_columns.edges[edge.name]
            rows, columns = (_axis(edge, size, graph.padding, merged=not edge.conv) for size in (y, x))
            made.append(Rewriting(edge.name, choose(rows, columns, channels, batch, kind=kind, device=device)))
    return tuple(made)


def executed_macs(
    graph: SkipGraph, height: int, width: int, *, batch: int = 1, precision: str = "fp32", device: str = "cpu"
) -> int:  # fmt: skip
    """Count the MACs that `backend=rewritten` runs forwards, its banded products included."""
    made = rewritings(graph, height, width, batch=batch, precision=precision, device=device)
    saved = sum(each.choice.direct_macs - each.choice.macs for each in made)
    return batch * graph.conv_macs(height, width) - saved


def _linear(node: Node) -> Iterator[tuple[Edge, tuple[int, int]]]:
    """Yield the edges of a node between whose up-sampling and convolution nothing stands, with (in, out) channels.

    The map that steers a gate is up-sampled for the gate as well, so it stays as it is.
    """
    gated = any(edge.gate for edge in node.inputs)
    for edge in node.inputs:
        if edge.shift <= 0 or edge.up or (gated and edge is node.deeper):
            continue
        if edge.conv:
            yield edge, (edge.in_channels, edge.conv.out_channels)
        elif edge is node.inputs[-1] and edge is node.deeper and not edge.project and node.merge == "concat":
            yield edge, (edge.in_channels, node.convs[0].out_channels)


def _axis(edge: Edge, size: EdgeSize, padding: str, *, merged: bool) -> Axis:
    """Return one axis of an edge's convolution, or of its part of the node's, which reads the map cropped."""
    length = size.merged if merged else size.resampled
    start = (size.resampled - length) // 2
    mode = edge.mode or "bilinear"
    return Axis(size.source, 1 << edge.shift, mode, False, start, length, 3, 0 if padding == "valid" else 1)
