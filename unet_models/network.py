"""The one executor: an `nn.Module` that runs any `SkipGraph`. There is no other `forward` in the suite.

It is the interpreter of the graph's `Program`, as its ops rewrote it, and knows no order of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from skipcost.unet_models.ops import REFERENCE, AttentionGate, ConvNormAct, Ops, prepare, run
from skipcost.unet_models.program import lower
from skipcost.unet_models.topology import Edge, SkipGraph

if TYPE_CHECKING:
    from skipcost.unet_models.spec import ModelSpec

Output = Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Tensor]
OUTPUTS = ("final", "all")


class EdgeLayers(nn.Module):
    """The weights on one edge; an attribute is None where the edge has no such step."""

    def __init__(self, edge: Edge, *, valid: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(edge.up.in_channels, edge.up.out_channels, 2, stride=2) if edge.up else None
        self.gate = AttentionGate(edge.gate) if edge.gate else None
        self.conv = ConvNormAct(edge.conv, valid=valid) if edge.conv else None
        self.project = ConvNormAct(edge.project, valid=False) if edge.project else None


class SkipNet(nn.Module):
    """A network made from a graph. Input (N, in_channels, H, W); logits (N, classes, H', W').

    Returns the logits of the only head, or a list with those of all heads, the deployed one first, cropped to the
    smallest. With a classifier it returns `(maps, class_logits)`: the maps as probabilities, 0 everywhere in an image
    whose two class logits (N, 2) say "no organ" (index 0, ties included), and the class logits to be trained with
    cross-entropy. The authors' code masks the logits, which turns "no organ" into 0.5, and returns no class scores.
    """

    def __init__(self, graph: SkipGraph, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.graph = graph
        valid = graph.padding == "valid"
        self.edges = nn.ModuleDict({edge.name: EdgeLayers(edge, valid=valid) for edge in graph.edges if edge.convs})
        self.nodes = nn.ModuleDict(
            {node.name: nn.ModuleList(ConvNormAct(conv, valid=valid) for conv in node.convs) for node in graph.nodes}
        )
        self.heads = nn.ModuleDict({head.node: ConvNormAct(head.conv, valid=valid) for head in graph.heads})
        self.classifier = ConvNormAct(graph.classifier.conv, valid=False) if graph.classifier else None
        self.use(ops)

    def use(self, ops: Ops) -> None:
        """Run on other ops from now on."""
        self.ops = ops
        self.program = ops.rewrite(lower(self.graph))
        self._steps = prepare(self.program.ops[1:], ops.functions, self.program.results, 1)

    def forward(self, image: Tensor) -> Output:
        """Run the network on (N, in_channels, H, W)."""
        results = [image]
        with self.ops.around():
            run(self._steps, self._find, results)
        maps = [results[number] for number in self.program.outputs]
        output = maps if len(maps) > 1 else maps[0]
        return output if self.program.class_logits is None else (output, results[self.program.class_logits])

    def _find(self, path: tuple[str, ...]) -> nn.Module:
        """Return the module at a path; what stands there now, not when the network was built."""
        module: Any = self
        for name in path:
            module = module._modules[name]  # noqa: SLF001 - getattr asks three dictionaries
        return cast("nn.Module", module)


def build(spec: ModelSpec, ops: Ops = REFERENCE, outputs: str = "all") -> SkipNet:
    """Build the network of `spec` with fresh weights.

    outputs: "all" has every head; "final" is the deployed form, with the first head and what it reads.
    """
    if outputs not in OUTPUTS:
        message = f"outputs={outputs!r} is unknown; accepted: {', '.join(OUTPUTS)}"
        raise ValueError(message)
    graph = spec.graph()
    return SkipNet(graph.final() if outputs == "final" else graph, ops)
