"""The registry of judges: one line each."""

from __future__ import annotations

from collections.abc import Callable

from ..options import Kind
from . import local, openai, reference
from .base import Judge

_MODULES = (reference, openai, local)

#: name -> kind, in the order of the command line
JUDGES: dict[str, Kind[Judge]] = {module.KIND.name: module.KIND for module in _MODULES}

#: name -> the judge of a graph from its model's name (empty where it has none)
IN_GRAPHS: dict[str, Callable[[str], Judge]] = {
    module.KIND.name: module.in_graph for module in _MODULES if hasattr(module, "in_graph")
}
