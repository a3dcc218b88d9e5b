"""An API-format workflow: read from a file, its nodes addressed and their inputs set."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import HYWUError
from ..files import is_file, parse_json, read_json

Graph = dict[str, dict[str, Any]]

#: What stands for yes and no, in any letters.
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def read_graph(path: str | Path) -> Graph:
    """Read an API-format workflow. Raises HYWUError for the UI format and for anything else."""
    graph = read_json(path)  # `<(jq …)` too, which is no file
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise HYWUError(
            f"{path} is a workflow in the UI format, but the server's API takes the API format: "
            "export it in ComfyUI with Workflow > Export (API)."
        )
    nodes = graph.values() if isinstance(graph, dict) else ()
    if not nodes or not all(isinstance(n, dict) and _kind(n) for n in nodes):
        raise HYWUError(f"{path} is not a ComfyUI workflow: each node needs a class_type.")
    for node in nodes:
        if not isinstance(node.setdefault("inputs", {}), dict):
            raise HYWUError(f"{path}: the inputs of a {_kind(node)} are no object.")
    return graph


def find_node(graph: Graph, name: str) -> str:
    """The id of the node called `name`: by id, else by title, else by class. Must be unambiguous."""
    if name in graph:
        return name
    titled = [i for i, n in graph.items() if _title(n) == name]
    found = titled or [i for i, n in graph.items() if _kind(n) == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise HYWUError(
            f"{name} is the name of the nodes {', '.join(found)}: use one of these ids."
        )
    names = {*graph, *map(_kind, graph.values()), *filter(None, map(_title, graph.values()))}
    near = difflib.get_close_matches(name, sorted(names), 1)
    meant = f" Is {near[0]} meant?" if near else ""
    listed = ", ".join(f"{i} {_title(n) or _kind(n)}" for i, n in list(graph.items())[:40])
    more = f" and {len(graph) - 40} more" if len(graph) > 40 else ""
    raise HYWUError(
        f"The workflow has no node with the id, title or class {name}.{meant} It has: {listed}{more}."
    )


def locate(graph: Graph, name: str) -> tuple[str, str]:
    """(node id, input) of ``NODE.input``. Raises HYWUError where there is none."""
    node, dot, key = name.rpartition(".")
    if not dot:
        raise HYWUError(f"{name}: must be NODE.input, for instance 12.image.")
    node = find_node(graph, node)
    if key not in (inputs := graph[node]["inputs"]):
        raise HYWUError(f"Node {node} has no input {key}; it has: {', '.join(inputs)}.")
    return node, key


def instruction_input(graph: Graph) -> tuple[str, str]:
    """Where a graph takes its instruction: an input of that name, or the text that is connected to it.

    Raises HYWUError unless there is one such place.
    """
    found = set()
    for name, node in graph.items():
        value = node["inputs"].get("instruction")
        if isinstance(value, str):
            found.add((name, "instruction"))
        elif isinstance(value, list) and value and isinstance(graph.get(value[0]), dict):
            inputs = graph[value[0]]["inputs"]
            found |= {(value[0], key) for key, text in inputs.items() if isinstance(text, str)}
    if len(found) != 1:
        there = ", ".join(sorted(".".join(place) for place in found)) or "none"
        raise HYWUError(
            f"The workflow has no one input for the instruction (found: {there}); say which with "
            "--instruction-input NODE.input."
        )
    return found.pop()


def _kind(node: Mapping[str, Any]) -> str:
    kind = node.get("class_type")
    return kind if isinstance(kind, str) else ""


def _title(node: Mapping[str, Any]) -> str:
    about = node.get("_meta")
    title = about.get("title") if isinstance(about, dict) else None
    return title if isinstance(title, str) else ""


# -- values ------------------------------------------------------------------------------------------


def parse_value(text: str, old: Any, declared: Any = None) -> Any:
    """`text` as the type that the node declares for the input, else as the type that the input had.

    declared: ``[type, options]`` as /object_info gives it. A connection ``["4", 0]`` fits every type.
    Raises HYWUError saying what the type takes.
    """
    given = _json(text)
    if isinstance(given, list) and len(given) == 2 and isinstance(given[0], str):
        return given
    kind = _declared_kind(declared) or _kind_of(old)
    if isinstance(kind, list):
        return _choice(text, kind)
    if kind == "BOOLEAN":
        if (answer := BOOLEANS.get(text.strip().lower())) is None:
            raise HYWUError(f"'{text}' is neither true nor false")
        return answer
    if kind in ("INT", "FLOAT"):
        return _number(text, kind)
    return text if kind == "STRING" else given


def _declared_kind(declared: Any) -> str | list[Any] | None:
    """A type's name, or the values to choose from."""
    if not isinstance(declared, (list, tuple)) or not declared:
        return None
    kind, options = declared[0], declared[1] if len(declared) > 1 else {}
    if kind == "COMBO" and isinstance(options, dict):
        kind = options.get("options")
    return kind if isinstance(kind, (str, list)) else None


def _kind_of(old: Any) -> str:
    if isinstance(old, bool):
        return "BOOLEAN"
    # a number in a saved workflow may be of either type
    return "STRING" if isinstance(old, str) else "FLOAT" if isinstance(old, (int, float)) else ""


def _choice(text: str, choices: list[Any]) -> Any:
    """The choice that is written so; others are left to the server, whose list may be a newer one."""
    return next((choice for choice in choices if str(choice) == text), text)


def _number(text: str, kind: str) -> int | float:
    try:
        value = float(text)
        if math.isfinite(value):
            whole = value == int(value)
            if kind == "FLOAT" and not (whole and text.strip().lstrip("+-").isdigit()):
                return value
            if whole:
                # not by way of a float, which knows 16 digits of a seed
                return int(text) if text.strip().lstrip("+-").isdigit() else int(value)
    except (ValueError, OverflowError):
        pass
    raise HYWUError(f"'{text}' is no {'whole number' if kind == 'INT' else 'number'}")


def _json(text: str) -> Any:
    try:
        return parse_json(text, "the value")
    except HYWUError:
        return text


def find_input(graph: Graph, assignment: str) -> tuple[str, str, str]:
    """(node id, input, text) of `NODE.input=value`. Raises HYWUError where node or input don't exist."""
    wrong: HYWUError | None = None
    for name, key, value in _splits(assignment):
        try:
            node = find_node(graph, name)
            if key not in graph[node]["inputs"]:
                known = ", ".join(graph[node]["inputs"]) or "none"
                raise HYWUError(f"{name} has no input {key}; it has: {known}.")
            return node, key, value
        except HYWUError as error:
            wrong = wrong or error
    raise wrong or HYWUError(
        f"{assignment}: --set wants NODE.input=value, for instance KSampler.seed=7."
    )


def _splits(assignment: str) -> Iterator[tuple[str, str, str]]:
    """(node, input, value) for each equals sign: titles may hold some, and so may values."""
    for place, character in enumerate(assignment):
        name, dot, key = assignment[:place].rpartition(".")
        if character == "=" and dot:
            yield name, key, assignment[place + 1 :]


def set_input(graph: Graph, assignment: str, declared: Mapping[str, Any] | None = None) -> None:
    """Apply `NODE.input=value`.

    declared: input -> declaration of that node's class (/object_info).

    Raises HYWUError where the node or the input doesn't exist, or the value is of another type.
    """
    node, key, text = find_input(graph, assignment)
    inputs = graph[node]["inputs"]
    try:
        inputs[key] = parse_value(text, inputs[key], (declared or {}).get(key))
    except HYWUError as error:
        raise HYWUError(f"--set {assignment}: {error}.") from error


def image_node(graph: Graph, argument: str) -> tuple[str, str]:
    """(node id, path) of an `--image` argument: PATH, or NODE=PATH where several nodes load images."""
    loaders = [i for i, n in graph.items() if _kind(n) == "LoadImage"]
    name, equals, path = argument.partition("=")
    if equals and not is_file(argument):
        return find_node(graph, name), path
    if len(loaders) == 1:
        return loaders[0], argument
    raise HYWUError(
        f"The workflow has {len(loaders)} LoadImage nodes ({', '.join(loaders) or 'none'}): "
        "say which with --image NODE=PATH."
    )
