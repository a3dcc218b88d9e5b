"""ComfyUI entry of HY-WU. The engine is `hywu_core`; it works without ComfyUI and without this file."""

from __future__ import annotations

import sys

WEB_DIRECTORY = "./web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

# Other programs (pytest collecting this folder, for one) may import this file: they get no nodes.
if "folder_paths" in sys.modules and __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
