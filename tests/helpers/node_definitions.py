"""The nodes' own texts, read without ComfyUI; run as a program it writes locales/en/nodeDefs.json anew.

python tests/helpers/node_definitions.py
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "hywu_definitions"
#: What vue-i18n, which shows the locales, takes for syntax.
_SYNTAX = re.compile(r"[{}@|]")
_LITERAL = re.compile(r"\{'([{}@|])'\}")


def node_classes() -> dict[str, type]:
    """Node classes by name. What talks to ComfyUI, `nodes.host`, is replaced by stand-ins."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[_PACKAGE] = package
    host = f"{_PACKAGE}.nodes.host"
    room = ROOT / "nodes" / "host"
    files = [path.relative_to(room).with_suffix("") for path in room.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in files} - {"__init__"}
    stand_ins = {name: MagicMock() for name in sorted(names)}
    for name, stand_in in stand_ins.items():
        folder, _, last = name.rpartition(".")
        if folder:  # what a package has is what its modules are
            setattr(stand_ins[folder], last, stand_in)
    sys.modules[host] = MagicMock(**{k: v for k, v in stand_ins.items() if "." not in k})
    sys.modules.update({f"{host}.{name}": value for name, value in stand_ins.items()})
    try:
        return importlib.import_module(f"{_PACKAGE}.nodes").NODE_CLASS_MAPPINGS
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]


def display_names() -> dict[str, str]:
    """Display names by class name, as nodes/__init__.py has them."""
    text = (ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "(\w+)": "(.+)",$', text, re.MULTILINE))


def definitions() -> dict[str, dict]:
    """The texts of every node in the form of ComfyUI's nodeDefs.json."""
    names = display_names()
    return {key: _definition(cls, names[key]) for key, cls in node_classes().items()}


def _definition(cls: type, display_name: str) -> dict:
    inputs = {
        name: {"name": name, "tooltip": escape(options[1]["tooltip"])}
        for group, found in cls.INPUT_TYPES().items()
        for name, options in found.items()
        if group != "hidden"  # ComfyUI's own, shown nowhere
    }
    outputs = {
        str(i): {"name": name, "tooltip": escape(tip)}
        for i, (name, tip) in enumerate(zip(cls.RETURN_NAMES, cls.OUTPUT_TOOLTIPS, strict=True))
    }
    texts = {"display_name": escape(display_name), "description": escape(cls.DESCRIPTION)}
    return {**texts, **({"inputs": inputs} if inputs else {}), "outputs": outputs}


def categories() -> set[str]:
    """The parts of all nodes' categories."""
    return {part for cls in node_classes().values() for part in cls.CATEGORY.split("/")}


def escape(text: str) -> str:
    """Plain text as a message of vue-i18n."""
    return _SYNTAX.sub(lambda match: f"{{'{match[0]}'}}", text)


def unescape(message: str) -> str:
    """The text that a message without parameters shows."""
    return _LITERAL.sub(lambda match: match[1], message)


def read_locale(language: str, name: str) -> dict:
    """locales/<language>/<name>.json"""
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    path.write_text(json.dumps(definitions(), indent=2, ensure_ascii=False) + "\n", "utf-8")
