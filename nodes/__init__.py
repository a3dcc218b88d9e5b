"""The nodes of HY-WU. ComfyUI reads the two mappings."""

from __future__ import annotations

from .apply import HYWUApplyLoRA
from .files import HYWULoadCondition, HYWUSaveCondition
from .generate import HYWUGenerateLoRA
from .inspect import HYWUInspectLoRA
from .loaders import HYWULoadBundledEditor, HYWULoadGenerator
from .values import HYWUBlendLoRA, HYWUSelectLoRA

NODES = {
    HYWULoadGenerator: "HY-WU Load Generator",
    HYWULoadBundledEditor: "HY-WU Load Bundled Editor",
    HYWUGenerateLoRA: "HY-WU Generate LoRA",
    HYWUApplyLoRA: "Apply Generated LoRA",
    HYWUSelectLoRA: "HY-WU Select LoRA",
    HYWUSaveCondition: "Save Condition",
    HYWULoadCondition: "Load Condition",
    HYWUInspectLoRA: "HY-WU Inspect LoRA",
    HYWUBlendLoRA: "HY-WU Blend LoRAs",
}

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: name for node, name in NODES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
