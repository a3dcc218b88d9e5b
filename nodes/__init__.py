"""The nodes of HY-WU, by name. ComfyUI reads the two mappings, ComfyUI-Manager's scanner the first one's text."""

from __future__ import annotations

from .apply import HYWUApplyLoRA, HYWULoRAHook, HYWULoRAScope
from .condition import HYWUConditionEncode, HYWULoadCondition, HYWUSaveCondition
from .evaluation import HYWUBenchmarkItems, HYWUJudge, HYWUScoreTable
from .host import examples, gsb_routes
from .hunyuan_image3 import HYWUHunyuanEditPrompt, HYWUHunyuanThink, HYWULoadHunyuanImage3
from .loaders import HYWULoadBundledEditor, HYWULoadGenerator
from .lora import (
    HYWUBlendLoRA,
    HYWUGenerateLoRA,
    HYWUInspectLoRA,
    HYWULoadLoRA,
    HYWUSaveLoRA,
    HYWUSelectLoRA,
)
from .train import HYWUModelLayout, HYWUTrainGenerator

NODE_CLASS_MAPPINGS = {
    "HYWULoadGenerator": HYWULoadGenerator,
    "HYWULoadBundledEditor": HYWULoadBundledEditor,
    "HYWUConditionEncode": HYWUConditionEncode,
    "HYWUGenerateLoRA": HYWUGenerateLoRA,
    "HYWUApplyLoRA": HYWUApplyLoRA,
    "HYWUSaveLoRA": HYWUSaveLoRA,
    "HYWULoadLoRA": HYWULoadLoRA,
    "HYWUSelectLoRA": HYWUSelectLoRA,
    "HYWUSaveCondition": HYWUSaveCondition,
    "HYWULoadCondition": HYWULoadCondition,
    "HYWUInspectLoRA": HYWUInspectLoRA,
    "HYWUBlendLoRA": HYWUBlendLoRA,
    "HYWULoRAScope": HYWULoRAScope,
    "HYWULoRAHook": HYWULoRAHook,
    "HYWUModelLayout": HYWUModelLayout,
    "HYWUTrainGenerator": HYWUTrainGenerator,
    "HYWUBenchmarkItems": HYWUBenchmarkItems,
    "HYWUJudge": HYWUJudge,
    "HYWUScoreTable": HYWUScoreTable,
    "HYWULoadHunyuanImage3": HYWULoadHunyuanImage3,
    "HYWUHunyuanThink": HYWUHunyuanThink,
    "HYWUHunyuanEditPrompt": HYWUHunyuanEditPrompt,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "HYWULoadGenerator": "HY-WU Load Generator",
    "HYWULoadBundledEditor": "HY-WU Load Bundled Editor",
    "HYWUConditionEncode": "HY-WU Condition Encode",
    "HYWUGenerateLoRA": "HY-WU Generate LoRA",
    "HYWUApplyLoRA": "Apply Generated LoRA",
    "HYWUSaveLoRA": "Save Generated LoRA",
    "HYWULoadLoRA": "Load Generated LoRA",
    "HYWUSelectLoRA": "HY-WU Select LoRA",
    "HYWUSaveCondition": "Save Condition",
    "HYWULoadCondition": "Load Condition",
    "HYWUInspectLoRA": "HY-WU Inspect LoRA",
    "HYWUBlendLoRA": "HY-WU Blend LoRAs",
    "HYWULoRAScope": "HY-WU LoRA Scope",
    "HYWULoRAHook": "HY-WU LoRA Hook",
    "HYWUModelLayout": "HY-WU Model Layout",
    "HYWUTrainGenerator": "HY-WU Train Generator",
    "HYWUBenchmarkItems": "HY-WU Benchmark Items",
    "HYWUJudge": "HY-WU Judge",
    "HYWUScoreTable": "HY-WU Score Table",
    "HYWULoadHunyuanImage3": "Load HunyuanImage-3",
    "HYWUHunyuanThink": "HunyuanImage-3 Think",
    "HYWUHunyuanEditPrompt": "HunyuanImage-3 Edit Prompt",
}

gsb_routes.register()
examples.offer_inputs()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
