"""Where the wires of a graph run, and which nodes they run behind or along.

Both renderers of the frontend draw a wire as the same spline: a cubic curve between the two sockets, whose
inner points lie a quarter of the sockets' distance to the right of the output and to the left of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .canvas import INPUT, OUTPUT, SLOT, TITLE, WIDGET

#: How near a wire may come to a node that it doesn't belong to, and reach behind one that it does: the
#: classic renderer's sockets lie 10 within.
MARGIN, BEHIND = 8, 16
POINTS = 100


class Box(NamedTuple):
    """A node with its title."""

    ident: int
    name: str
    left: float
    top: float
    right: float
    bottom: float

    def holds(self, x: float, y: float, margin: float) -> bool:
        across = self.left - margin < x < self.right + margin
        return across and self.top - margin < y < self.bottom + margin


class Wire(NamedTuple):
    """From the node `source`, at `start`, to the node `target`, at `end`."""

    source: int
    target: int
    start: tuple[float, float]
    end: tuple[float, float]

    def points(self) -> Iterator[tuple[float, float]]:
        """The curve, from its start to its end."""
        (ax, ay), (bx, by) = self.start, self.end
        bend = 0.25 * math.dist(self.start, self.end)
        for number in range(POINTS + 1):
            t = number / POINTS
            s = 1 - t
            near, far = 3 * s * s * t, 3 * s * t * t
            x = s**3 * ax + near * (ax + bend) + far * (bx - bend) + t**3 * bx
            yield x, (s**3 + near) * ay + (far + t**3) * by


def boxes_of(level: dict[str, Any]) -> list[Box]:
    """The nodes of a saved graph or subgraph."""
    found = []
    for node in level["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        name = node.get("title") or node["type"]
        found.append(Box(node["id"], name, x, y - TITLE, x + width, y + height))
    return found


def wires_of(level: dict[str, Any]) -> list[Wire]:
    """The links of a saved graph or subgraph, where the classic renderer has its sockets."""
    nodes = {node["id"]: node for node in level["nodes"]}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    found = []
    for link in level["links"]:
        _, source, slot, target, socket = (
            [link[k] for k in keys] if isinstance(link, dict) else link[:5]
        )
        start = _port(level, source, slot) or _output(nodes[source], slot)
        end = _port(level, target, socket) or _input(nodes[target], socket)
        found.append(Wire(source, target, start, end))
    return found


def _port(level: dict, ident: int, slot: int) -> tuple[float, float] | None:
    """An input or output of a subgraph, seen from inside."""
    side = {INPUT: "inputs", OUTPUT: "outputs"}.get(ident)
    return tuple(level[side][slot]["pos"]) if side else None


def _output(node: dict, slot: int) -> tuple[float, float]:
    return node["pos"][0] + node["size"][0], node["pos"][1] + (slot + 0.7) * SLOT


def _input(node: dict, socket: int) -> tuple[float, float]:
    plain = [number for number, one in enumerate(node["inputs"]) if "widget" not in one]
    x, y = node["pos"]
    if socket in plain:
        return x, y + (plain.index(socket) + 0.7) * SLOT
    rows = max(len(plain), len(node["outputs"]))
    return x, y + SLOT * rows + WIDGET * (socket - len(plain) + 0.5)


def behind(wires: Iterable[Wire], boxes: Iterable[Box], margin: float = MARGIN) -> list[str]:
    """A line for each wire that runs behind a node, or within `margin` of one that isn't its own."""
    named = {box.ident: box.name for box in boxes}
    found = []
    for wire in wires:
        points = list(wire.points())
        for box in boxes:
            room = -BEHIND if box.ident in (wire.source, wire.target) else margin
            if any(box.holds(x, y, room) for x, y in points):
                source, target = (named.get(i, "the edge") for i in (wire.source, wire.target))
                found.append(f"the wire from '{source}' to '{target}' runs behind '{box.name}'")
    return found
