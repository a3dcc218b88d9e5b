"""One level of a workflow in the frontend's form: its nodes, links and places.

A level is the graph itself or the inside of a subgraph. `inputs_of`, `is_widget` and `widget_values` read a
node's definition in /object_info as the frontend does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hywu_core.errors import HYWUError

#: The project's name in pyproject.toml, under which the registry lists it.
EXTENSION = "hywu"
TITLE, SLOT, WIDGET, TEXT, GAP, MARGIN = 30, 20, 32, 90, 24, 20
#: Between columns there is room for a wire that goes far up or down.
COLUMN_GAP = 52
GROUP_TITLE, GROUP_GAP = 46, 40
#: Below a node of an extension, current frontends write the extension's name.
BADGE = 40
WIDTH = 310
#: Width and height of nodes that show images, maps or long texts; the others are as high as needed.
SIZES = {
    "LoadImage": (WIDTH, 350),
    "SaveImage": (WIDTH, 350),
    "HYWUGenerateLoRA": (WIDTH, 330),
    "HYWULoadLoRA": (WIDTH, 330),
    "HYWUInspectLoRA": (WIDTH, 260),
    "PreviewAny": (WIDTH, 330),
    "PrimitiveStringMultiline": (WIDTH, 120),
    "HYWUTrainGenerator": (WIDTH, 940),
}
#: Widgets at the end of stock nodes that newer ComfyUIs require. Older servers ignore them in a prompt,
#: older frontends their values; no socket is written for them.
NEWER = {"LoraModelLoader": {"bypass": ["BOOLEAN", {"default": False}]}}
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
GROUP_COLOURS = ("#3f789e", "#3f6e4e", "#8a6d3b", "#6b4f8a")
#: Id of the node at which a subgraph's inputs begin, and of that at which its outputs end.
INPUT, OUTPUT = -10, -20


def is_widget(spec: list) -> bool:
    """Whether the frontend makes a widget for this input of /object_info, and not only a socket."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    known = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    return known and not options.get("forceInput")


def kind_of(spec: list) -> str:
    """The type of a socket for this input of /object_info."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


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


def default_of(spec: list) -> Any:
    """The value that a widget has before anyone sets it."""
    options = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options") or [""]
    blank = "" if spec[0] == "STRING" else 0
    return options.get("default", choices[0] if choices != [""] else blank)


def has_control(name: str, options: dict) -> bool:
    """Whether the frontend adds a "control after generate" to this widget."""
    asked = options.get("control_after_generate")
    return bool(asked) or (asked is None and name in ("seed", "noise_seed"))


def widget_values(info: dict[str, Any], inputs: dict[str, Any]) -> list[Any]:
    """Values in the order of the node's widgets; linked ones hold their default."""
    values: list[Any] = []
    for name, spec, _ in inputs_of(info):
        if not is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        value = inputs.get(name)
        values.append(default_of(spec) if value is None or isinstance(value, list) else value)
        if has_control(name, options):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


def entry(name: str, spec: list, optional: bool, label: str | None = None) -> dict[str, Any]:
    """An input socket as the frontend saves it."""
    made: dict[str, Any] = {"name": name, "type": kind_of(spec), "link": None}
    if label:
        made["label"] = label
    if optional:
        made["shape"] = 7
    if is_widget(spec):
        made["widget"] = {"name": name}
    return made


@dataclass
class Link:
    """From output `slot` of node `source` to input `socket` of node `target`."""

    source: int
    slot: int
    target: int
    socket: int
    kind: str


@dataclass
class Level:
    """Nodes by name, their links, and the groups they lie in; ids of links begin above `base`."""

    name: str
    base: int = 0
    nodes: dict[str, dict] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(self, key: str, ident: int, node: dict, info: dict[str, Any]) -> None:
        """A node of a class. Raises HYWUError for an input that the class hasn't got."""
        kind = node["class_type"]
        if kind not in info:
            raise HYWUError(f"{self.name}: the server doesn't know the node {kind}; update it.")
        definition, newer = info[kind], NEWER.get(kind, {})
        entries = [entry(*one) for one in inputs_of(definition) if one[0] not in newer]
        unknown = set(node["inputs"]) - set(newer) - {one["name"] for one in entries}
        if unknown:
            raise HYWUError(f"{self.name}: {kind} has no input {', '.join(sorted(unknown))}.")
        # Where a manager finds a missing node; without it, frontends ask the registry for each node.
        own = definition["python_module"].startswith("custom_nodes.")
        made = {
            "id": ident, "type": kind, "pos": [0, 0],
            "size": size(definition, node["inputs"], entries),
            "flags": {}, "order": 0, "mode": 0,
            "inputs": sorted(entries, key=lambda one: "widget" in one),
            "outputs": [
                {"name": name, "type": output, "links": None}
                for name, output in zip(
                    definition["output_name"], definition["output"], strict=True
                )
            ],
            "properties": {"cnr_id": EXTENSION if own else "comfy-core", "Node name for S&R": kind},
            "widgets_values": widget_values(definition, node["inputs"]),
        }  # fmt: skip
        title = (node.get("_meta") or {}).get("title")
        self.nodes[key] = {**made, "title": title} if title else made

    def note(self, key: str, ident: int, note: dict) -> None:
        text = "\n".join(note["text"])
        # an empty line is half as high in either renderer
        lines = sum(1 + len(line) // 48 if line else 0.5 for line in note["text"])
        self.nodes[key] = {
            "id": ident, "type": "MarkdownNote", "title": note["title"], "pos": [0, 0],
            "size": [WIDTH, max(80, round(50 + 15 * lines))], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], **NOTE_COLOURS,
        }  # fmt: skip

    def connect(self, key: str, inputs: dict[str, Any]) -> None:
        """Links for the inputs of a node that are [key of another node, number or name of its output]."""
        target = self.nodes[key]
        for socket, one in enumerate(target["inputs"]):
            value = inputs.get(one["name"])
            if not isinstance(value, list) or value[0] == "in":
                continue
            source = self.nodes[value[0]]
            slot = value[1]
            if isinstance(slot, str):
                slot = [output["name"] for output in source["outputs"]].index(slot)
            output = source["outputs"][slot]
            link = Link(source["id"], slot, target["id"], socket, output["type"])
            one["link"] = self.link(link)
            output["links"] = [*(output["links"] or []), one["link"]]

    def link(self, link: Link) -> int:
        """Add it; returns its id."""
        self.links.append(link)
        return self.base + len(self.links)

    def numbered(self) -> list[tuple[int, Link]]:
        return list(enumerate(self.links, self.base + 1))

    def ordered(self) -> list[dict]:
        """The nodes by their ids, numbered for the frontend."""
        found = sorted(self.nodes.values(), key=lambda node: node["id"])
        for order, node in enumerate(found):
            node["order"] = order
        return found

    def place(self, rows: list[list[dict]]) -> None:
        """Put nodes and groups at their places: rows of groups of columns of keys, or of pixels left free.

        A group without a title has no frame. Raises HYWUError unless every node is placed once.
        """
        placed: list[str] = []
        top = 0
        for row in rows:
            left, bottom = 0, top
            for group in row:
                right, low = self._place_group(group, left, top)
                columns = group["columns"]
                placed += [name for column in columns for name in column if isinstance(name, str)]
                left, bottom = right + GROUP_GAP, max(bottom, low)
            top = bottom + GROUP_GAP
        if sorted(placed) != sorted(self.nodes):
            wrong = set(placed) ^ set(self.nodes) or {n for n in placed if placed.count(n) > 1}
            raise HYWUError(
                f"{self.name}: {', '.join(sorted(wrong))} must be placed once, and exist."
            )

    def _place_group(self, group: dict, left: int, top: int) -> tuple[int, int]:
        framed = "title" in group
        x, bottom = left + (MARGIN if framed else 0), top
        for column in group["columns"]:
            y, width = top + (GROUP_TITLE if framed else 0) + TITLE, 0
            for name in column:
                if isinstance(name, int):
                    y += name
                    continue
                if name not in self.nodes:
                    raise HYWUError(f"{self.name} places {name}, which is no node.")
                node = self.nodes[name]
                node["pos"] = [x, y]
                width = max(width, node["size"][0])
                y += node["size"][1] + TITLE + GAP
            x, bottom = x + width + COLUMN_GAP, max(bottom, y - TITLE - GAP)
        if not framed:
            return x - COLUMN_GAP, bottom
        width, height = x - COLUMN_GAP + MARGIN - left, bottom + MARGIN - top
        self.groups.append({
            "id": len(self.groups) + 1, "title": group["title"],
            "bounding": [left, top, width, height],
            "color": GROUP_COLOURS[group.get("colour", 0)], "font_size": 24, "flags": {},
        })  # fmt: skip
        return left + width, top + height


def size(info: dict[str, Any], inputs: dict[str, Any], entries: list[dict]) -> list[int]:
    """Width and height that hold a node's sockets and widgets in either renderer."""
    if info["name"] in SIZES:
        return list(SIZES[info["name"]])
    specs = {name: spec for name, spec, _ in inputs_of(info)}
    height = 0
    for one in entries:
        if "widget" not in one:
            continue
        options = specs[one["name"]][1] if len(specs[one["name"]]) > 1 else {}
        linked = isinstance(inputs.get(one["name"]), list)
        # a linked text keeps its box in the classic renderer
        height += TEXT if options.get("multiline") and not linked else WIDGET
        height += TEXT - WIDGET if options.get("multiline") and linked else 0
    rows = max(sum("widget" not in one for one in entries), len(info["output"]))
    badge = BADGE if info["python_module"].startswith("custom_nodes.") else 0
    return [WIDTH, SLOT * rows + height + badge + 16]
