"""Generate LoRA: a condition becomes a LoRA for each image of the batch."""

from __future__ import annotations

from .host import generators
from .reports import lora_summary, norm_entries, text_output
from .sockets import CATEGORY, CONDITION, GENERATOR, LORA, STOCK_LORA
from .stock import stock_lora


class HYWUGenerateLoRA:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The generator writes a LoRA for every image of the condition, in one forward pass. The result "
        "is kept (in host memory, up to a limit): changing the strength, the seed or the sampler never "
        "generates it again."
    )
    SEARCH_ALIASES = ["hypernetwork", "hy-wu", "hywu", "lora generator", "instant lora"]
    RETURN_TYPES = (LORA, STOCK_LORA, "STRING")
    RETURN_NAMES = ("lora", "lora_model", "summary")
    OUTPUT_TOOLTIPS = (
        "The generated LoRA, one for each image of the batch: for Apply, Save, Inspect, Blend, Select.",
        "The same for ComfyUI's own Load LoRA Model and Save LoRA Weights. It holds one LoRA: pick one "
        "of a batch with HY-WU Select LoRA.",
        "What was generated, for what and how long it took, as JSON.",
    )
    FUNCTION = "generate"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "generator": (GENERATOR, {"tooltip": "From HY-WU Load Generator."}),
                "condition": (
                    CONDITION,
                    {
                        "tooltip": "From HY-WU Condition Encode with the same generator, or a saved "
                        "condition from Load Condition."
                    },
                ),
            }
        }

    def generate(self, generator, condition):
        lora, seconds, cached = generators.generate(generator, condition)
        summary = lora_summary(lora, seconds=seconds, cached=cached)
        shown = norm_entries(lora, seconds=seconds, cached=cached)
        return text_output(summary, (lora, stock_lora(lora), summary), hywu_norms=shown)
