"""Make workflows/*.json, the form that the frontend loads, from workflows/api/*.json and workflows/layouts.

`python3 dev.py workflows` calls it with a running server: the nodes' sockets and widgets come from its
/object_info, so that a node that has changed only needs the files made anew. `--pictures` also runs each
workflow there and makes the thumbnails and docs/pictures from what comes out.

A layout has notes, rows of groups of columns of nodes (by the ids of the API file, or `note:NAME`), and
the rows of pictures of the thumbnail (an input's file name, or the id of a SaveImage node).
"""

from __future__ import annotations

import argparse
import json
import os
import uuid
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say
from hywu_core.errors import HYWUError
from hywu_core.headless.graph import read_graph
from hywu_core.headless.local import get_json

HERE = Path(__file__).parent
#: The project's name in pyproject.toml, under which the registry lists it.
EXTENSION = "hywu"
TITLE, SLOT, WIDGET, GAP, MARGIN = 30, 20, 24, 30, 20
GROUP_TITLE, GROUP_GAP = 50, 50
WIDTH = 310
#: Width and height of nodes that show pictures, maps or long texts; the others are as high as needed.
SIZES = {
    "LoadImage": (WIDTH, 340),
    "SaveImage": (WIDTH, 340),
    "HYWUGenerateLoRA": (WIDTH, 320),
    "HYWULoadLoRA": (WIDTH, 320),
    "HYWUInspectLoRA": (WIDTH, 560),
    "PreviewAny": (WIDTH, 400),
    "PrimitiveStringMultiline": (WIDTH, 110),
    "CLIPTextEncode": (WIDTH, 110),
    "HYWUConditionEncode": (WIDTH, 260),
    "HYWUTrainGenerator": (WIDTH, 1080),
}
#: Widgets at the end of stock nodes that newer ComfyUIs require. Older servers ignore them in a prompt,
#: older frontends their values; no socket is written for them.
NEWER = {"LoraModelLoader": {"bypass": ["BOOLEAN", {"default": False}]}}
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
GROUP_COLOURS = ("#3f789e", "#3f6e4e", "#8a6d3b", "#6b4f8a")


def is_widget(spec: list) -> bool:
    """Whether the frontend makes a widget for this input of /object_info, and not only a socket."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    known = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    return known and not options.get("forceInput")


def inputs_of(info: dict[str, Any]) -> list[tuple[str, list, bool]]:
    """(name, spec, optional) of a node's inputs, in the order of its definition."""
    found = []
    for part in ("required", "optional"):
        specs = info["input"].get(part) or {}
        order = (info.get("input_order") or {}).get(part) or list(specs)
        found += [(name, specs[name], part == "optional") for name in order]
    known = {name for name, _, _ in found}
    newer = NEWER.get(info["name"], {}).items()
    return found + [(name, spec, False) for name, spec in newer if name not in known]


def widget_values(info: dict[str, Any], inputs: dict[str, Any]) -> list[Any]:
    """Values in the order of the node's widgets; linked ones hold their default."""
    values: list[Any] = []
    for name, spec, _ in inputs_of(info):
        if not is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        value = inputs.get(name)
        if value is None or isinstance(value, list):
            choices = spec[0] if isinstance(spec[0], list) else options.get("options") or [""]
            blank = "" if spec[0] == "STRING" else 0
            value = options.get("default", choices[0] if choices != [""] else blank)
        values.append(value)
        if options.get("control_after_generate") or name in ("seed", "noise_seed"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


class Canvas:
    """One workflow on its way from the API form to the frontend's."""

    def __init__(self, name: str, graph: dict, layout: dict, info: dict) -> None:
        self.name, self.graph, self.layout, self.info = name, graph, layout, info
        self.links: list[list] = []
        self.nodes: dict[str, dict] = {}
        self.groups: list[dict] = []

    def build(self) -> dict[str, Any]:
        """The workflow as the frontend saves it. Raises HYWUError where file, layout and server disagree."""
        for ident, node in self.graph.items():
            self.nodes[ident] = self.node(int(ident), node)
        for ident, node in self.graph.items():
            self.connect(ident, node)
        first = max(map(int, self.graph)) + 1
        for number, (name, note) in enumerate(self.layout["notes"].items(), first):
            self.nodes[f"note:{name}"] = self.note(number, note)
        width, height = self.place()
        # Below this, frontends leave out all texts: the upper left is more than a gray overview.
        scale = round(max(0.62, min(1.0, 1500 / width, 820 / height)), 2)
        ordered = sorted(self.nodes.values(), key=lambda node: node["id"])
        for order, node in enumerate(ordered):
            node["order"] = order
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/{self.name}")),
            "revision": 0,
            "last_node_id": max(node["id"] for node in ordered),
            "last_link_id": len(self.links),
            "nodes": ordered,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": scale, "offset": [round(90 / scale), round(150 / scale)]}},
            "version": 0.4,
        }

    def node(self, ident: int, node: dict) -> dict[str, Any]:
        """Sockets first, then the sockets of widgets, as the frontend orders them."""
        kind = node["class_type"]
        if kind not in self.info:
            raise HYWUError(f"{self.name}: the server doesn't know the node {kind}; update it.")
        info = self.info[kind]
        sockets, widgets = [], []
        newer = NEWER.get(kind, {})
        for name, spec, optional in inputs_of(info):
            if name in newer:
                continue
            entry: dict[str, Any] = {"name": name, "type": spec[0], "link": None}
            if optional:
                entry["shape"] = 7
            if is_widget(spec):
                entry["type"] = "COMBO" if isinstance(spec[0], list) else spec[0]
                entry["widget"] = {"name": name}
            (widgets if is_widget(spec) else sockets).append(entry)
        unknown = set(node["inputs"]) - set(newer) - {entry["name"] for entry in sockets + widgets}
        if unknown:
            raise HYWUError(f"{self.name}: {kind} has no input {', '.join(sorted(unknown))}.")
        # Where a manager finds a missing node; without it, frontends ask the registry for each node.
        pack = EXTENSION if info["python_module"].startswith("custom_nodes.") else "comfy-core"
        made = {
            "id": ident, "type": kind, "pos": [0, 0], "size": list(self.size(info, sockets, widgets)),
            "flags": {}, "order": 0, "mode": 0, "inputs": sockets + widgets,
            "outputs": [
                {"name": name, "type": output, "links": None}
                for name, output in zip(info["output_name"], info["output"], strict=True)
            ],
            "properties": {"cnr_id": pack, "Node name for S&R": kind},
            "widgets_values": widget_values(info, node["inputs"]),
        }  # fmt: skip
        title = (node.get("_meta") or {}).get("title")
        return {**made, "title": title} if title else made

    def size(self, info: dict, sockets: list, widgets: list) -> tuple[int, int]:
        rows = max(len(sockets), len(info["output"]))
        return SIZES.get(info["name"], (WIDTH, SLOT * rows + (WIDGET + 4) * len(widgets) + 20))

    def connect(self, ident: str, node: dict) -> None:
        target = self.nodes[ident]
        for slot, entry in enumerate(target["inputs"]):
            value = node["inputs"].get(entry["name"])
            if not isinstance(value, list):
                continue
            source, index = self.nodes[value[0]], value[1]
            output = source["outputs"][index]
            link = [len(self.links) + 1, source["id"], index, target["id"], slot, output["type"]]
            self.links.append(link)
            entry["link"] = link[0]
            output["links"] = [*(output["links"] or []), link[0]]

    def note(self, ident: int, note: dict) -> dict[str, Any]:
        text = "\n".join(note["text"])
        lines = sum(1 + len(line) // 48 for line in note["text"])
        return {
            "id": ident, "type": "MarkdownNote", "title": note["title"], "pos": [0, 0],
            "size": [WIDTH, max(90, 50 + 17 * lines)], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], **NOTE_COLOURS,
        }  # fmt: skip

    def place(self) -> tuple[int, int]:
        """Put nodes and groups at their places; returns the size of the whole."""
        placed: list[str] = []
        top = right = 0
        for row in self.layout["rows"]:
            left, bottom = 0, top
            for group in row:
                width, height = self.place_group(group, left, top)
                placed += [name for column in group["columns"] for name in column]
                left += width + GROUP_GAP
                right, bottom = max(right, left), max(bottom, top + height)
            top = bottom + GROUP_GAP
        if sorted(placed) != sorted(self.nodes):
            odd = set(placed) ^ set(self.nodes) or {n for n in placed if placed.count(n) > 1}
            raise HYWUError(
                f"layouts/{self.name}.json: {', '.join(sorted(odd))} must be placed once, and exist."
            )
        return right, top

    def place_group(self, group: dict, left: int, top: int) -> tuple[int, int]:
        x, bottom = left + MARGIN, top
        for column in group["columns"]:
            y, width = top + GROUP_TITLE + TITLE, 0
            for name in column:
                if name not in self.nodes:
                    raise HYWUError(f"layouts/{self.name}.json places {name}, which is no node.")
                node = self.nodes[name]
                node["pos"] = [x, y]
                width = max(width, node["size"][0])
                y += node["size"][1] + TITLE + GAP
            x, bottom = x + width + GAP, max(bottom, y - TITLE - GAP)
        width, height = x - GAP + MARGIN - left, bottom + MARGIN - top
        self.groups.append({
            "id": len(self.groups) + 1, "title": group["title"],
            "bounding": [left, top, width, height],
            "color": GROUP_COLOURS[group.get("colour", 0)], "font_size": 24, "flags": {},
        })  # fmt: skip
        return width, height


def write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.build", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--pictures", action="store_true", help="run them for the thumbnails, too")
    parser.add_argument("names", nargs="*", help="workflows to make; all by default")
    args = parser.parse_args()
    info = get_json(f"{args.server}/object_info", timeout=60)
    for path in sorted((HERE / "layouts").glob("*.json")):
        if args.names and path.stem not in args.names:
            continue
        layout = json.loads(path.read_text(encoding="utf-8"))
        graph = read_graph(HERE / "api" / path.name)
        saved = Canvas(path.stem, graph, layout, info).build()
        text = json.dumps(saved, indent=1, ensure_ascii=False) + "\n"
        write(HERE / path.name, text.encode())
        say(f"workflows/{path.name}")
        if args.pictures:
            from .pictures import make_pictures

            for made in make_pictures(args.server, path.stem, graph, layout):
                say(made)


if __name__ == "__main__":
    main()
