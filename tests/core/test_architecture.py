"""Imports go one way: what each room may import, read from the source; no circle; one place for each thing.

``docs/architecture.md`` says why. A room that isn't where it belongs yet stands in `STILL_TO_MOVE`, which
only shrinks: an entry that is no longer needed fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

BASICS = {"errors", "atomic", "files", "fingerprint", "images", "precision", "devices"}
VALUES = {"batch", "layout", "discovery", "tokens", "condition", "grouped"}
PARTS = {"encoders", "adapters", "injection", "generator", "formats"}
ENGINE = BASICS | VALUES | {"lora"} | PARTS | {"bases", "charts"}

#: Room of hywu_core (a file or folder in it), or nodes -> rooms that it may import.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "precision": set(),
    "atomic": {"errors"},
    "devices": {"errors"},
    "fingerprint": {"errors"},
    "files": {"errors", "atomic", "precision"},
    "images": {"errors", "files"},
    "batch": BASICS,
    "layout": BASICS,
    "discovery": BASICS | {"layout"},
    "tokens": BASICS | {"layout"},
    "condition": BASICS | {"batch"},
    "grouped": BASICS,
    "lora": BASICS | VALUES,
    "encoders": BASICS | VALUES,
    "adapters": BASICS | VALUES,
    "injection": BASICS | VALUES | {"lora", "adapters"},
    "formats": BASICS | VALUES | {"lora"},
    "generator": BASICS | VALUES | {"lora"},
    "bases": BASICS | VALUES | {"lora"} | PARTS,
    "headless": BASICS,
    "charts": BASICS,
    "training": ENGINE,
    "evaluation": ENGINE | {"headless"},
    "experiments": ENGINE | {"training", "evaluation"},
    "cli": ENGINE | {"training", "evaluation", "experiments", "headless"},
    "nodes": ENGINE | {"training", "evaluation", "experiments", "headless"},
}

#: What a value promises by its methods, imported where it is called: (room, room).
FACES = {("lora", "formats"), ("layout", "discovery")}

#: Rooms that lie under a former name: they count as the one that they become.
MOVING: dict[str, str] = {}

#: Importing file -> what it shouldn't need: a module, or one of the names of `ONE_PLACE`.
STILL_TO_MOVE: dict[str, set[str]] = {}

#: Modules that import each other yet; shrinks likewise.
STILL_CIRCULAR: tuple[set[str], ...] = (
    {"hywu_core.generator.speed.passes", "hywu_core.generator.speed.fp8"},
)

#: What only certain files do: what -> where.
ONE_PLACE = {
    "hashing (hashlib)": ("hywu_core/fingerprint.py",),
    "locking files (fcntl)": ("hywu_core/atomic.py",),
    "opening images (Image.open)": ("hywu_core/images.py",),
    # local: dev.py starts servers before anything is installed that files needs
    "reading JSON (json.load)": ("hywu_core/files.py", "hywu_core/headless/local.py"),
    "parsing arguments (argparse)": ("hywu_core/cli/",),
    "printing (print, stdout)": ("hywu_core/cli/",),
    "making loggers (getLogger)": ("hywu_core/errors.py",),
    "ComfyUI (comfy)": ("nodes/host/",),
}

COMFY = {
    "comfy",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "execution",
    "latent_preview",
}


class Import(NamedTuple):
    """target: dotted, from the root of the project; lazy: within a function."""

    target: str
    lazy: bool


def sources() -> dict[str, ast.Module]:
    """Path from the root -> syntax tree of every module of the product."""
    files = [*(ROOT / "hywu_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(files)
    }


SOURCES = sources()


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: str, tree: ast.Module) -> Iterator[Import]:
    """What a file imports; what only a type checker sees is left out."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = absolute(path, node)
            for alias in node.names:
                whole = f"{start}.{alias.name}"
                yield Import(whole if whole in MODULES else start, lazy)
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(tree, False)


def absolute(path: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = path.split("/")[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def room(module: str) -> str:
    parts = module.split(".")
    name = parts[0] if parts[0] == "nodes" or len(parts) < 2 else parts[1]
    return MOVING.get(name, name)


def wrong_arrows() -> dict[str, set[str]]:
    """File -> modules of the project that it may not import."""
    found: dict[str, set[str]] = {}
    for path, tree in SOURCES.items():
        here = room(module_name(path))
        for target, lazy in imports(path, tree):
            there = room(target)
            if not target.startswith(("hywu_core.", "nodes.")) or there == here:
                continue
            face = lazy and (here, there) in FACES
            if there not in ALLOWED.get(here, set()) and not face:
                found.setdefault(path, set()).add(target)
    return found


def elsewhere() -> dict[str, set[str]]:
    """File -> things of `ONE_PLACE` that it does and that another place is for."""
    found: dict[str, set[str]] = {}
    for path, tree in SOURCES.items():
        for what in done(path, tree):
            if not path.startswith(ONE_PLACE[what]):
                found.setdefault(path, set()).add(what)
    return found


def done(path: str, tree: ast.Module) -> set[str]:
    things = dict.fromkeys(("hashlib",), "hashing (hashlib)")
    things |= dict.fromkeys(("fcntl", "msvcrt", "filelock"), "locking files (fcntl)")
    things |= {"argparse": "parsing arguments (argparse)"}
    things |= dict.fromkeys(COMFY, "ComfyUI (comfy)")
    calls = {
        "Image.open": "opening images (Image.open)",
        "json.load": "reading JSON (json.load)",
        "json.loads": "reading JSON (json.load)",
        "logging.getLogger": "making loggers (getLogger)",
        "print": "printing (print, stdout)",
        "sys.stdout.write": "printing (print, stdout)",
    }
    found = {
        things[target.split(".")[0]]
        for target, _ in imports(path, tree)
        if target.split(".")[0] in things
    }
    called = (ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call))
    return found | {calls[name] for name in called if name in calls}


def test_every_room_stands_in_the_table():
    assert {room(name) for name in MODULES} - {"hywu_core"} - ALLOWED.keys() == set()
    former = {name.split(".")[1] for name in MODULES if name.startswith("hywu_core.")}
    assert MOVING.keys() - former == set(), "delete these from MOVING"


def test_imports_go_one_way_and_things_have_one_place():
    wrong: dict[str, set[str]] = {}
    for found in (wrong_arrows(), elsewhere()):
        for path, targets in found.items():
            wrong.setdefault(path, set()).update(targets)
    new = {p: sorted(t - STILL_TO_MOVE.get(p, set())) for p, t in wrong.items()}
    assert {p: t for p, t in new.items() if t} == {}, "against the table"
    gone = {p: sorted(t - wrong.get(p, set())) for p, t in STILL_TO_MOVE.items()}
    assert {p: t for p, t in gone.items() if t} == {}, "delete these from STILL_TO_MOVE"


def test_no_two_modules_import_each_other():
    """Over any number of steps, imports within functions counted, but for the faces and packages."""
    arrows: dict[str, set[str]] = {}
    for path, tree in SOURCES.items():
        here = module_name(path)
        for target, lazy in imports(path, tree):
            within = here.startswith(f"{target}.")  # a package that names its own parts
            face = lazy and (room(here), room(target)) in FACES
            if target in MODULES and not within and not face and target != here:
                arrows.setdefault(here, set()).add(target)
    for known in STILL_CIRCULAR:
        among = {name: arrows.get(name, set()) & known for name in known}
        assert circle(among), f"delete {sorted(known)} from STILL_CIRCULAR"
        for name in known:
            arrows[name] = arrows.get(name, set()) - known
    assert circle(arrows) == []


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty when there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


@pytest.mark.parametrize(
    ("path", "code", "wanted"),
    [
        ("hywu_core/lora.py", "from .generator import model", {"hywu_core.generator.model"}),
        ("hywu_core/lora.py", "def f():\n from .formats import save_lora", set()),
        (
            "hywu_core/training/a.py",
            "from ..evaluation.items import x",
            {"hywu_core.evaluation.items"},
        ),
        ("nodes/loaders.py", "from ..hywu_core.cli.main import main", {"hywu_core.cli.main"}),
        ("nodes/host/paths.py", "from ...hywu_core import files", set()),
    ],
)
def test_an_arrow_against_the_table_is_found(path, code, wanted, monkeypatch):
    monkeypatch.setitem(globals(), "SOURCES", {path: ast.parse(code)})
    assert wrong_arrows().get(path, set()) == wanted


def test_what_another_place_is_for_is_found(monkeypatch):
    code = "import hashlib, json, comfy.utils\nprint(json.loads('1'))"
    monkeypatch.setitem(globals(), "SOURCES", {"nodes/a.py": ast.parse(code)})
    assert elsewhere() == {
        "nodes/a.py": {
            "hashing (hashlib)",
            "reading JSON (json.load)",
            "ComfyUI (comfy)",
            "printing (print, stdout)",
        }
    }


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
