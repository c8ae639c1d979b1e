"""Draw the rooms of the house into docs/tour.md, from the imports of the code: `nox -s tour`.

A room is a sub-package, or a module at the top of a package; an arrow leads from a room to one that it imports. One
that follows from two others is left out (transitive reduction), so that what is drawn is the order and not a thicket.
Imports for annotations alone are no dependencies. Exit code 1 with --check where the page has another picture.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tour.md"
PACKAGES = ("reports", "bench", "kernels", "unet_models")
BEGIN, END = "```mermaid\n", "```\n"


def modules() -> dict[str, Path]:
    """Every module by its dotted name, from the package on."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a tree imports from the suite, but for annotations; a name may be no module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("skipcost."):
            where = (child.module or "").removeprefix("skipcost.")
            yield from (f"{where}.{each.name}" for each in child.names)
        yield from imported(child)


def room_of(module: str) -> str:
    """Return the room that a module lies in; a package's own door is part of none."""
    return ".".join(module.split(".")[:2])


def arrows() -> dict[str, set[str]]:
    """Rooms by room that imports them."""
    known, found = modules(), defaultdict(set)
    for module, path in known.items():
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            target = name if name in known else name.rpartition(".")[0]
            source, read = room_of(module), room_of(target)
            if source != read and "." in source and "." in read and not source.endswith("__main__"):
                found[source].add(read)
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out each arrow that a longer way replaces; ValueError in a circle, where there is no order to draw."""
    beyond: dict[str, set[str]] = {}

    def reach(room: str, way: tuple[str, ...] = ()) -> set[str]:
        if room in way:
            message = f"rooms import each other in a circle: {' -> '.join((*way, room))}"
            raise ValueError(message)
        if room not in beyond:
            beyond[room] = {each for read in graph.get(room, ()) for each in (read, *reach(read, (*way, room)))}
        return beyond[room]

    return {room: reads - {each for read in reads for each in reach(read)} for room, reads in graph.items()}


def picture() -> str:
    """Return the drawing as Mermaid's text: a box for each package with its rooms, and the arrows."""
    graph = arrows()
    rooms = sorted({*graph, *(read for reads in graph.values() for read in reads)})
    lines = ["flowchart TB"]
    for package in PACKAGES:
        lines.append(f"  subgraph {package}")
        inside = (room for room in rooms if room.startswith(f"{package}."))
        lines.extend(f"    {room}[{room.partition('.')[2]}]" for room in inside)
        lines.append("  end")
    lines.extend(f"  {room} --> {read}" for room, reads in sorted(reduced(graph).items()) for read in sorted(reads))
    return "\n".join(lines) + "\n"


def drawn(page: str) -> str:
    """Return the page with today's picture in the place of the one that it has."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + picture() + end + after


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(drawn(text) != text)
    PAGE.write_text(drawn(text), encoding="utf-8")
