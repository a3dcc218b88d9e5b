"""Subgraphs: what lies in workflows/blueprints, as the frontend's definitions and as flat graphs.

A blueprint has a title, a description, the names of its `inputs` (["in", NAME] as the value of a node's
input inside), its `outputs` (NAME -> [node, output]), `nodes` in the API format, and the `columns` they stand
in. A node of the class `blueprint:NAME` is another blueprint inside; links name its outputs. Ids are unique
over all blueprints, because frontends give duplicates other ids. Those with `library` are also
written to subgraphs/TITLE.json, where ComfyUI offers them as nodes of their own.

In a queued prompt, a node of a subgraph is called by the ids on the way to it: "20:101".
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hywu_core.errors import HYWUError

from .canvas import (
    BADGE,
    EXTENSION,
    INPUT,
    OUTPUT,
    SLOT,
    TEXT,
    WIDGET,
    WIDTH,
    Level,
    Link,
    default_of,
    entry,
    inputs_of,
    is_widget,
    kind_of,
)

FOLDER = Path(__file__).parent / "blueprints"
#: Start of the class of a node that is a blueprint.
PREFIX = "blueprint:"
#: Width of the nodes at which a subgraph's inputs begin and its outputs end.
EDGE = 120
#: Between these and the nodes: frontends fit only the nodes into the window, and the names must be seen, too.
EDGE_GAP = 40
#: Distance of the ids in a copy of a blueprint.
COPY = 1000


@functools.cache
def source(name: str) -> dict[str, Any]:
    """What workflows/blueprints/NAME.json says. Raises HYWUError where there is none.

    "NAME#1" is a copy of it, and of all that lie in it, with ids of its own: the frontend of ComfyUI 0.3.75
    has one text for all nodes that are the same subgraph.
    """
    name, _, copy = name.partition("#")
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise HYWUError(f"{path}: there is no such blueprint.")
    found = json.loads(path.read_text(encoding="utf-8"))
    return _renumbered(found, int(copy)) if copy else found


def renumber(path: str, copy: int) -> str:
    """A node's path inside the blueprint as it is in a copy: "131:101" becomes "1131:1101"."""
    return ":".join(str(int(ident) + COPY * copy) for ident in path.split(":"))


def _renumbered(blueprint: dict[str, Any], copy: int) -> dict[str, Any]:
    def link(value: Any) -> Any:
        inner = isinstance(value, list) and value[0] != "in"
        return [renumber(value[0], copy), value[1]] if inner else value

    nodes = {}
    for ident, node in blueprint["nodes"].items():
        inner = f"#{copy}" if blueprint_of(node) else ""
        inputs = {key: link(value) for key, value in node["inputs"].items()}
        kind = node["class_type"] + inner
        nodes[renumber(ident, copy)] = {**node, "class_type": kind, "inputs": inputs}
    outputs = {name: link(end) for name, end in blueprint["outputs"].items()}
    columns = [
        [one if isinstance(one, int) else renumber(one, copy) for one in column]
        for column in blueprint["columns"]
    ]
    return {**blueprint, "nodes": nodes, "outputs": outputs, "columns": columns}


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def blueprint_of(node: dict) -> str | None:
    """The name of the blueprint that a node is, or None for a node of a class."""
    kind = node["class_type"]
    return kind.removeprefix(PREFIX) if kind.startswith(PREFIX) else None


def identity(name: str) -> str:
    """The id of the subgraph, which is the class of its nodes."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/blueprint/{name}"))


def used(name: str) -> list[str]:
    """The blueprint with all that lie in it, each once, the innermost first."""
    found: list[str] = []
    for node in source(name)["nodes"].values():
        if inner := blueprint_of(node):
            found += used(inner)
    return list(dict.fromkeys([*found, name]))


# -- as a flat graph ------------------------------------------------------------------------------


def flatten(name: str, path: str, given: dict[str, Any]) -> tuple[dict[str, dict], dict[str, list]]:
    """(nodes by their path, outputs by their name) of a blueprint at `path`.

    given: values of its inputs, an [id, output] for a link.
    Those that are missing stay ["in", NAME].
    """
    blueprint = source(name)
    flat: dict[str, dict] = {}
    ends: dict[tuple[str, Any], list] = {}

    def resolved(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if value[0] == "in":
            return given.get(value[1], value)
        return ends.get((value[0], value[1]), [f"{path}:{value[0]}", value[1]])

    waiting = dict(blueprint["nodes"])
    while waiting:  # a blueprint inside after those whose outputs it takes
        ident = next(i for i, n in waiting.items() if not _sources(n) & waiting.keys() - {i})
        node = waiting.pop(ident)
        inputs = {key: resolved(value) for key, value in node["inputs"].items()}
        if inner := blueprint_of(node):
            nodes, outputs = flatten(inner, f"{path}:{ident}", inputs)
            flat |= nodes
            ends |= {(ident, output): end for output, end in outputs.items()}
        else:
            flat[f"{path}:{ident}"] = {"class_type": node["class_type"], "inputs": inputs}
    return flat, {output: resolved(end) for output, end in blueprint["outputs"].items()}


def _sources(node: dict) -> set[str]:
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}


# -- as the frontend's definition -----------------------------------------------------------------


def targets(name: str, wanted: str) -> Iterator[tuple[str, str]]:
    """(node, input) inside that one of the blueprint's inputs goes to."""
    for ident, node in source(name)["nodes"].items():
        for key, value in node["inputs"].items():
            if value == ["in", wanted]:
                yield ident, key


def spec_of(name: str, wanted: str, info: dict[str, Any]) -> tuple[list, bool]:
    """(spec as in /object_info, optional) of a blueprint's input: that of the first it goes to."""
    for ident, key in targets(name, wanted):
        node = source(name)["nodes"][ident]
        if inner := blueprint_of(node):
            spec, optional = spec_of(inner, key, info)
        else:
            entries = inputs_of(info[node["class_type"]])
            spec, optional = next((one[1], one[2]) for one in entries if one[0] == key)
        value = source(name).get("values", {}).get(wanted)
        if value is not None:
            options = spec[1] if len(spec) > 1 else {}
            spec = [spec[0], {**options, "default": value}]
        return spec, optional
    raise HYWUError(f"blueprints/{name}.json: its input {wanted} goes nowhere.")


def output_type(name: str, wanted: str, info: dict[str, Any]) -> str:
    ident, slot = source(name)["outputs"][wanted]
    node = source(name)["nodes"][ident]
    if inner := blueprint_of(node):
        return output_type(inner, slot, info)
    return info[node["class_type"]]["output"][slot]


def instance(name: str, ident: int, node: dict, info: dict[str, Any]) -> dict[str, Any]:
    """A node that is the blueprint, with the values of its widgets."""
    blueprint = source(name)
    labels = blueprint.get("labels", {})
    specs = {one: spec_of(name, one, info) for one in blueprint["inputs"]}
    if unknown := set(node["inputs"]) - set(specs):
        raise HYWUError(f"blueprints/{name}.json has no input {', '.join(sorted(unknown))}.")
    entries = [entry(one, *spec, labels.get(one)) for one, spec in specs.items()]
    widgets = [one for one, (spec, _) in specs.items() if is_widget(spec)]
    values = []
    for one in widgets:
        value = node["inputs"].get(one)
        if isinstance(value, list):  # what is linked shouldn't look like a text of its own
            value = "" if specs[one][0][-1].get("multiline") else None
        values.append(default_of(specs[one][0]) if value is None else value)
    texts = sum(bool(specs[one][0][-1].get("multiline")) for one in widgets)
    rows = max(len(specs) - len(widgets), len(blueprint["outputs"]))
    height = SLOT * rows + TEXT * texts + WIDGET * (len(widgets) - texts) + BADGE + 16
    return {
        "id": ident, "type": identity(name), "pos": [0, 0], "size": [WIDTH, height],
        "flags": {}, "order": 0, "mode": 0,
        "inputs": sorted(entries, key=lambda one: "widget" in one),
        "outputs": [
            {"name": one, "type": output_type(name, one, info), "links": None}
            for one in blueprint["outputs"]
        ],
        # no "proxyWidgets": frontends make these widgets from the inputs; newer ones distrust a list
        "properties": {"cnr_id": EXTENSION},
        "widgets_values": values,
        "title": (node.get("_meta") or {}).get("title") or blueprint["title"],
    }  # fmt: skip


def definition(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """The subgraph as a workflow file carries it."""
    blueprint = source(name)
    # links, like nodes, have ids of their own in every blueprint
    level = Level(f"blueprints/{name}.json", base=10 * min(map(int, blueprint["nodes"])))
    for ident, node in blueprint["nodes"].items():
        if inner := blueprint_of(node):
            level.nodes[ident] = instance(inner, int(ident), node, info)
        else:
            level.add(ident, int(ident), node, info)
    for ident, node in blueprint["nodes"].items():
        level.connect(ident, node["inputs"])
    level.place([[{"columns": [[], *blueprint["columns"]]}]])
    boxes = [(*node["pos"], *node["size"]) for node in level.nodes.values()]
    left, right = min(b[0] for b in boxes), max(b[0] + b[2] for b in boxes)
    begin, end = left - EDGE_GAP - EDGE, right + EDGE_GAP
    inputs = _edges(name, level, info, begin)
    outputs = _ends(name, level, info, end)
    return {
        "id": identity(name), "version": 1, "revision": 0, "config": {}, "name": blueprint["title"],
        "state": {
            "lastGroupId": 0, "lastNodeId": max(map(int, blueprint["nodes"])),
            "lastLinkId": level.base + len(level.links), "lastRerouteId": 0,
        },
        "inputNode": {"id": INPUT, "bounding": [begin, 0, EDGE, 40 + SLOT * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [end, 0, EDGE, 40 + SLOT * len(outputs)]},
        "inputs": inputs, "outputs": outputs, "widgets": [],
        "nodes": level.ordered(), "groups": [],
        "links": [
            {
                "id": number, "origin_id": link.source, "origin_slot": link.slot,
                "target_id": link.target, "target_slot": link.socket, "type": link.kind,
            }
            for number, link in level.numbered()
        ],
        "extra": {}, "category": blueprint.get("category", "HY-WU"),
        "description": blueprint["description"],
    }  # fmt: skip


def _port(name: str, side: str, one: str, kind: str, links: list[int], place: list[int]) -> dict:
    ident = uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/blueprint/{name}/{side}/{one}")
    port = {"id": str(ident), "name": one, "type": kind, "linkIds": links, "pos": place}
    label = source(name).get("labels", {}).get(one)
    return {**port, "label": label} if label else port


def _edges(name: str, level: Level, info: dict, left: int) -> list[dict]:
    """The subgraph's inputs, linked to where they go."""
    found = []
    for number, one in enumerate(source(name)["inputs"]):
        spec, _ = spec_of(name, one, info)
        links = []
        for ident, key in targets(name, one):
            node = level.nodes[ident]
            socket = [entry["name"] for entry in node["inputs"]].index(key)
            links.append(level.link(Link(INPUT, number, node["id"], socket, kind_of(spec))))
            node["inputs"][socket]["link"] = links[-1]
        place = [left + EDGE - 20, 20 + SLOT * number]
        found.append(_port(name, "in", one, kind_of(spec), links, place))
    return found


def _ends(name: str, level: Level, info: dict, left: int) -> list[dict]:
    """The subgraph's outputs, linked to where they come from."""
    found = []
    for number, (one, (ident, slot)) in enumerate(source(name)["outputs"].items()):
        node = level.nodes[ident]
        if isinstance(slot, str):
            slot = [output["name"] for output in node["outputs"]].index(slot)
        kind = output_type(name, one, info)
        link = level.link(Link(node["id"], slot, OUTPUT, number, kind))
        output = node["outputs"][slot]
        output["links"] = [*(output["links"] or []), link]
        found.append(_port(name, "out", one, kind, [link], [left + 20, 20 + SLOT * number]))
    return found


def library_file(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """subgraphs/TITLE.json: one node that is the blueprint, and all definitions it needs."""
    blueprint = source(name)
    last = max(int(ident) for one in used(name) for ident in source(one)["nodes"])
    node = {"class_type": PREFIX + name, "inputs": blueprint.get("values", {})}
    made = instance(name, last + 1, node, info)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/library/{name}")),
        "revision": 0, "last_node_id": last + 1, "last_link_id": 0, "nodes": [made], "links": [],
        "groups": [], "config": {}, "version": 0.4,
        "definitions": {"subgraphs": [definition(one, info) for one in used(name)]},
        "extra": {
            "BlueprintDescription": blueprint["description"],
            "BlueprintSearchAliases": blueprint.get("aliases", []),
        },
    }  # fmt: skip
