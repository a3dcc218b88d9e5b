"""The registry of editors that a benchmark can call: one line each."""

from __future__ import annotations

from ..options import Kind
from . import bundled, comfy, command, copy
from .base import Editor

#: name -> kind, in the order of the command line
EDITORS: dict[str, Kind[Editor]] = {
    module.KIND.name: module.KIND for module in (bundled, comfy, command, copy)
}
