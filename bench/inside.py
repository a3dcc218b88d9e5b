"""The start of the scripts that benchmarks and tests run inside ComfyUI's tree, in a process of its Python.

They import it before anything of ComfyUI. Their first two arguments are ComfyUI's tree and this extension's
folder; ARGUMENTS are the others.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from types import ModuleType

TREE, EXTENSION, *ARGUMENTS = sys.argv[1:]
#: Name of the extension's package: `hywu_nodes.hywu_core.lora` and so on can be imported after `load_nodes`.
PACKAGE = "hywu_nodes"

sys.argv = ["main.py", "--cpu", "--disable-cuda-malloc"]
# Without this file's folder: its modules have names that other packages may look for, such as cuda.
sys.path[:] = [TREE, *(path for path in sys.path if path != os.path.dirname(__file__))]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import folder_paths  # noqa: E402, F401 - by it the extension knows that it runs inside ComfyUI


def load_as(name: str, path: str, folders: list[str] | None = None) -> ModuleType:
    """Import a file under a name; `folders` make it a package."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_nodes() -> dict[str, type]:
    """The extension's node classes by name, imported as ComfyUI does."""
    return load_as(PACKAGE, f"{EXTENSION}/__init__.py", [EXTENSION]).NODE_CLASS_MAPPINGS


def show(figures: dict[str, object]) -> None:
    """Print one line that the caller finds among everything else on standard output."""
    print("FIGURES" + json.dumps(figures), flush=True)
