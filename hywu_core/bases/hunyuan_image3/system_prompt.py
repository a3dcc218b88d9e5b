"""The system prompt: given as text, in a text file, or as a constant in the user's ``system_prompt.py``.

The prompts belong to the release and don't come with this project. The Python file is parsed, never run:
any string constant of it is found, wherever it stands at the top, in a class, in a function or as an entry
of a dict, so that nothing depends on the names of one release.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import HYWUError

FILE = "system_prompt.py"
#: String methods that may stand behind a constant; the prompt is stripped in any case.
_HARMLESS = {"strip", "lstrip", "rstrip"}
#: Functions of the standard library that may stand around one.
_UNINDENT = {"dedent": textwrap.dedent, "cleandoc": inspect.cleandoc}
#: Most names that an error lists.
LISTED = 8


def system_prompt(folder: Path, name: str, given: str | Path | None = None) -> str:
    """The prompt of a folder, or the one that is given.

    name: the mode that ``generation_config.json`` calls it by, such as "en_unified"; "" or "none" is no
        prompt.
    given: the text itself, the path of a .txt or .py file, or "FILE.py:NAME" for one constant of it; a file
        that isn't there is looked for in the folder.
    Raises HYWUError where none is found.
    """
    if given is not None:
        path, chosen = _as_path(given, folder)
        return str(given) if path is None else _read(path, name, chosen)
    if name.lower() in ("", "none"):
        return ""
    path = folder / FILE
    if not path.is_file():
        raise HYWUError(
            f"{folder}: no {FILE}, which holds the system prompt '{name}' that the model was trained with; "
            "download it from the model's page, or give the prompt as text or as a .txt file."
        )
    return _read(path, name, None)


def own_prompt(folder: Path, name: str, given: str) -> str:
    """What a text of a graph stands for, which must not name files elsewhere.

    name: see `system_prompt`.
    given: "system_prompt.py" or "system_prompt.py:NAME", which are of the folder's own file; any other text
        is the prompt.
    Raises HYWUError where the constant isn't there, or the text is the name of another file: a prompt that
    only looks like one would be a mistake without a word.
    """
    path, chosen = _as_path(given, folder)
    if path is None:
        return given
    if given.strip().partition(":")[0] != FILE:
        raise HYWUError(
            f"{given.strip()}: a graph reads no system prompt from a file outside {folder}. Paste the text, "
            f"or name a constant of the folder's own file as {FILE}:NAME."
        )
    return _read(folder / FILE, name, chosen)


def _as_path(given: str | Path, folder: Path) -> tuple[Path | None, str | None]:
    """(the file that is meant, the constant's name); a text that looks like none is none."""
    if isinstance(given, Path):
        return given, None
    text = given.strip()
    named = re.fullmatch(r"([^\n]*\.py):([^\n:/\\]+)", text)
    if named is None and ("\n" in text or not text.endswith((".txt", ".py"))):
        return None, None
    path, chosen = (Path(named[1]), named[2].strip()) if named else (Path(text), None)
    own = folder / path.name
    return (own if not path.is_file() and own.is_file() else path), chosen


def _read(path: Path, name: str, chosen: str | None) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise HYWUError(f"{path}: the system prompt can't be read ({error}).") from error
    if path.suffix != ".py":
        return text
    found = constants(path, text)
    return _choose(path, found, name, chosen)


def _choose(path: Path, found: Mapping[str, str], name: str, chosen: str | None) -> str:
    """The constant `chosen`, or the one whose name holds all words of the mode `name`, the shortest."""
    if chosen is not None:
        if chosen in found:
            return found[chosen]
        raise HYWUError(
            f"{path}: has no string constant {chosen}. {_listed(found)} Name one of them as "
            f"{path.name}:NAME, or give the text."
        )
    words = _words(name)
    # without a mode nothing is named after it: not just any constant is taken
    fitting = [key for key in found if words and words <= _words(key)]
    if not fitting and len(found) == 1:
        fitting = list(found)
    if not fitting:
        raise HYWUError(
            f"{path}: none of its string constants is named after the mode '{name}'. {_listed(found)} Name "
            f"one as {path.name}:NAME, or give the prompt as text or as a .txt file."
        )
    # of equally short names the longest text: a prompt, not its label
    return found[min(fitting, key=lambda key: (len(_words(key)), len(key), -len(found[key])))]


def _words(name: str) -> set[str]:
    """The words of a name: en_unified, EnUnified and EN-UNIFIED have the same."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return {word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word}


def _listed(found: Mapping[str, str]) -> str:
    if not found:
        return "It has none."
    said = [f"{key} ({len(text):,} characters)" for key, text in list(found.items())[:LISTED]]
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"It has {', '.join(said)}{more}."


def constants(path: Path, text: str) -> dict[str, str]:
    """Name -> value of every string constant of a Python file, in its order; nothing of it is run.

    An entry of a dict is named by its key, behind the dict's name where two dicts share it. A name that
    stands for another one has its value. Of a module's name the last assignment counts; one that can't be
    read leaves none, rather than a part of it.
    path: for errors.
    Raises HYWUError on what isn't Python.
    """
    try:
        tree = ast.parse(text)
        found: dict[str, str] = {}
        own = {id(one) for one in tree.body}
        for statement in ast.walk(tree):
            again = id(statement) in own or isinstance(statement, ast.AugAssign)
            for name, node in _assigned(statement, id(statement) in own):
                value = _text(node, found)
                if again:
                    found.pop(name, None)
                if value is not None:
                    found.setdefault(name, value)
                else:
                    _collect(name, node, found)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise HYWUError(f"{path}: not Python that can be read ({error}).") from error
    return found


def _assigned(node: ast.AST, certain: bool) -> Iterator[tuple[str, ast.expr]]:
    """(name, expression) of what a statement assigns.

    certain: it is the module's, so it does run.
    """
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _paired(target, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield from _paired(node.target, node.value)
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        # under an if or in a function nobody knows whether it is added: then the name has no constant
        before = ast.Name(node.target.id, ast.Load())
        known = ast.BinOp(before, node.op, node.value)
        yield node.target.id, known if certain else ast.Constant(None)
    elif isinstance(node, ast.FunctionDef):
        # def en_unified(): return "...", perhaps below a docstring
        *before, last = node.body
        plain = all(isinstance(one, ast.Expr) for one in before)
        if plain and isinstance(last, ast.Return) and last.value is not None:
            yield node.name, last.value


def _paired(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    several = (ast.Tuple, ast.List)
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Attribute):
        yield target.attr, value
    elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        yield str(target.slice.value), value
    elif isinstance(target, several) and isinstance(value, several):
        for one, its in zip(target.elts, value.elts, strict=False):
            yield from _paired(one, its)


def _collect(name: str, node: ast.expr, found: dict[str, str]) -> None:
    """What an expression holds, under its name. The first of a name stays: a module's goes first."""
    value = _text(node, found)
    if value is not None:
        found.setdefault(name, value)
        return
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) == 1:
        _collect(name, node.elts[0], found)
    for key, entry in _entries(node):
        _collect(key if key not in found else f"{name}.{key}", entry, found)


def _entries(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """(key, value) of ``{"key": value}`` and of ``dict(key=value)``."""
    if isinstance(node, ast.Dict):
        for key, entry in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, entry
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        yield from ((word.arg, word.value) for word in node.keywords if word.arg is not None)


def _text(node: ast.AST | None, known: Mapping[str, str]) -> str | None:
    """The string that an expression is, where it is a constant, or made of constants and known names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined("", [node.left, node.right], known)
    if isinstance(node, ast.JoinedStr):
        return _joined("", node.values, known)
    if isinstance(node, ast.FormattedValue):
        plain = node.conversion == -1 and node.format_spec is None
        return _text(node.value, known) if plain else None
    if isinstance(node, ast.Call) and not node.keywords:
        return _called(node, known)
    return None


def _joined(between: str, nodes: list[ast.expr], known: Mapping[str, str]) -> str | None:
    pieces = [_text(node, known) for node in nodes]
    return None if None in pieces else between.join(p for p in pieces if p is not None)


def _called(node: ast.Call, known: Mapping[str, str]) -> str | None:
    """Of the calls only those that a text file might have: strip, join, dedent, cleandoc."""
    function, given = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in _UNINDENT and len(given) == 1:
        inner = _text(given[0], known)
        return None if inner is None else _UNINDENT[name](inner)
    if not isinstance(function, ast.Attribute):
        return None
    owner = _text(function.value, known)
    if owner is None:
        return None
    if name in _HARMLESS and not given:
        return getattr(owner, name)()
    if name == "join" and len(given) == 1 and isinstance(given[0], (ast.List, ast.Tuple)):
        return _joined(owner, given[0].elts, known)
    return None
