"""An API-format workflow: read from a file, its nodes addressed and their inputs set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import HYWUError

Graph = dict[str, dict[str, Any]]


def read_graph(path: str | Path) -> Graph:
    """Read an API-format workflow. Raises HYWUError for the UI format and for anything else."""
    try:
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HYWUError(f"{path}: there is no such workflow file.") from error
    except ValueError as error:
        raise HYWUError(f"{path}: not a JSON document ({error}).") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise HYWUError(
            f"{path} is a workflow in the UI format, but the server's API takes the API format: "
            "export it in ComfyUI with Workflow > Export (API)."
        )
    nodes = graph.items() if isinstance(graph, dict) else ()
    if not nodes or not all(isinstance(n, dict) and "class_type" in n for _, n in nodes):
        raise HYWUError(f"{path} is not a ComfyUI workflow: each node needs a class_type.")
    for _, node in nodes:
        node.setdefault("inputs", {})
    return graph


def find_node(graph: Graph, name: str) -> str:
    """The id of the node called `name`: by id, else by title, else by class. Must be unambiguous."""
    if name in graph:
        return name
    titled = [i for i, n in graph.items() if (n.get("_meta") or {}).get("title") == name]
    found = titled or [i for i, n in graph.items() if n["class_type"] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise HYWUError(
            f"{name} is the name of the nodes {', '.join(found)}: use one of these ids."
        )
    known = sorted({n["class_type"] for n in graph.values()})
    raise HYWUError(
        f"The workflow has no node with the id, title or class {name}; its classes: {', '.join(known)}."
    )


def parse_value(text: str, old: Any) -> Any:
    """`text` as the type the input had: a string stays one, everything else is read as JSON."""
    if isinstance(old, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def set_input(graph: Graph, assignment: str) -> None:
    """Apply `NODE.input=value`. Raises HYWUError where the node or the input doesn't exist."""
    target, equals, value = assignment.partition("=")
    name, dot, key = target.rpartition(".")
    if not equals or not dot:
        raise HYWUError(
            f"{assignment}: --set wants NODE.input=value, for instance KSampler.seed=7."
        )
    node = graph[find_node(graph, name)]
    if key not in node["inputs"]:
        raise HYWUError(
            f"{name} has no input {key}; it has: {', '.join(node['inputs']) or 'none'}."
        )
    node["inputs"][key] = parse_value(value, node["inputs"][key])


def image_node(graph: Graph, argument: str) -> tuple[str, str]:
    """(node id, path) of an `--image` argument: PATH, or NODE=PATH where several nodes load images."""
    loaders = [i for i, n in graph.items() if n["class_type"] == "LoadImage"]
    name, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():
        return find_node(graph, name), path
    if len(loaders) == 1:
        return loaders[0], argument
    raise HYWUError(
        f"The workflow has {len(loaders)} LoadImage nodes ({', '.join(loaders) or 'none'}): "
        "say which with --image NODE=PATH."
    )
