"""Make the workflows that the frontend loads, and subgraphs/, from workflows/{api,layouts,blueprints}.

`python3 dev.py workflows` calls it with a running server: the nodes' sockets and widgets come from its
/object_info, so that a node that has changed only needs the files made anew. `--images` also runs each
workflow there and makes the thumbnails and docs/images from what comes out.

workflows/api/NAME.json is the graph as programs queue it. workflows/layouts/NAME.json says how a person sees
it: `file`, the name in the template dialog; `instances`, the blueprints that stand for several of its nodes
(`nodes`: path inside -> id in the API file); `notes`; `rows` of groups of columns of ids, of those of
instances, `note:NAME`, or pixels left free; `sizes` of single nodes; `app`, inputs (node, widget, its name for
people) and outputs of App mode; and the rows of
images of the `thumbnail` (an input's file name, or the id of a SaveImage node).
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from hywu_core.cli.console import say
from hywu_core.errors import HYWUError
from hywu_core.files import atomic_path
from hywu_core.headless.graph import read_graph
from hywu_core.headless.local import get_json

from . import blueprints, thumbnails
from .canvas import Level

HERE = Path(__file__).parent
ROOT = HERE.parent
SUBGRAPHS = ROOT / "subgraphs"
#: The node that holds an instruction in the API files, where programs find it by its title.
TEXT = "PrimitiveStringMultiline"


def layout_of(name: str) -> dict[str, Any]:
    return json.loads((HERE / "layouts" / f"{name}.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """The workflows, in the order of the template dialog."""
    found = [path.stem for path in (HERE / "layouts").glob("*.json")]
    return sorted(found, key=lambda name: layout_of(name)["file"])


def file_of(name: str) -> Path:
    """The workflow as the frontend loads it; its thumbnail lies beside it."""
    return HERE / f"{layout_of(name)['file']}.json"


# -- which nodes of the API file an instance stands for -------------------------------------------


class Folding:
    """An API graph with some of its nodes folded into instances of blueprints.

    graph: the API file. Afterwards `nodes` has what remains: nodes of classes and, by the instances' ids,
        nodes of the class `blueprint:NAME`. A loader that stands inside an instance may also be placed
        outside. A text node that is not placed is written into the widgets it is linked with.
    Raises HYWUError where layout and API file disagree.
    """

    def __init__(self, name: str, graph: dict[str, dict], layout: dict[str, Any]) -> None:
        self.name, self.graph = name, graph
        instances = _apart(layout.get("instances", {}))
        self.placed = {key for row in layout["rows"] for group in row for column in group["columns"]
                       for key in column}  # fmt: skip
        #: id in a prompt that the frontend queues -> id in the API file
        self.ids: dict[str, str] = {}
        #: (id in the API file, output) -> [instance, name of its output]
        self.ends: dict[tuple[str, int], list] = {}
        found = {key: self.fold(key, one) for key, one in instances.items()}
        folded = set(self.ids.values()) - self.placed
        texts = {key for key, node in graph.items() if node["class_type"] == TEXT} - self.placed
        kept = {key: node for key, node in graph.items() if key not in folded | texts}
        self.nodes = {
            key: {**node, "inputs": {k: self.outside(v) for k, v in node["inputs"].items()}}
            for key, node in {**kept, **found}.items()
        }
        self.ids |= {key: key for key in kept}

    def fold(self, key: str, one: dict) -> dict:
        """The node for one instance; its inputs are links and values of the API file."""
        flat, outputs = blueprints.flatten(one["blueprint"], key, {})
        ids = {f"{key}:{path}": ident for path, ident in one["nodes"].items()}
        if set(ids) != set(flat):
            raise self.error(key, f"names {', '.join(sorted(set(ids) ^ set(flat)))} wrongly")
        inputs: dict[str, Any] = {}
        for path, node in flat.items():
            wanted = self.graph[ids[path]]
            if node["class_type"] != wanted["class_type"]:
                raise self.error(path, f"is a {node['class_type']}, not node {ids[path]}'s class")
            if set(node["inputs"]) != set(wanted["inputs"]):
                raise self.error(path, f"has other inputs than node {ids[path]}")
            for name, value in node["inputs"].items():
                self.agree(path, name, value, wanted["inputs"][name], ids, inputs)
        self.ids |= ids
        for output, (path, slot) in outputs.items():
            self.ends[ids[path], slot] = [key, output]
        title = {"_meta": {"title": one["title"]}} if "title" in one else {}
        return {"class_type": blueprints.PREFIX + one["blueprint"], "inputs": inputs, **title}

    def agree(self, path: str, name: str, value: Any, wanted: Any, ids: dict, inputs: dict) -> None:
        """Check a value inside against the API file's; one from outside becomes the instance's input."""
        if isinstance(value, list) and value[0] == "in":
            if inputs.setdefault(value[1], wanted) != wanted:
                raise self.error(path, f"{name}: {wanted!r} here, {inputs[value[1]]!r} elsewhere")
            return
        found = [ids[value[0]], value[1]] if isinstance(value, list) else value
        if found != wanted:
            raise self.error(path, f"{name} is {found!r}, in the API file {wanted!r}")

    def outside(self, value: Any) -> Any:
        """A link to a folded node as a link to its instance's output, a text's as the text itself."""
        if not isinstance(value, list) or value[0] in self.placed:
            return value
        if self.graph[value[0]]["class_type"] == TEXT:
            return self.graph[value[0]]["inputs"]["value"]
        if value[0] in self.ids.values() and (value[0], value[1]) not in self.ends:
            raise self.error(value[0], f"no output of the blueprint is its output {value[1]}")
        return self.ends.get((value[0], value[1]), value)

    def error(self, where: str, what: str) -> HYWUError:
        return HYWUError(f"layouts/{self.name}.json and its API file: {where} {what}.")


def _apart(instances: dict[str, dict]) -> dict[str, dict]:
    """The instances, each of a blueprint of its own: later ones of the same are of its copies."""
    found: dict[str, dict] = {}
    for key, one in instances.items():
        copies = [other["blueprint"].partition("#")[0] for other in found.values()]
        if copy := copies.count(one["blueprint"]):
            nodes = {blueprints.renumber(path, copy): i for path, i in one["nodes"].items()}
            one = {**one, "blueprint": f"{one['blueprint']}#{copy}", "nodes": nodes}
        found[key] = one
    return found


def api_ids(name: str) -> dict[str, str]:
    """Id of a node in a prompt that the frontend queues ("20:101") -> its id in the API file."""
    graph = read_graph(HERE / "api" / f"{name}.json")
    return Folding(name, graph, layout_of(name)).ids


# -- the file -------------------------------------------------------------------------------------


def workflow(name: str, graph: dict, layout: dict, info: dict) -> dict[str, Any]:
    """The workflow as the frontend saves it. Raises HYWUError where file, layout and server disagree."""
    folding = Folding(name, graph, layout)
    level = Level(f"layouts/{name}.json")
    for key, node in folding.nodes.items():
        if blueprint := blueprints.blueprint_of(node):
            level.nodes[key] = blueprints.instance(blueprint, int(key), node, info)
        else:
            level.add(key, int(key), node, info)
    for key, node in folding.nodes.items():
        level.connect(key, node["inputs"])
    first = max(map(int, level.nodes)) + 1
    for number, (key, note) in enumerate(layout["notes"].items(), first):
        level.note(f"note:{key}", number, note)
    for key, measure in layout.get("sizes", {}).items():
        level.nodes[key]["size"] = measure
    level.place(layout["rows"])
    nodes = level.ordered()
    kinds = [blueprints.blueprint_of(node) for node in folding.nodes.values()]
    needed = dict.fromkeys(one for kind in kinds if kind for one in blueprints.used(kind))
    extra: dict[str, Any] = {"ds": view(nodes)}
    if app := layout.get("app"):
        inputs = [[int(ident), widget] for ident, widget, _ in app["inputs"]]
        for ident, widget, label in app["inputs"]:
            name_widget(level.nodes[ident], widget, label)
        extra["linearData"] = {"inputs": inputs, "outputs": list(map(int, app["outputs"]))}
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hywu/{name}")),
        "revision": 0,
        "last_node_id": max(node["id"] for node in nodes),
        "last_link_id": len(level.links),
        "nodes": nodes,
        "links": [
            [number, link.source, link.slot, link.target, link.socket, link.kind]
            for number, link in level.numbered()
        ],
        "groups": level.groups,
        "definitions": {"subgraphs": [blueprints.definition(one, info) for one in needed]},
        "config": {},
        "extra": extra,
        "version": 0.4,
    }


def name_widget(node: dict, widget: str, label: str) -> None:
    """The words by which a person knows a widget, on the node and in App mode."""
    next(one for one in node["inputs"] if one["name"] == widget)["label"] = label


def view(nodes: list[dict]) -> dict[str, Any]:
    """Zoom and offset that show all nodes in a window of 1600 x 900, for frontends that keep them."""
    width = max(node["pos"][0] + node["size"][0] for node in nodes)
    height = max(node["pos"][1] + node["size"][1] for node in nodes)
    # Below this, frontends leave out all texts: the upper left is more than a gray overview.
    scale = round(max(0.62, min(1.0, 1450 / width, 780 / height)), 2)
    return {"scale": scale, "offset": [round(90 / scale), round(150 / scale)]}


def write(path: Path, content: bytes) -> str:
    """Write atomically; returns the path from the project's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, overwrite=True) as part:
        part.write_bytes(content)
    return path.relative_to(ROOT).as_posix()


def write_json(path: Path, value: dict) -> str:
    # ASCII: ComfyUI 0.3.75 reads subgraphs/ in the system's encoding
    return write(path, (json.dumps(value, indent=1) + "\n").encode())


def library(info: dict) -> list[str]:
    """Write subgraphs/: the blueprints that stand in the node search."""
    wanted = [name for name in blueprints.names() if blueprints.source(name).get("library")]
    return [
        write_json(
            SUBGRAPHS / f"{blueprints.source(name)['title']}.json",
            blueprints.library_file(name, info),
        )
        for name in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflows.build", description=__doc__)
    parser.add_argument("--server", required=True, help="address of a running ComfyUI")
    parser.add_argument("--images", action="store_true", help="run them for the thumbnails, too")
    parser.add_argument("names", nargs="*", help="workflows to make; all by default")
    args = parser.parse_args()
    info = get_json(f"{args.server}/object_info", timeout=60)
    for made in library(info):
        say(made)
    for name in args.names or names():
        layout, path = layout_of(name), file_of(name)
        graph = read_graph(HERE / "api" / f"{name}.json")
        say(write_json(path, workflow(name, graph, layout, info)))
        if args.images:
            images = thumbnails.thumbnail_and_sheet(args.server, HERE / "inputs", graph, layout)
            say(write(path.with_suffix(".jpg"), images[0]))
            if images[1]:
                say(write(ROOT / "docs" / "images" / f"{layout['image']}.jpg", images[1]))


if __name__ == "__main__":
    main()
