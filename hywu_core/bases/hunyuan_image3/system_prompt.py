"""The system prompt: given as text, in a text file, or as a constant in the user's ``system_prompt.py``.

The prompts belong to the release and don't come with this project. The Python file is parsed, never run.
"""

from __future__ import annotations

import ast
from pathlib import Path

from ...errors import HYWUError

FILE = "system_prompt.py"
#: String methods that may stand behind a constant; the prompt is stripped in any case.
_HARMLESS = {"strip", "lstrip", "rstrip"}


def system_prompt(folder: Path, name: str, given: str | Path | None = None) -> str:
    """The prompt of a folder, or the one that is given.

    name: what ``generation_config.json`` calls it, such as "en_unified"; "" or "none" is no prompt.
    given: the text itself, or the path of a .txt or .py file. Raises HYWUError where none is found.
    """
    if given is not None:
        path = _as_path(given)
        return str(given) if path is None else _read(path, name)
    if name.lower() in ("", "none"):
        return ""
    path = folder / FILE
    if not path.is_file():
        raise HYWUError(
            f"{folder}: no {FILE}, which holds the system prompt '{name}' that the model was trained with; "
            "download it from the model's page, or give the prompt as text or as a .txt file."
        )
    return _read(path, name)


def _as_path(given: str | Path) -> Path | None:
    """The file that is meant; a text that looks like none is none."""
    if isinstance(given, Path):
        return given
    one_line = "\n" not in given.strip() and given.strip().endswith((".txt", ".py"))
    return Path(given.strip()) if one_line else None


def _read(path: Path, name: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise HYWUError(f"{path}: the system prompt can't be read ({error}).") from error
    return _constant(path, text, name) if path.suffix == ".py" else text


def _constant(path: Path, text: str, name: str) -> str:
    """The string constant whose name holds all words of `name`, the shortest such name."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise HYWUError(f"{path}: not Python that can be read ({error}).") from error
    found: dict[str, str] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = _text(getattr(node, "value", None))
        if value is not None:
            found |= {t.id: value for t in targets if isinstance(t, ast.Name)}
    words = set(name.lower().split("_"))
    fitting = [n for n in found if words <= set(n.lower().split("_"))]
    if not fitting and len(found) == 1:
        fitting = list(found)
    if not fitting:
        raise HYWUError(
            f"{path}: none of its string constants ({', '.join(found) or 'it has none'}) is named after "
            f"'{name}'; give the system prompt as text or as a .txt file."
        )
    return found[min(fitting, key=len)]


def _text(node: ast.AST | None) -> str | None:
    """The string that an expression is, where it is a constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    called = isinstance(node, ast.Call) and not node.args and not node.keywords
    if called and isinstance(node.func, ast.Attribute) and node.func.attr in _HARMLESS:
        inner = _text(node.func.value)
        return None if inner is None else getattr(inner, node.func.attr)()
    return None
