"""The start of the scripts that tests run inside ComfyUI's tree: bench/inside.py, and what only tests need."""

from __future__ import annotations

import sys
from collections.abc import Callable

sys.path.append(f"{sys.argv[2]}/tests/helpers")
sys.path.append(f"{sys.argv[2]}/bench")  # which takes itself away again

from inside import ARGUMENTS, EXTENSION, PACKAGE, TREE, load_as, load_nodes, show

__all__ = ["ARGUMENTS", "EXTENSION", "PACKAGE", "TREE", "error", "load_as", "load_nodes", "show"]


def error(action: Callable[[], object]) -> str:
    """The text of the ValueError that an action ends in; empty when it doesn't."""
    try:
        action()
    except ValueError as problem:
        return str(problem)
    return ""
