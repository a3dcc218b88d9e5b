"""The nodes of HY-WU. ComfyUI reads the two mappings."""

from __future__ import annotations

from .apply import HYWUApplyLoRA, HYWULoRAScope
from .encode import HYWUConditionEncode
from .evaluation import HYWUBenchmarkItems, HYWUJudge, HYWUScoreTable
from .files import HYWULoadCondition, HYWUSaveCondition
from .generate import HYWUGenerateLoRA
from .hooks import HYWULoRAHook
from .host import examples, gsb_routes
from .inspect import HYWUInspectLoRA
from .loaders import HYWULoadBundledEditor, HYWULoadGenerator
from .lora_files import HYWULoadLoRA, HYWUSaveLoRA
from .model_layout import HYWUModelLayout
from .train import HYWUTrainGenerator
from .values import HYWUBlendLoRA, HYWUSelectLoRA

NODES = {
    HYWULoadGenerator: "HY-WU Load Generator",
    HYWULoadBundledEditor: "HY-WU Load Bundled Editor",
    HYWUConditionEncode: "HY-WU Condition Encode",
    HYWUGenerateLoRA: "HY-WU Generate LoRA",
    HYWUApplyLoRA: "Apply Generated LoRA",
    HYWUSaveLoRA: "Save Generated LoRA",
    HYWULoadLoRA: "Load Generated LoRA",
    HYWUSelectLoRA: "HY-WU Select LoRA",
    HYWUSaveCondition: "Save Condition",
    HYWULoadCondition: "Load Condition",
    HYWUInspectLoRA: "HY-WU Inspect LoRA",
    HYWUBlendLoRA: "HY-WU Blend LoRAs",
    HYWULoRAScope: "HY-WU LoRA Scope",
    HYWULoRAHook: "HY-WU LoRA Hook",
    HYWUModelLayout: "HY-WU Model Layout",
    HYWUTrainGenerator: "HY-WU Train Generator",
    HYWUBenchmarkItems: "HY-WU Benchmark Items",
    HYWUJudge: "HY-WU Judge",
    HYWUScoreTable: "HY-WU Score Table",
}

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: name for node, name in NODES.items()}

gsb_routes.register()
examples.offer_inputs()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
